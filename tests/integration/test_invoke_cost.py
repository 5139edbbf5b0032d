"""What a warm call costs, held to the bounds in bench/invoke.py: times a bare server's round trip in the same run."""

from __future__ import annotations

import pytest

from bench import invoke
from tests.integration.conftest import NewHost


@pytest.mark.alone
def test_a_warm_call_takes_a_few_round_trips_of_a_bare_server(new_host: NewHost) -> None:
    with invoke.loaded(new_host({})) as plugin:
        for goal in invoke.GOALS:
            found = []
            for _ in range(4):  # what a busy machine adds is not in every one
                found.append(invoke.measure(plugin, goal.size, 0.2).ratio(goal))
                if found[-1] <= goal.times:
                    break
            assert found[-1] <= goal.times, f"{goal.size} bytes: {found}"
