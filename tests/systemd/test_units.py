"""The shipped unit files, judged by systemd's own tools."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from tests import PROJECT

UNITS = PROJECT / "units"
# The most exposure that systemd-analyze security may find, in its tenths …
THRESHOLDS = defaultdict(lambda: 15, auth=6)
# … and what of a sandbox it finds open. In the root directory are the programs; /dev/null and the like may be opened;
# the units and their drop-ins say why of the rest.
ALL = {"RootDirectoryOrRootImage", "DeviceAllow"}
SERVICE = {*ALL, "RestrictAddressFamilies_AF_UNIX", "ProtectProc", "PrivateUsers"}
SWITCH = {*ALL, "RestrictAddressFamilies_AF_UNIX", "PrivateUsers", "PrivateMounts", "RemoveIPC"}
OPEN = {
    "auth": {*SERVICE, "SystemCallFilter_resources"},
    "registry": {*SERVICE, "SupplementaryGroups"},
    "plugins": {*SERVICE, "SupplementaryGroups", "SystemCallFilter_resources"},
    "plugin@": {*ALL, "SystemCallFilter_resources", "SystemCallFilter_privileged", "MemoryDenyWriteExecute"},
    "polkit": {
        *(SWITCH - {"RemoveIPC"}), "UserOrDynamicUser", "CapabilityBoundingSet_CAP_DAC_FOWNER_IPC_OWNER", "ProcSubset",
        "UMask"
    },
    "enable@": SWITCH,
    "disable@": SWITCH,
}  # fmt: skip

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units and their system drop-ins as they are installed, with a program that exists."""
    for path in UNITS.iterdir():
        if path.suffix in (".service", ".socket", ".path", ".target"):
            text = path.read_text().replace("ExecStart=circleosd", "ExecStart=/bin/true")
            (tmp_path / path.name).write_text(text)
    for directory in (UNITS / "system").iterdir():
        shutil.copytree(directory, tmp_path / directory.name)
    return tmp_path


def whole(installed: Path, service: str) -> Path:
    """One file of a service and its drop-ins, which is all that an offline analysis reads."""
    name = f"circleosd-{service}.service"
    parts = [installed / name, *sorted((installed / f"{name}.d").glob("*.conf"))]
    (installed / "whole").mkdir(exist_ok=True)
    path = installed / "whole" / name.replace("@", "@x")
    path.write_text("\n".join(part.read_text() for part in parts))
    return path


@pytest.mark.parametrize("service", OPEN)
def test_a_service_is_no_more_exposed_than_promised(installed: Path, service: str) -> None:
    threshold = f"--threshold={THRESHOLDS[service]}"
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", threshold, whole(installed, service)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert re.search(r"Overall exposure level for \S+: [0-9.]+", done.stdout), done
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("service", OPEN)
def test_of_a_services_sandbox_nothing_is_open_but_what_it_needs(installed: Path, service: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--json=short", whole(installed, service)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = {check["json_field"] for check in json.loads(done.stdout) if float(check["exposure"] or 0) > 0}
    assert found - OPEN[service] == set()  # from 257 on, systemd knows of mounts that are private by other settings


def test_systemd_knows_every_key(installed: Path) -> None:
    names = sorted(str(path) for path in installed.iterdir() if path.is_file())
    instances = [name.replace("@.", "@x.") for name in names if "@." in name]
    for name in instances:
        Path(name).symlink_to(name.replace("@x.", "@."))
    plain = [name for name in names if "@." not in name]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=no", "--man=no", *plain, *instances],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    ours = [line for line in done.stderr.splitlines() if "circleosd" in line]
    assert done.returncode == 0, done.stderr
    assert ours == []


def test_nothing_runs_as_root_but_the_generator_of_the_polkit_rule(installed: Path) -> None:
    names = {path.name.removeprefix("circleosd-").removesuffix(".service") for path in installed.glob("*.service")}
    assert names == set(OPEN)
    other = re.compile(r"^(User=circleosd-\w+|DynamicUser=yes)$", re.MULTILINE)
    assert [name for name in sorted(names) if not other.search(whole(installed, name).read_text())] == ["polkit"]
