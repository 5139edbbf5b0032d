"""What has to exist for each service exists for all of them."""

from __future__ import annotations

import re

import pytest

from circlectl import commands
from circleosd.__main__ import USAGE
from circleosd.api import actions
from circleosd.embedded.unitfile import UnitFile
from circleosd.paths import SERVICES
from tests import PROJECT

UNITS = PROJECT / "units"
# Where one line lists the services, or their units, users or directories.
LISTS = (
    "README.md", "debian/postinst", "debian/postrm", "man/circleosd.8", "man/circleosd.toml.5",
    "nixos-test/scenario.py", "scripts/user-units",
)  # fmt: skip


# What the unit of one service has and those of the others need not have.
OWN = {"auth": ("Environment=",), "plugins": ("LogRateLimitIntervalSec=", "CacheDirectory")}


def unit(path: str) -> UnitFile:
    return UnitFile(
        (UNITS / path).read_text(encoding="utf-8"), {"t/circleosd": "/run/circleosd", "S": "/state", "C": "/cache"}
    )


@pytest.mark.parametrize(("service", "part"), SERVICES.items())
def test_a_service_has_contracts_commands_units_and_a_user(service: str, part: str) -> None:
    (group,) = [group for group, name in actions.SERVICES.items() if name == service]
    assert service in {command.service for command in commands.of_group(group).values()}
    assert f"\n  {service} " in USAGE
    assert f"\n| `{service}` | `{service}.sock` | " in (PROJECT / "README.md").read_text(encoding="utf-8")
    name = f"circleosd-{part}"
    assert unit(f"{name}.socket").get("Socket", "ListenStream") == f"/run/circleosd/{service}.sock"
    assert unit(f"{name}.service").get("Service", "ExecStart") == f"circleosd {service}"
    assert unit(f"{name}.service").get("Service", "StateDirectory") == f"circleosd/{part}"
    assert unit(f"system/{name}.service.d/10-system.conf").get("Service", "User") == name
    assert f'\nu {name} - "CircleOSD {service}"\n' in (UNITS / "circleosd.sysusers.conf").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["service", "socket"])
def test_what_the_unit_of_one_service_has_those_of_all_have(kind: str) -> None:
    found = []
    for service, part in SERVICES.items():
        text = (UNITS / f"circleosd-{part}.{kind}").read_text(encoding="utf-8").replace(service, "SERVICE")
        others = ("#", "Description=", *OWN.get(part, ()))
        lines = re.sub(rf"\b{part}\b", "PART", text).splitlines()
        found.append([line for line in lines if not line.startswith(others)])
    assert found == [found[0]] * len(SERVICES)


def test_nothing_else_is_taken_for_a_service() -> None:
    assert {*actions.SERVICES.values()} == {*SERVICES}
    sockets = {path.name for path in UNITS.glob("*.socket") if "@" not in path.name}
    assert sockets == {f"circleosd-{part}.socket" for part in SERVICES.values()}
    assert {*unit("circleosd.target").words("Unit", "Wants")} == sockets


@pytest.mark.parametrize("file", LISTS)
def test_a_list_of_the_services_has_all_of_them(file: str) -> None:
    listed = 0
    for line in (PROJECT / file).read_text(encoding="utf-8").splitlines():
        for form in ("{service}", "circleosd-{part}", "$state/{part}"):
            names = [form.format(service=service, part=part) for service, part in SERVICES.items()]
            found = [name for name in names if re.search(rf"(?<!\w){re.escape(name)}\b", line)]
            if len(found) > 1:
                assert found == names, line
                listed += 1
    assert listed
