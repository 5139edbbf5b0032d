"""What `make setup` asks for where something is missing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests import PROJECT

APT = """\
#!/bin/sh
[ "$1" = update ] || { echo "apt-get $*"; exit 1; }
"""


def refused(programs: Path, python: str) -> str:
    """What the set-up says where there is nothing but these programs, with an apt-get that installs nothing."""
    for name in ("bash", "dirname"):
        (programs / name).symlink_to(str(shutil.which(name)))
    (programs / "apt-get").write_text(APT)
    (programs / "apt-get").chmod(0o755)
    command = [str(programs / "bash"), str(PROJECT / "scripts/setup"), python]
    done = subprocess.run(
        command, env={"PATH": str(programs)}, capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    return done.stderr


def test_a_host_without_python_needs_that_and_all_else_at_once(tmp_path: Path) -> None:
    needed = "python3 python3-venv python3-dev gcc pkg-config libsystemd-dev"
    assert needed in refused(tmp_path, "python3")


@pytest.mark.parametrize("python", ["python3", "/nonexistent/python3"])
def test_a_python_that_is_too_old_or_not_where_it_was_said_to_be_is_told_before_anything_is_installed(
    tmp_path: Path, python: str
) -> None:
    (tmp_path / "python3").symlink_to(str(shutil.which("false")))
    assert refused(tmp_path, python) == "circleosd setup: Python 3.11 or newer is required, as in Debian 12 and later\n"
