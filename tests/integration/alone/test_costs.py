"""What a call and a command cost, in terms of a floor in the same run."""

from __future__ import annotations

import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from bench import invoke
from tests.integration.embedded_host import BIN, EmbeddedHost
from tests.measuring import once_it_holds


@pytest.mark.parametrize("goal", [pytest.param(goal, id=f"{goal.size} bytes") for goal in invoke.GOALS])
def test_a_warm_call_takes_a_few_round_trips_of_a_bare_server(host: EmbeddedHost, goal: invoke.Goal) -> None:
    """Held to the bounds in bench/invoke.py."""
    with invoke.loaded(host) as plugin:
        measure = partial(invoke.measure, plugin, goal.size, 0.2)
        once_it_holds(lambda: measure().ratio(goal), lambda ratio: ratio <= goal.times, tries=40)


def test_a_listing_costs_a_few_starts_of_python(host: EmbeddedHost) -> None:
    host.ok("service", "list")

    def run(*command: str | Path) -> float:
        begun = time.perf_counter()
        subprocess.run(command, env=host.environment, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - begun

    def listing_and_starts() -> tuple[float, float]:
        """Both take about as long, and so are interrupted about as often."""
        return run(BIN / "circlectl", "service", "list"), sum(run(BIN / "python3", "-c", "pass") for _ in range(5))

    once_it_holds(listing_and_starts, lambda seconds: seconds[0] <= seconds[1])
