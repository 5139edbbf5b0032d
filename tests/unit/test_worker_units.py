"""What the manager tells of a worker's end, by what the registry knows of its unit."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from circleosd import upstream
from circleosd.plugins.workerunits import WorkerUnits


@pytest.mark.parametrize(
    ("result", "signal", "status", "how"),
    [
        ("success", None, 0, ""),
        ("exit-code", None, 3, " with exit status 3"),
        ("signal", "SIGSEGV", None, " by SIGSEGV"),
        ("signal", "SIGKILL", None, " by SIGKILL"),
        ("oom-kill", "SIGKILL", None, " by SIGKILL, out of memory (oom-kill)"),
    ],
)
def test_how_a_worker_ended_is_told_as_systemd_knows_it(
    monkeypatch: pytest.MonkeyPatch, result: str, signal: str | None, status: int | None, how: str
) -> None:
    states = iter(("active", "deactivating", "failed"))

    async def ask(path: str, request: dict[str, Any], *, timeout: float) -> dict[str, Any]:
        assert (path, request) == ("registry.sock", {"action": "status", "name": "plugin@greedy"})
        if (state := next(states)) != "failed":
            return {"state": state, "result": result, "signal": None, "exit_status": None}
        return {"state": state, "result": result, "signal": signal, "exit_status": status}

    monkeypatch.setattr(upstream, "ask", ask)
    assert asyncio.run(WorkerUnits("registry.sock", 10).how_it_ended("greedy")) == how
