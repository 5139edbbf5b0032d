"""What an administrator is told on a booted system when units, the catalog or rights do not allow what was asked."""

from __future__ import annotations

import pytest

from tests.systemd.installed import write
from tests.systemd.machine import Machine

CATALOG = "".join(
    f'[[service]]\nname = "{name}"\nunit = "ct-{name}.service"\n' for name in ("loop", "calm", "odd", "none")
)
UNITS = {
    "loop": "Type=oneshot\nExecStart=/bin/sh -c 'echo last words; exit 4'",
    "calm": "ExecStart=/bin/sleep infinity",
    "odd": "ExecStart=relative/program",
}


@pytest.fixture(scope="module")
def machine(installed: Machine) -> Machine:
    for name, text in UNITS.items():
        write(installed, f"/etc/systemd/system/ct-{name}.service", f"[Service]\n{text}\n")
    write(installed, "/etc/circleosd/services.d/administration.toml", CATALOG)
    installed.succeed("systemctl daemon-reload")
    installed.wait_until_succeeds("grep -q ct-none.service /etc/polkit-1/rules.d/49-circleosd.rules", timeout=20)
    return installed


def refused(machine: Machine, command: str, status: int, user: str | None = None) -> str:
    """What `circlectl` says to a command that has to end with that status."""
    line = f"circlectl {command} 2>&1"
    found, said = machine.execute(f"su {user} -c '{line}'" if user else line)
    assert found == status, said
    return said


def test_a_stranger_is_told_which_group_to_join(machine: Machine) -> None:
    for command in ("service list", "user whoami", "plugin list"):
        said = refused(machine, command, 12, "mallory")
        assert "as root: usermod --append --groups circleosd USER" in said
        assert "start circleosd.target" not in said
