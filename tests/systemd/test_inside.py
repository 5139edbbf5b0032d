"""Runs the tests in tests/systemd/inside on a booted systemd."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from tests import PROJECT
from tests.systemd.conftest import PROJECT_INSIDE, give_up
from tests.systemd.machine import Machine


@pytest.mark.parametrize("part", ["dbus_units", "journal", "polkit_rights", "upheavals"])
def test_inside_a_booted_systemd(booted: Machine, part: str) -> None:
    executable = Path(sys.executable)
    if executable.is_relative_to(PROJECT):  # the virtual environment that `make setup` makes; /tmp, say, is not shared
        executable = PROJECT_INSIDE / executable.relative_to(PROJECT)
    python = shlex.quote(str(executable))
    if booted.execute(f"{python} -c 'import pytest, dbus_fast, systemd.journal'")[0] != 0:
        give_up(f"the booted system cannot use {executable}")
    variables = {"CIRCLEOSD_DISPOSABLE_MACHINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    settings = " ".join(f"{name}={value}" for name, value in variables.items())
    path = f"tests/systemd/inside/test_{part}.py"
    print(booted.succeed(f"cd {PROJECT_INSIDE} && {settings} {python} -m pytest -q -p no:cacheprovider {path} 2>&1"))
