"""The shipped unit files, judged by systemd's own tools."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "units"
# The most exposure that systemd-analyze security may find, in its tenths.
THRESHOLDS = {"auth": 6, "registry": 15, "plugins": 15, "plugin@": 15, "polkit": 15, "enable@": 15, "disable@": 15}

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


@pytest.mark.parametrize(("service", "most"), THRESHOLDS.items())
def test_a_service_is_no_more_exposed_than_promised(installed: Path, service: str, most: int) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={most}", whole(installed, service)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert re.search(r"Overall exposure level for \S+: [0-9.]+", done.stdout), done
    assert done.returncode == 0, done.stdout


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


def test_only_the_polkit_oneshots_run_as_root() -> None:
    for path in UNITS.glob("*.service"):
        drop_ins = "".join(part.read_text() for part in (UNITS / "system").glob(f"{path.name}.d/*.conf"))
        own_user = "User=circleosd-" in drop_ins or "DynamicUser=yes" in drop_ins
        assert own_user or "Type=oneshot" in path.read_text(), path.name


def test_nothing_runs_as_root_but_the_generator_of_the_polkit_rule(installed: Path) -> None:
    names = {path.name.removeprefix("circleosd-").removesuffix(".service") for path in installed.glob("*.service")}
    assert names == set(THRESHOLDS)
    other = re.compile(r"^(User=circleosd-\w+|DynamicUser=yes)$", re.MULTILINE)
    assert [name for name in sorted(names) if not other.search(whole(installed, name).read_text())] == ["polkit"]
