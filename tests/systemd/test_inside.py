"""Runs the tests in tests/systemd/inside on a booted systemd."""

from __future__ import annotations

import os
import shlex
import sys

import pytest

from tests.systemd.conftest import PROJECT_INSIDE
from tests.systemd.machine import Machine


@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", ["dbus_units", "journal", "polkit_rights", "upheavals"])
def test_inside_a_booted_systemd(booted: Machine, part: str) -> None:
    python = shlex.quote(sys.executable)
    if booted.execute(f"{python} -c 'import pytest, dbus_fast, systemd.journal'")[0] != 0:
        pytest.skip(f"the booted system cannot use {sys.executable}")
    variables = {"CIRCLEOSD_DISPOSABLE_MACHINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    settings = " ".join(f"{name}={value}" for name, value in variables.items())
    path = os.path.join("tests", "systemd", "inside", f"test_{part}.py")
    print(booted.succeed(f"cd {PROJECT_INSIDE} && {settings} {python} -m pytest -q -p no:cacheprovider {path} 2>&1"))
