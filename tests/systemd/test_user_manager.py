"""CircleOSD in the systemd manager of a user: from the package, and from a source tree by `make install-user`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from circleosd import paths
from tests.systemd.conftest import PROJECT_INSIDE
from tests.systemd.installed import write
from tests.systemd.machine import Machine
from tests.systemd.test_deb import PREPARE, SERVICES, SOCKETS, install, newer

TREE = "/home/carol/source/circleosd"
MANAGERS = "/home/carol/.config/systemd/user"


@pytest.fixture(scope="module")
def machine(booted: Machine, deb: str) -> Machine:
    """A machine with the package, and with carol, whose manager always runs, and who is in no group."""
    booted.succeed(PREPARE, f"dpkg --install {deb} 2>&1")
    booted.succeed("useradd --create-home --shell /bin/bash carol", "loginctl enable-linger carol")
    booted.wait_for_unit(f"user@{booted.succeed('id -u carol').strip()}.service")
    return booted


@pytest.fixture
def tree(machine: Machine) -> Iterator[str]:
    """A source tree of carol's. Its environment is the package's: the project's own may be out of her reach."""
    parts = " ".join(f"{PROJECT_INSIDE}/{part}" for part in ("Makefile", "scripts", "units", "plugins"))
    machine.succeed(f"mkdir -p {TREE}", f"cp -r {parts} {TREE}", f"ln -s /usr/lib/circleosd {TREE}/.venv")
    machine.succeed("chown -R carol: /home/carol")
    yield TREE
    machine.succeed(f"rm -r {TREE}")


def as_carol(command: str) -> str:
    return f"su - carol -c {shlex.quote(command)}"


def states(machine: Machine, units: list[str]) -> set[str]:
    return {machine.get_unit_property(unit, "ActiveState", "carol") for unit in units}


def files(machine: Machine) -> set[str]:
    return set(machine.succeed("find /home/carol /run/user/$(id -u carol)/circleosd* -print0 || true").split("\0"))


def use(machine: Machine, circlectl: str) -> None:
    """Every service and a plugin, as carol."""
    reports = json.loads(machine.succeed(as_carol(f"{circlectl} --scope user system status --json")))
    assert [report["state"] for report in reports] == ["running"] * len(SERVICES)
    listed = json.loads(machine.succeed(as_carol(f"{circlectl} service list --json --scope=user")))
    assert {*paths.SERVICES} <= {row["name"] for row in listed}
    machine.succeed(as_carol(f"{circlectl} --scope user plugin load /usr/share/circleosd/plugins/example.wasm"))
    upper = machine.succeed(as_carol(f"{circlectl} --scope user plugin invoke example upper hello"))
    assert upper == "HELLO\n"
    assert machine.get_unit_property("circleosd-plugin@example.service", "ActiveState", "carol") == "active"


def test_a_user_runs_the_packages_units_beside_the_systems(machine: Machine) -> None:
    assert machine.systemctl("is-enabled circleosd.target", "carol")[1].strip() == "disabled"
    status, said = machine.systemctl("enable --now circleosd.target 2>&1", "carol")
    assert (status, len(said.splitlines())) == (0, 1), said
    assert "/default.target.wants/circleosd.target" in said
    assert states(machine, SOCKETS) == {"active"}
    assert states(machine, SERVICES) == {"inactive"}
    use(machine, "circlectl")
    modes = machine.succeed("stat --format='%a %U' /run/user/$(id -u carol)/circleosd/{,plugins/}*.sock")
    assert modes.splitlines() == ["600 carol"] * 4
    machine.succeed("touch /usr/lib/systemd/user/circleosd-plugin@.service")
    said = machine.succeed(as_carol("circlectl --scope user service status plugin@example 2>&1"))
    assert "see: systemctl --user daemon-reload" in said
    machine.systemctl("daemon-reload", "carol")
    # The system's is meant without the flag, and she is a stranger to it.
    said = machine.fail(as_carol("circlectl service list 2>&1"))
    assert "only members of the group" in said
    assert "use your own CircleOSD: --scope user" in said
    machine.succeed("circlectl --scope system user create dora --password-stdin <<<'long enough'")
    assert "dora" not in machine.succeed(as_carol("circlectl --scope user user list"))
    machine.systemctl("disable --now circleosd.target", "carol")
    for socket in SOCKETS:  # they go with the target, each once its service has finished
        machine.wait_until_fails(f"systemctl --user --machine=carol@ is-active {socket}")
    assert machine.get_unit_property("circleosd-auth.socket", "ActiveState") == "active"


def test_an_upgrade_of_the_package_is_one_in_the_managers_of_users_too(machine: Machine, deb: str) -> None:
    machine.systemctl("enable --now circleosd.target", "carol")
    use(machine, "circlectl")
    install(machine, newer(machine, deb))
    assert machine.get_unit_property("circleosd.target", "NeedDaemonReload", "carol") == "no"
    reports = json.loads(machine.succeed(as_carol("circlectl --scope user system status --json")))
    assert {report["version"] for report in reports} == {"99"}
    machine.systemctl("disable --now circleosd.target", "carol")
    install(machine, deb)


