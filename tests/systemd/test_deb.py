"""The Debian package on a booted system: what it brings, starts and leaves behind."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest

from circleosd import __version__, paths
from tests import PROJECT
from tests.systemd.conftest import build_package
from tests.systemd.machine import Machine

DIRECTORIES = "/etc /home /root /run /srv /usr /var"
# What other programs write while one looks, whether or not CircleOSD is there.
OTHERS = (
    "/run/systemd/",
    "/run/user",
    "/var/cache/",
    "/var/lib/PackageKit/",
    "/var/lib/systemd/timers",
    "/var/log/",
    "/var/tmp/",
)
# Packages may start services, and the index of manual pages, which takes seconds each time, stays as it is.
PREPARE = "rm -f /usr/sbin/policy-rc.d /var/lib/man-db/auto-update"
ENABLED = "circleosd.target circleosd-polkit.path circleosd-polkit.service"
# What is enabled stays so, for another installation (deb-systemd-helper(1p)).
ENABLEMENT = re.compile(r"^/etc/systemd/system/[^/]+\.wants|^/var/lib/systemd/deb-systemd-helper-enabled")
SOCKETS = [f"circleosd-{part}.socket" for part in paths.SERVICES.values()]
SERVICES = [f"circleosd-{part}.service" for part in paths.SERVICES.values()]
MANUAL = (PROJECT / "man/circleosd.8").read_text(encoding="utf-8").replace("\\-", "-").replace("\\(aq", "'")
# A client other than circlectl, whose files an upgrade replaces.
ASK = """
import socket
while True:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect("/run/circleosd/auth-service.sock")
        sock.sendall(b'{"action":"health"}\\n')
        assert b'"ok":true' in sock.recv(65536)
    print("answered", flush=True)
