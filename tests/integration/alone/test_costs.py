"""What a call and a command cost, in terms of a floor in the same run."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from bench import invoke
from tests.integration.conftest import NewHost
from tests.integration.embedded_host import BIN, EmbeddedHost


def test_a_warm_call_takes_a_few_round_trips_of_a_bare_server(new_host: NewHost) -> None:
    """Held to the bounds in bench/invoke.py."""
    with invoke.loaded(new_host({})) as plugin:
        for goal in invoke.GOALS:
            found = []
            for _ in range(20):  # what a busy machine adds is not in every one
                found.append(invoke.measure(plugin, goal.size, 0.2).ratio(goal))
                if found[-1] <= goal.times:
                    break
            assert found[-1] <= goal.times, f"{goal.size} bytes: {found}"


def test_a_listing_costs_a_few_starts_of_python(host: EmbeddedHost) -> None:
    host.ok("service", "list")

    def once(*command: str | Path) -> float:
        begun = time.perf_counter()
        subprocess.run(command, env=host.environment, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - begun

    # In turn, and the fastest of each: what a busy machine adds is in neither, if they are tried often enough.
    pairs: list[tuple[float, float]] = []
    ratio = float("inf")
    while len(pairs) < 15 or (ratio > 5 and len(pairs) < 150):
        pairs.append((once(BIN / "circlectl", "service", "list"), once(BIN / "python3", "-c", "pass")))
        ratio = min(pair[0] for pair in pairs) / min(pair[1] for pair in pairs)
    assert ratio <= 5, f"circlectl service list takes {ratio:.1f} starts of Python"