def test_a_user_whose_service_never_stops_holds_up_no_upgrade_and_no_removal(machine: Machine, deb: str) -> None:
    override = f"{MANAGERS}/circleosd-auth.service.d/stubborn.conf"
    stubborn = "ExecStart=/bin/sh -c 'trap \"\" TERM; while :; do sleep 1; done'"
    write(machine, override, f"[Service]\nType=exec\nTimeoutStopSec=infinity\nExecStart=\n{stubborn}\n")
    # What ends the wait does so sooner here.
    write(machine, "/usr/local/sbin/timeout", '#!/bin/sh\nshift\nexec /usr/bin/timeout 5 "$@"\n')
    machine.succeed("chown -R carol: /home/carol", "chmod 755 /usr/local/sbin/timeout")
    for command in (f"dpkg --install {deb}", "dpkg --remove circleosd"):
        machine.systemctl("daemon-reload", "carol")
        machine.systemctl("start circleosd.target circleosd-auth.service", "carol")
        assert states(machine, ["circleosd-auth.service"]) == {"active"}
        machine.succeed(f"{command} 2>&1", timeout=120)
        machine.systemctl("kill --signal=KILL circleosd-auth.service", "carol")
    machine.succeed(f"rm /usr/local/sbin/timeout {override}", f"dpkg --install {deb} 2>&1")
    machine.systemctl("daemon-reload", "carol")


def test_a_source_tree_is_installed_into_the_users_manager_and_out_of_it(machine: Machine, tree: str) -> None:
    before = files(machine)
    said = machine.succeed(as_carol(f"{tree}/scripts/user-units install 2>&1"))
    assert f"{tree}/.venv/bin/circlectl --scope user system status" in said
    assert states(machine, SOCKETS) == {"active"}
    assert machine.systemctl("is-enabled circleosd.target", "carol")[1].strip() in ("enabled", "linked")
    use(machine, f"{tree}/.venv/bin/circlectl")
    for unit in SERVICES:
        path = machine.get_unit_property(unit, "FragmentPath", "carol")
        assert path == f"/home/carol/.config/systemd/user/{unit}"
        assert machine.succeed(f"readlink -f {path}").strip() == f"{tree}/units/{unit}"
        pid = machine.get_unit_property(unit, "MainPID", "carol")
        assert f"{tree}/.venv/bin/circleosd" in machine.succeed(f"tr '\\0' ' ' </proc/{pid}/cmdline")

    machine.succeed(as_carol(f"{tree}/scripts/user-units install 2>&1"))  # once more changes nothing
    use(machine, f"{tree}/.venv/bin/circlectl")

    machine.succeed(as_carol(f"{tree}/scripts/user-units uninstall 2>&1"))
    assert states(machine, [*SOCKETS, *SERVICES]) == {"inactive"}
    left = {path for path in files(machine) - before if "/.config/circleosd" not in path}  # and that is its state
    assert [path for path in left if "circle" in Path(path).name or Path(path).is_relative_to(MANAGERS)] == []
    assert machine.get_unit_property("circleosd.target", "FragmentPath", "carol").startswith("/usr/lib/systemd/user/")


def test_installing_another_source_tree_replaces_what_runs(machine: Machine, tree: str) -> None:
    other = f"{tree}-newer"
    machine.succeed(as_carol(f"{tree}/scripts/user-units install 2>&1"), as_carol(f"cp -r {tree} {other}"))
    use(machine, f"{tree}/.venv/bin/circlectl")
    said = machine.succeed(as_carol(f"{other}/scripts/user-units install 2>&1"))
    assert "can still be activated" not in said
    use(machine, f"{other}/.venv/bin/circlectl")
    for unit in SERVICES:
        pid = machine.get_unit_property(unit, "MainPID", "carol")
        assert f"{other}/.venv/bin/circleosd" in machine.succeed(f"tr '\\0' ' ' </proc/{pid}/cmdline")
    machine.succeed(as_carol(f"{other}/scripts/user-units uninstall 2>&1"), f"rm -r {other}")


def test_without_a_manager_the_reason_and_the_next_step_are_said(machine: Machine, tree: str) -> None:
    machine.succeed("chmod -R a+rX /home/carol")
    said = machine.fail(f"setpriv --reuid nobody --clear-groups env HOME=/tmp {tree}/scripts/user-units install 2>&1")
    assert "cannot reach your systemd manager" in said
    assert "loginctl enable-linger nobody" in said


def test_removing_the_package_stops_it_in_the_managers_of_users_too(machine: Machine, deb: str) -> None:
    machine.systemctl("enable --now circleosd.target", "carol")
    use(machine, "circlectl")
    machine.succeed("dpkg --remove circleosd 2>&1")
    assert states(machine, [*SOCKETS, *SERVICES]) == {"inactive"}
    assert machine.execute("pgrep --full --list-full [/]usr/lib/circleosd/bin") == (1, "")
    install(machine, deb)
    machine.systemctl("disable circleosd.target", "carol")