"""


@pytest.fixture
def machine(booted: Machine) -> Machine:
    """A machine without the package, which starts what is installed."""
    booted.succeed(PREPARE, "dpkg --purge circleosd 2>&1")
    return booted


@pytest.fixture
def installed(booted: Machine, deb: str) -> Machine:
    """A machine with the package, for tests that leave it as it is."""
    anew = f"{{ dpkg --purge circleosd && apt-get install -qq -y {deb}; }} 2>&1"
    booted.succeed(PREPARE, f"systemctl --quiet is-active circleosd.target || {anew}")
    return booted


def install(machine: Machine, deb: str) -> None:
    machine.succeed(f"dpkg --install {deb} 2>&1")


def newer(machine: Machine, deb: str) -> str:
    """The package with the version 99, another polkit rule and newer files of units, on the machine."""
    directory = "/tmp/circleosd-newer"
    code = f"{directory}/usr/lib/circleosd/lib/python3*/site-packages/circleosd"
    machine.succeed(
        f"rm -rf {directory}",
        f"dpkg-deb --raw-extract {deb} {directory}",
        f"sed -i 's/^Version: .*/Version: 99/' {directory}/DEBIAN/control",
        f"sed -i 's/^__version__ = .*/__version__ = \"99\"/' {code}/__init__.py",
        f"sed -i 's/^polkit.addRule/\\/\\/ of version 99\\n&/' {code}/polkit.py",
        f"touch {directory}/usr/lib/systemd/*/circleosd*",
        f"dpkg-deb --build -Znone {directory} {directory}.deb",
    )
    return f"{directory}.deb"


def files(machine: Machine, lower: str) -> set[str]:
    """What is on the machine alone, and not in the file system that it has booted, where others write meanwhile."""
    # Of a file that is no directory overlayfs tells by the device where it is from, also when that one is gone; of a
    # directory that is gone, that it has no links.
    own, theirs = machine.succeed("stat --format=%d / /usr/bin/env").split()
    listed = machine.succeed(f"find {DIRECTORIES} -xdev -links +0 -printf '%D %p\\0'").split("\0")[:-1]
    places = (entry.split(" ", 1) for entry in listed)
    found = {path for device, path in places if own == theirs or device != theirs}
    found = {path for path in found if not os.path.lexists(f"{lower}/{path}")}
    others = (*OTHERS, *(path for path in found if "/systemd-private-" in path))
    return {path for path in found if "circleosd" in path or not path.startswith(others)}


def states(machine: Machine, units: list[str]) -> set[str]:
    return {machine.get_unit_property(unit, "ActiveState") for unit in units}


def test_the_package_has_no_path_of_where_it_was_built(package: Path) -> None:
    content = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True).stdout
    for path in (PROJECT / "build", PROJECT / ".venv", "/tmp/pip-"):
        assert os.fsencode(path) not in content


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: others own the sources")
@pytest.mark.skipif(
    not all(map(shutil.which, ("git", "dpkg-deb", "strip"))), reason="needs git and what builds a package"
)
def test_the_time_of_the_sources_is_that_of_the_last_commit_whoever_owns_them(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(PROJECT / "scripts/build-deb", tmp_path / "scripts")
    (tmp_path / "CHANGELOG.md").touch()
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\n[ "$1" != -c ] || exec echo 0.1.0\necho "time $SOURCE_DATE_EPOCH" >&2\nexit 1\n')
    python.chmod(0o755)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(tmp_path)]
    times = {"GIT_AUTHOR_DATE": "1700000000 +0000", "GIT_COMMITTER_DATE": "1700000000 +0000"}
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run(
        [*git, "commit", "--quiet", "--allow-empty", "--message=a"], env={**os.environ, **times}, check=True
    )  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name not in ("SOURCE_DATE_EPOCH", "SUDO_UID")}
    for owner in (os.getuid(), 65534):
        for path in (tmp_path, tmp_path / ".git"):
            os.chown(path, owner, -1)
        built = [tmp_path / "scripts/build-deb"]
        done = subprocess.run(built, env=environment, capture_output=True, text=True, check=False)
        assert "\ntime 1700000000\n" in done.stderr, done


def test_what_the_package_brings_is_roots_and_everybody_may_read_it(package: Path) -> None:
    listing = subprocess.run(["dpkg-deb", "--contents", package], capture_output=True, text=True, check=True).stdout
    for line in listing.splitlines():
        mode, owner, *_ = line.split()
        assert owner == "root/root", line
        assert mode in ("drwxr-xr-x", "-rw-r--r--", "-rwxr-xr-x", "lrwxrwxrwx"), line


def test_what_the_documents_link_to_is_in_the_package(package: Path, tmp_path: Path) -> None:
    subprocess.run(["dpkg-deb", "--extract", package, tmp_path], check=True)
    for page in ("README.md", "plugins/README.md"):
        installed = tmp_path / "usr/share/doc/circleosd" / page
        links = re.findall(r"\]\((?!https?:)([^)#]+)", installed.read_text(encoding="utf-8"))
        assert links, page
        assert [link for link in links if not (installed.parent / link).exists()] == [], page
    assert not [*tmp_path.glob("usr/share/circleosd/plugins/**/*.so")]  # what was built here stays here


def test_what_the_package_brings_is_as_debian_has_it(package: Path, tmp_path: Path) -> None:
    """Policy 4.4, 10.1 and 12.5; where there is lintian(1), that too."""
    subprocess.run(["dpkg-deb", "--extract", package, tmp_path], check=True)
    libraries = sorted(tmp_path.rglob("*.so"))
    assert len(libraries) > 10
    sections = subprocess.run(["readelf", "--section-headers", *libraries], capture_output=True, text=True, check=True)
    assert ".symtab" not in sections.stdout
    found = [path for path in tmp_path.rglob("*") if not path.is_symlink() and path.is_file()]
    assert [path for path in found if path.name.startswith(".git")] == []
    executable = {path for path in found if path.stat().st_mode & 0o111 and path.suffix != ".so"}
    assert {path.name for path in executable} == {"circleosd", "circlectl"}
    documents = tmp_path / "usr/share/doc/circleosd"
    first, *_, last = gzip.decompress((documents / "changelog.gz").read_bytes()).decode().splitlines()
    (date,) = re.findall(r"^ -- .+ <.+@.+>  (\w{3}, \d\d \w{3} \d{4} [\d:]{8} \+0000)$", last)
    # So that a package of later sources is an upgrade to apt.
    version = f"{__version__}+{parsedate_to_datetime(date):%Y%m%d.%H%M%S}"
    assert first == f"circleosd ({version}) UNRELEASED; urgency=medium"
    assert subprocess.check_output(["dpkg-deb", "--field", package, "Version"], text=True) == f"{version}\n"
    assert "/usr/share/common-licenses/LGPL-2.1" in (documents / "copyright").read_text(encoding="utf-8")
    if shutil.which("lintian"):
        done = subprocess.run(["lintian", package], capture_output=True, text=True, check=False)
        # No license has been chosen.
        assert set(done.stdout.splitlines()) <= {"W: circleosd: copyright-without-copyright-notice"}


def test_the_size_does_not_depend_on_the_file_system_of_the_build(package: Path, tmp_path: Path) -> None:
    """It is counted as deb-substvars(5) says."""
    subprocess.run(["dpkg-deb", "--extract", package, tmp_path], check=True)
    found = [tmp_path, *tmp_path.rglob("*")]
    files = [path for path in found if path.is_file() and not path.is_symlink()]
    size = sum(-(-path.stat().st_size // 1024) for path in files) + len(found) - len(files)
    assert subprocess.check_output(["dpkg-deb", "--field", package, "Installed-Size"], text=True) == f"{size}\n"


def test_importing_reads_what_is_compiled_and_no_sources(package: Path, tmp_path: Path) -> None:
    """PEP 552: no hash of the source, but its time and size."""
    subprocess.run(["dpkg-deb", "--extract", package, tmp_path], check=True)
    compiled = [*tmp_path.rglob("*.pyc")]
    assert len(compiled) > 300
    for path in compiled:
        source = (path.parent.parent / f"{path.name.partition('.')[0]}.py").stat()
        assert struct.unpack("<3I", path.read_bytes()[4:16]) == (0, int(source.st_mtime), source.st_size), path


def test_any_message_bus_of_the_system_will_do_for_the_package(package: Path) -> None:
    """With dbus-broker it works as well, and there dbus can be removed."""
    done = subprocess.run(["dpkg-deb", "--field", package, "Depends"], capture_output=True, text=True, check=True)
    assert [text for text in done.stdout.strip().split(", ") if "dbus" in text] == [
        "default-dbus-system-bus | dbus-system-bus"
    ]


@pytest.mark.skipif("CIRCLEOSD_TEST_DEB" in os.environ, reason="the package was built elsewhere")
def test_the_same_sources_give_the_same_package(package: Path) -> None:
    assert build_package(TMPDIR="/var/tmp").read_bytes() == package.read_bytes()


def test_after_installation_the_sockets_listen_and_nothing_runs(machine: Machine, installed: Machine) -> None:
    assert states(installed, SOCKETS) == {"active"}
    assert states(installed, SERVICES) == {"inactive"}
    assert installed.get_unit_property("circleosd-polkit.path", "ActiveState") == "active"
    assert installed.succeed(f"systemctl is-enabled {ENABLED}").split() == ["enabled"] * 3
    modes = installed.succeed("stat --format='%a %U %G' /run/circleosd/*.sock")
    assert modes.splitlines() == ["660 root circleosd"] * len(SOCKETS)
    others_may = r"find /run/circleosd /etc/circleosd ! -type s \( -perm /022 -o ! -user root \)"
    assert installed.succeed(others_may) == ""
    assert "polkit.addRule" in installed.succeed("cat /etc/polkit-1/rules.d/49-circleosd.rules")
    assert installed.succeed("systemctl --failed --no-legend").strip() == ""
    assert installed.succeed("dpkg --verify circleosd") == ""


def test_root_uses_every_service_and_a_plugin(installed: Machine) -> None:
    reports = json.loads(installed.succeed("circlectl system status --json"))
    assert [report["state"] for report in reports] == ["running"] * len(SERVICES)
    assert "auth-service" in installed.succeed("circlectl service list")
    installed.succeed("circlectl plugin load /usr/share/circleosd/plugins/example.wasm")
    assert installed.succeed("circlectl plugin invoke example upper hello") == "HELLO\n"
    assert installed.get_unit_property("circleosd-plugin@example.service", "ActiveState") == "active"
    places = "/var/lib/circleosd/* /var/cache/circleosd/plugins /run/circleosd/plugins/example.sock"
    modes = installed.succeed(f"stat --format='%a %U' {places}").splitlines()
    users = ("auth", "plugins", "registry", "plugins")
    assert modes == [*(f"700 circleosd-{user}" for user in users), "600 circleosd-plugins"]
    installed.succeed("ls /var/cache/circleosd/plugins/*")  # its compilation


def test_a_member_of_the_group_may_connect_and_a_stranger_may_not(installed: Machine) -> None:
    installed.succeed("useradd --groups circleosd member", "useradd stranger")
    assert "uid:" in installed.succeed("su member -c 'circlectl user whoami'")
    status, output = installed.execute("su stranger -c 'circlectl user whoami' 2>&1")
    assert status == 12
    assert "only members of the group" in output


def test_manual_completion_and_the_journals_catalog_are_where_they_are_looked_for(installed: Machine) -> None:
    for section, page in (1, "circlectl"), (8, "circleosd"), (5, "circleosd.toml"):
        installed.succeed(f"zgrep --quiet '^.Sh SEE ALSO' $(man --where {section} {page})")
    assert "A change was made through CircleOSD" in installed.succeed(
        "journalctl --dump-catalog d97d231a40db4ad483bd3886e5099d0d"
    )
    bash = "/usr/share/bash-completion/completions/circlectl"
    assert "_circlectl circlectl" in installed.succeed(f"bash -c '. {bash}; complete -p circlectl'")
    if installed.execute("command -v zsh")[0] == 0:
        shown = installed.succeed("""zsh -fc 'autoload -Uz compinit; compinit -D -u; print $_comps[circlectl]'""")
        assert shown == "_circlectl\n"
    if installed.execute("command -v fish")[0] == 0:
        shown = installed.succeed("""fish -c 'complete -C "circlectl ser"'""")
        assert shown.startswith("service\tservices and ")


def test_nobodys_environment_or_working_directory_changes_what_runs(installed: Machine) -> None:
    installed.succeed("mkdir -p /tmp/evil/circlectl", "echo 'print(666)' >/tmp/evil/circlectl/__init__.py")
    assert "666" not in installed.succeed("cd /tmp/evil; PYTHONPATH=/tmp/evil circlectl --version")


@pytest.mark.parametrize("proc", ["default", "noaccess", "invisible"])  # as with hidepid=0, 1 and 2 (proc(5))
def test_the_embedded_mode_works_from_the_package(installed: Machine, proc: str) -> None:
    start = f"systemd-run --unit=embedded --uid=nobody --property=ProtectProc={proc}"
    installed.succeed(f"{start} circleosd up --dir /tmp/embedded 2>&1")
    installed.wait_for_file("/tmp/embedded/run/auth-service.sock")
    ask = "CIRCLEOSD_RUNTIME_DIR=/tmp/embedded/run circlectl"
    assert "running" in installed.succeed(f"{ask} system status")
    installed.succeed(f"{ask} plugin load /usr/share/circleosd/plugins/example.wasm")
    assert "plugin@example    active" in installed.succeed(f"{ask} service list")
    installed.succeed("systemctl stop embedded.service", "rm -r /tmp/embedded")


def test_removal_leaves_state_and_settings_and_purge_leaves_nothing(machine: Machine, deb: str, lower: str) -> None:
    before = files(machine, lower)
    install(machine, deb)
    machine.succeed("circlectl user create alice --password-stdin <<<'correct horse'")
    machine.succeed("circlectl plugin load /usr/share/circleosd/plugins/example.wasm")
    machine.succeed("circlectl plugin invoke example upper hello")

    machine.succeed("dpkg --remove circleosd 2>&1")
    assert machine.succeed("systemctl list-units --all --no-legend --state=loaded 'circleosd*'") == ""
    assert machine.execute("pgrep --full --list-full [/]usr/lib/circleosd/bin") == (1, "")
    left = files(machine, lower) - before
    state = {path for path in left if path.startswith("/var/lib/circleosd")}
    assert "/var/lib/circleosd/auth/auth.db" in state
    own = {"/etc/circleosd", "/etc/circleosd/config.toml"}
    dpkgs = {"/var/lib/dpkg/info/circleosd.list", "/var/lib/dpkg/info/circleosd.postrm"}
    assert left - state - {path for path in left if ENABLEMENT.search(path)} == own | dpkgs

    install(machine, deb)
    assert "alice" in machine.succeed("circlectl user list")
    assert machine.succeed("circlectl plugin invoke example upper again") == "AGAIN\n"
    assert machine.succeed("systemctl is-enabled circleosd.target").strip() == "enabled"

    machine.succeed("dpkg --purge circleosd 2>&1")
    assert machine.succeed("systemctl list-units --all --no-legend 'circleosd*'") == ""
    assert files(machine, lower) - before == set()
    assert machine.execute("getent passwd | grep circleosd")[0] == 1
    assert machine.execute("getent group | grep circleosd")[0] == 1


def test_an_upgrade_starts_the_new_version_keeps_settings_and_loses_no_connection(machine: Machine, deb: str) -> None:
    install(machine, deb)
    machine.succeed(
        "sed -i 's/^#idle_exit = .*/idle_exit = 7/' /etc/circleosd/config.toml",
    )
    reports = json.loads(machine.succeed("circlectl system status --json"))
    assert {report["version"] for report in reports} != {"99"}
    machine.succeed(f"python3 -I -c {shlex.quote(ASK)} >/tmp/asked 2>&1 & echo $! >/tmp/asking")
    install(machine, newer(machine, deb))
    reports = json.loads(machine.succeed("circlectl system status --json"))
    assert {report["version"] for report in reports} == {"99"}
    machine.wait_until_succeeds("grep 'of version 99' /etc/polkit-1/rules.d/49-circleosd.rules")
    assert machine.get_unit_property("circleosd.target", "NeedDaemonReload") == "no"
    machine.succeed("kill $(cat /tmp/asking)")
    assert set(machine.succeed("cat /tmp/asked").splitlines()) == {"answered"}
    assert "\nidle_exit = 7\n" in machine.succeed("cat /etc/circleosd/config.toml")


def test_an_upgrade_ends_what_watches_but_not_who_follows_the_record(machine: Machine, deb: str) -> None:
    install(machine, deb)
    machine.succeed("circlectl user create before --uid 4801", "rm -f /tmp/watched /tmp/followed")
    for command, shown in (("service watch", "watched"), ("system history --follow", "followed")):
        run = f"circlectl {command} >/tmp/{shown} 2>&1 || echo status $? >>/tmp/{shown}"
        machine.succeed(f"systemd-run --quiet --unit={shown} bash -c {shlex.quote(run)}")
        machine.wait_until_succeeds(f"[ -s /tmp/{shown} ]")
    install(machine, newer(machine, deb))
    machine.wait_until_succeeds("grep -q '^status 12' /tmp/watched")
    machine.succeed("circlectl user create after --uid 4802")
    machine.wait_until_succeeds("grep -q ' after ' /tmp/followed")
    machine.succeed("systemctl stop followed")


def test_what_the_administrator_disabled_stays_disabled_over_an_upgrade(machine: Machine, deb: str) -> None:
    install(machine, deb)
    machine.succeed("systemctl disable --now circleosd.target 2>&1")
    install(machine, deb)
    assert machine.execute("systemctl is-enabled circleosd.target")[1].strip() == "disabled"
    assert states(machine, [*SOCKETS, *SERVICES, "circleosd-polkit.path"]) == {"inactive"}


def test_an_upgrade_brings_the_new_polkit_rule_where_what_runs_is_disabled(machine: Machine, deb: str) -> None:
    install(machine, deb)
    machine.succeed("systemctl disable circleosd.target 2>&1")
    install(machine, newer(machine, deb))
    machine.wait_until_succeeds("grep 'of version 99' /etc/polkit-1/rules.d/49-circleosd.rules")
    assert machine.execute("systemctl is-enabled circleosd.target")[1].strip() == "disabled"


def test_what_the_administrator_disabled_stays_disabled_over_removal_but_not_over_purge(
    machine: Machine, deb: str
) -> None:
    install(machine, deb)
    machine.succeed("systemctl disable --now circleosd.target circleosd-polkit.path 2>&1")
    machine.succeed("dpkg --remove circleosd 2>&1")
    install(machine, deb)
    assert machine.execute(f"systemctl is-enabled {ENABLED}")[1].split() == ["disabled", "disabled", "enabled"]
    assert states(machine, [*SOCKETS, *SERVICES]) == {"inactive"}
    machine.succeed("dpkg --purge circleosd 2>&1")
    install(machine, deb)
    assert machine.succeed(f"systemctl is-enabled {ENABLED}").split() == ["enabled"] * 3


def test_what_the_manual_says_of_a_copy_brings_everything_back_to_a_new_host(machine: Machine, deb: str) -> None:
    lines = MANUAL.partition("Back up all")[2].partition("Restore the backup")
    keep, restore = ([line[2:] for line in part.splitlines() if line.startswith("# ")] for part in lines[::2])
    install(machine, deb)
    machine.succeed(
        "circlectl user create kept --uid 4711 && circlectl plugin load /usr/share/circleosd/plugins/example.wasm 2>&1",
        "circlectl plugin invoke example handle x",
        *(f"{command} 2>&1" for command in keep),
        "circlectl user create later --uid 4712",
        "dpkg --purge circleosd 2>&1",
        # A new host has other uids for the services.
        "useradd --system taken",
    )
    install(machine, deb)
    assert machine.succeed("stat --format=%a backup.tgz") == "600\n"  # it has the passwords' hashes
    for use in ("[ ! -e /var/lib/circleosd ]", "circlectl user create other --uid 4714"):
        machine.succeed(use, *(f"umask 027; {command} 2>&1" for command in restore))
        assert [user["name"] for user in json.loads(machine.succeed("circlectl user list --json"))] == ["kept"]
    assert "1 byte" in machine.succeed("circlectl plugin invoke example handle x")
    machine.succeed("circlectl system history --verify", "circlectl user create more --uid 4713", "userdel taken")


def test_what_the_manual_says_of_a_damaged_database_begins_a_new_one(machine: Machine, deb: str) -> None:
    anew = MANUAL.partition("move the damaged directory away")[2].partition(".Ed")[0]
    install(machine, deb)
    machine.succeed(
        "circlectl user create lost --uid 4711 && circlectl service list",
        "systemctl stop 'circleosd-*.service' 2>&1",
        "dd if=/dev/zero of=/var/lib/circleosd/auth/auth.db bs=16 count=1 conv=notrunc 2>&1",
    )
    said = machine.fail("circlectl user list 2>&1")
    assert "auth.db: file is not a database; restore a backup, see: man circleosd [unavailable]\n" in said
    machine.succeed(*(f"{line[2:]} 2>&1" for line in anew.splitlines() if line.startswith("# ")))
    assert machine.succeed("circlectl user list --json") == "[]\n"
    machine.succeed("circlectl system history --verify", "rm -r /root/auth.damaged")


def test_what_readme_begins_with_is_all_that_it_takes(machine: Machine, deb: str) -> None:
    install(machine, deb)
    machine.succeed(
        "if name=$(id -nu 1000); then userdel $name; fi",  # somebody of the machine whose file system this is
        "useradd --create-home --uid 1000 alice",
        "printf '[Service]\\nExecStart=/bin/sleep infinity\\n' >/etc/systemd/system/nginx.service",
        "systemctl daemon-reload",
    )
    readme = (PROJECT / "README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    block = "\n".join(line[4:] for line in readme.splitlines() if line.startswith("    "))
    told = ""
    for part in re.split(r"^(?=# |alice\$ )", block, flags=re.MULTILINE)[1:]:
        who, command = part.split(" ", maxsplit=1)
        shown = ""
        if "<<" not in command:  # else what follows is its text
            command, _, shown = command.partition("\n")
        command = f"su alice -c '{command}' 2>&1" if who == "alice$" else f"{{ {command}\n}} 2>&1"
        told = machine.execute(command)[1]
        if "history" not in command:
            assert told.startswith(shown.strip().removesuffix(" …")), told
    assert re.findall(r"alice/1000 +service-registry +(\w+) +nginx +(\w+)", told) == [
        ("restart", "done"),
        ("stop", "denied"),
    ]


def test_a_removal_that_fails_leaves_the_sockets_listening(machine: Machine, deb: str) -> None:
    install(machine, deb)
    prerm = "/var/lib/dpkg/info/circleosd.prerm"
    machine.succeed(f"echo exit 1 >>{prerm}")
    machine.fail("dpkg --remove circleosd 2>&1")
    assert states(machine, SOCKETS) == {"active"}
    machine.succeed(f"sed -i '$d' {prerm}")


def test_after_a_removal_none_of_its_units_is_shown_as_failed(machine: Machine, deb: str) -> None:
    install(machine, deb)
    machine.succeed("echo wrong >/etc/circleosd/services.d/wrong.toml")
    machine.wait_until_succeeds("systemctl is-failed circleosd-polkit.service")
    machine.succeed("dpkg --remove circleosd 2>&1")
    assert machine.succeed("systemctl list-units --all --failed --no-legend 'circleosd*'") == ""


def test_purge_says_which_users_and_groups_it_could_not_remove(machine: Machine, deb: str) -> None:
    install(machine, deb)
    machine.succeed("useradd --gid circleosd primary", "systemd-run --unit=busy --uid=circleosd-auth sleep infinity")
    said = machine.succeed("dpkg --purge circleosd 2>&1")
    assert "to remove it: userdel circleosd-auth\n" in said
    assert "to remove it: groupdel circleosd\n" in said
    assert machine.execute("dpkg --status circleosd 2>&1")[0] == 1
    assert machine.succeed("getent passwd | cut -d: -f1 | grep circleosd") == "circleosd-auth\n"
    machine.succeed("systemctl stop busy", "userdel primary", "userdel circleosd-auth", "groupdel circleosd")


def test_a_purge_goes_on_where_the_state_is_a_mount_point(machine: Machine, deb: str) -> None:
    install(machine, deb)
    machine.succeed("mkdir -p /var/lib/circleosd", "mount -t tmpfs tmpfs /var/lib/circleosd")
    machine.succeed("circlectl user create kept --uid 4711")
    said = machine.succeed("dpkg --purge circleosd 2>&1")
    assert "/var/lib/circleosd': Device or resource busy" in said
    assert machine.succeed("ls -A /var/lib/circleosd") == ""
    assert machine.execute("dpkg --status circleosd 2>&1")[0] == 1
    assert machine.execute("getent passwd | grep circleosd")[0] == 1
    machine.succeed("umount /var/lib/circleosd", "rmdir /var/lib/circleosd")


def test_state_behind_a_symbolic_link_is_used_copied_and_purged(machine: Machine, deb: str) -> None:
    machine.succeed("mkdir /srv/state", "ln -s /srv/state /var/lib/circleosd")
    install(machine, deb)
    machine.succeed("circlectl user create kept --uid 4711", "circlectl plugin list", "circlectl service list")
    machine.succeed("mv /etc/circleosd /srv/settings", "ln -s /srv/settings /etc/circleosd")
    (copy,) = re.findall(r"^# (.*tar -cz.*)$", MANUAL, re.MULTILINE)
    machine.succeed(f"cd /srv; {copy} 2>&1")
    machine.succeed("tar -tf /srv/backup.tgz etc/circleosd/./config.toml var/lib/circleosd/./auth/auth.db")
    machine.succeed("rm /etc/circleosd", "mv /srv/settings /etc/circleosd")
    machine.succeed("dpkg --purge circleosd 2>&1")
    assert machine.succeed("ls -A /srv/state") == ""
    machine.succeed("[ ! -L /var/lib/circleosd ]", "rm -r /srv/state /srv/backup.tgz")


def test_where_no_systemd_runs_it_is_prepared_and_not_started(machine: Machine, deb: str) -> None:
    """As in the build of a container: /run is empty."""
    script = f"mount -t tmpfs tmpfs /run && dpkg --install {deb} && ! systemctl is-system-running"
    machine.succeed(f"unshare --mount --propagation private bash -ec {shlex.quote(script)} 2>&1")
    assert machine.succeed(f"systemctl is-enabled {ENABLED}").split() == ["enabled"] * 3
    machine.succeed("getent passwd circleosd-auth")
    assert machine.execute("test -e /run/circleosd")[0] == 1
    script = "mount -t tmpfs tmpfs /run && dpkg --purge circleosd"
    machine.succeed(f"unshare --mount --propagation private bash -ec {shlex.quote(script)} 2>&1")


def test_a_chroot_without_proc_is_enough_to_install(machine: Machine, deb: str) -> None:
    script = f"mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /proc && dpkg --install {deb}"
    machine.succeed(f"unshare --mount --propagation private bash -ec {shlex.quote(script)} 2>&1")
    assert "install ok installed" in machine.succeed("dpkg --status circleosd")


def test_a_policy_not_to_start_services_is_obeyed(machine: Machine, deb: str) -> None:
    machine.succeed("printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d", "chmod 755 /usr/sbin/policy-rc.d")
    install(machine, deb)
    assert states(machine, SOCKETS) == {"inactive"}
    assert machine.succeed("systemctl is-enabled circleosd.target").strip() == "enabled"
