"""The full-stack scenario, the very file that the NixOS VM test runs, on a booted systemd."""

from __future__ import annotations

from tests import PROJECT
from tests.systemd.machine import Machine
from tests.systemd.scenario_runner import run_scenario


def test_the_full_stack_scenario(installed: Machine) -> None:
    run_scenario(PROJECT / "nixos-test/scenario.py", installed)
