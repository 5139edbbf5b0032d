"""What the manager tells of a worker's end, by what the registry knows of its unit."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from circleosd import upstream
from circleosd.errors import Unavailable
from circleosd.plugins.workerunits import WorkerUnits


@pytest.mark.parametrize(
    ("result", "signal", "status", "how"),
    [
        ("success", None, None, ""),
        ("success", None, 0, " with exit status 0"),
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
    assert str(asyncio.run(WorkerUnits("registry.sock", 10).how_it_ended("greedy"))) == how


@pytest.mark.parametrize(
    ("socket", "service", "told"),
    [
        ("trigger-limit-hit", "exit-code", "was started too often in a short time, so systemd refuses to start it"),
        ("success", "resources", "cannot be started; see: circlectl service logs plugin@greedy"),
        ("success", "exit-code", None),
        (None, None, None),
    ],
)
def test_a_worker_that_was_not_started_is_told_from_one_that_failed(
    monkeypatch: pytest.MonkeyPatch, socket: str | None, service: str | None, told: str | None
) -> None:
    results = {"plugin@greedy.socket": socket, "plugin@greedy": service}

    async def ask(path: str, request: dict[str, Any], *, timeout: float) -> dict[str, Any]:
        assert request["action"] == "status"
        if (result := results[request["name"]]) is None:
            raise Unavailable("the registry does not answer")
        return {"result": result}

    monkeypatch.setattr(upstream, "ask", ask)
    found = asyncio.run(WorkerUnits("registry.sock", 10).held_back("greedy"))
    assert (told is None) == (found is None)
    assert (told or "") in str(found)
