"""CircleOSD installed from its Debian package on a booted machine, with what nixos-test/scenario.py expects to find."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests import PROJECT
from tests.systemd.machine import Machine

USERS = {"alice": 1000, "bob": 1001, "mallory": 1002}
CATALOG = """\
[[service]]
name = "nginx"
unit = "nginx.service"
description = "A web server"

[[service]]
name = "broken"
unit = "broken.service"
description = "A service that cannot start"
"""
BROKEN = """\
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'echo "cannot start: this service is broken" >&2; exit 3'
"""


def install(machine: Machine, deb: Path) -> None:
    """Install the package, and set the machine up as nixos-test/default.nix sets up its virtual machine."""
    # A file system that was made as an image may forbid packages to start anything (invoke-rc.d(8)).
    machine.succeed("rm -f /usr/sbin/policy-rc.d")
    machine.copy_from_host(str(deb), "/tmp/circleosd.deb")
    machine.succeed("dpkg --install /tmp/circleosd.deb 2>&1")
    for user, uid in USERS.items():
        # The machine whose file system this is may have somebody of that uid; not in here.
        machine.succeed(f"if name=$(id -nu {uid} 2>/dev/null); then userdel $name; fi")
        machine.succeed(f"useradd --create-home --uid {uid} {user}")
    machine.succeed("for user in alice bob; do usermod --append --groups circleosd $user; done")
    write(machine, "/etc/circleosd/config.toml", "[server]\nidle_exit = 3\n")
    write(machine, "/etc/circleosd/services.d/test.toml", CATALOG)
    write(machine, "/etc/systemd/system/broken.service", BROKEN)
    machine.succeed("systemctl daemon-reload")
    machine.copy_from_host(str(PROJECT / "plugins"), "/etc/circleosd-test/plugins")
    with tempfile.TemporaryDirectory() as hostile:
        wat2wasm = f"{sys.executable} {PROJECT}/plugins/wat2wasm.py"
        make = ["make", "--silent", "-C", f"{PROJECT}/nixos-test/plugins", f"OUT={hostile}", f"WAT2WASM={wat2wasm}"]
        subprocess.run([*make, "CC=gcc"], check=True, stdin=subprocess.DEVNULL)
        machine.copy_from_host(hostile, "/etc/circleosd-test/hostile")
    machine.wait_until_succeeds("grep -q nginx.service /etc/polkit-1/rules.d/49-circleosd.rules")


def write(machine: Machine, path: str, text: str) -> None:
    """Put a text file on the machine."""
    machine.succeed(f"mkdir -p {Path(path).parent} && cat >{path} <<'EOF'\n{text}EOF")
