"""Run a scenario written for the NixOS test driver: statements over `machine`, `start_all` and `subtest`.

By hand: ``python -m tests.systemd.scenario_runner nixos-test/scenario.py [TREE]``.
"""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.systemd.container import Container, why_not
from tests.systemd.machine import Machine


@contextmanager
def subtest(name: str) -> Iterator[None]:
    """Print what a part of the scenario is called, and at its end, how it went and for how long."""
    start = time.monotonic()
    outcome = "FAILED"
    try:
        yield
        outcome = "ok"
    finally:
        print(f"subtest: {name}: {outcome} ({time.monotonic() - start:.2f} s)", flush=True)


def run_scenario(path: Path, machine: Machine) -> None:
    """Run the statements in a file. Their exceptions come through, with the file's lines in the traceback."""
    code = compile(path.read_text(), str(path), "exec")
    exec(code, {"__name__": "scenario", "machine": machine, "start_all": machine.start, "subtest": subtest})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.systemd.scenario_runner")
    parser.add_argument("scenario", type=Path)
    parser.add_argument("tree", nargs="?", default="/", help="the root file system to boot (this machine's own)")
    options = parser.parse_args()
    if reason := why_not(options.tree):
        parser.error(reason)
    with Container(f"scenario-{os.getpid()}", options.tree) as container:
        run_scenario(options.scenario, Machine(container))


if __name__ == "__main__":
    main()
