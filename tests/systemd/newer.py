"""Make a root file system of a newer Debian for a `Container`: ``python -m tests.systemd.newer CACHE``.

Prints the directory of the tree, and makes it first unless CACHE has one of the same suite and packages.
Needs root, mmdebstrap and a Debian mirror; which, and how to reach it, this machine's apt settings tell.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = (
    "dbus",
    "dbus-user-session",
    "libpam-systemd",
    "mount",
    "nginx-light",
    "passwd",
    "polkitd",
    "procps",
    "python3",
    "python3-venv",
    "systemd",
    "systemd-sysv",
)
# What of apt's settings says how to reach a mirror, and how fresh it has to be.
TRANSPORT = ("Acquire::http", "Acquire::Check-", "Acquire::Retries")


def apt_mirror() -> str:
    """The first Debian archive in this machine's apt sources. Raises SystemExit if there is none."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    for uri in found:
        if uri.rstrip("/").endswith("/debian"):
            return uri
    raise SystemExit("cannot find a Debian mirror in this machine's apt sources; name one with --mirror")


def apt_transport() -> list[str]:
    """This machine's apt settings about reaching mirrors, as lines of apt.conf(5)."""
    settings = subprocess.run(["apt-config", "dump"], stdout=subprocess.PIPE, text=True, check=True).stdout
    return [line for line in settings.splitlines() if line.startswith(TRANSPORT) and not line.endswith('"";')]


def make_tree(cache: Path, suite: str, packages: list[str], mirror: str | None) -> Path:
    """Return the tree of `suite` with `packages` in `cache`, making it if it is not there.

    Raises CalledProcessError, with nothing left behind, when mmdebstrap fails.
    """
    wanted = sorted({*PACKAGES, *packages})
    tree = cache.resolve() / f"{suite}-{hashlib.sha256(' '.join(wanted).encode()).hexdigest()[:12]}"
    if tree.is_dir():
        return tree
    unfinished = tree.with_suffix(f".{os.getpid()}")
    settings = [f"--aptopt={line}" for line in apt_transport()]
    command = ["mmdebstrap", "--variant=apt", f"--include={','.join(wanted)}", *settings]
    try:
        subprocess.run([*command, suite, str(unfinished), mirror or apt_mirror()], stdout=sys.stderr, check=True)
        unfinished.chmod(0o755)
        unfinished.rename(tree)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return tree


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.systemd.newer", description="Find or make a tree of a newer Debian."
    )
    parser.add_argument("cache", type=Path, help="directory that holds the trees")
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="what to have in it beyond the usual")
    parser.add_argument("--suite", default="trixie", help="the Debian release (trixie)")
    parser.add_argument("--mirror", help="the archive to take it from, if not this machine's")
    options = parser.parse_args()
    if os.geteuid() != 0 or not shutil.which("mmdebstrap"):
        parser.error("making a tree needs root and mmdebstrap (apt install mmdebstrap)")
    options.cache.mkdir(parents=True, exist_ok=True)
    print(make_tree(options.cache, options.suite, options.packages, options.mirror))


if __name__ == "__main__":
    main()
