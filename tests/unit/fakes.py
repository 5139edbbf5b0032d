"""What stands in for collaborators in the unit tests: a clock, a service manager, a caller's identity, a worker."""

from __future__ import annotations

import asyncio
import fnmatch
import selectors
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

from circleosd.config import PluginSettings
from circleosd.database import Database, Transaction
from circleosd.deadlines import Deadlines
from circleosd.errors import Denied, NotFound
from circleosd.plugins.cause import Cause
from circleosd.plugins.compiled import Compiled
from circleosd.plugins.manifest import Limits, Manifest
from circleosd.plugins.plugin import Plugin
from circleosd.plugins.runner import Runners
from circleosd.plugins.store import Record
from circleosd.plugins.voice import Voice
from circleosd.plugins.workers import Worker
from circleosd.policy import Caller, Grant, Peer, Role
from circleosd.registry.units import LogLine, Switch, UnitState, Verb

ROOT = Peer(uid=0, gid=0, pid=1)
STRANGER = Peer(uid=4242, gid=4242, pid=1)


USERS = {
    "operator": Caller(STRANGER, Role.OPERATOR, "olga", "s1"),
    "nginx only": Caller(STRANGER, None, "alice", "s2", (Grant("service:restart", "nginx"),)),
    "all but nginx": Caller(STRANGER, Role.OPERATOR, "otto", "s3", (Grant("service:*", "nginx", deny=True),)),
    "root": Caller(ROOT, Role.ADMIN, "olga", "s4", privileged=True),
}


class _AtOnce(selectors.SelectSelector):
    """Does not wait, and adds up for how long it would have."""

    waited = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.waited += timeout or 0.0
        return super().select(0)


class TimelessLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock goes on by what its tasks sleep, which takes no time."""

    def __init__(self) -> None:
        self._at_once = _AtOnce()
        super().__init__(self._at_once)

    def time(self) -> float:
        return self._at_once.waited


async def identify(peer: Peer, token: str | None) -> Caller:
    """Root is admin, the tokens of `USERS` are theirs, everybody else is a stranger; any other token is refused.

    Root is also this service's own uid.
    """
    if token in USERS:
        return USERS[token]._replace(peer=peer)
    if token is not None:
        raise Denied("the session is unknown")
    return Caller(peer, Role.ADMIN if peer.uid == 0 else None, privileged=peer.uid == 0, vouches=peer.uid == 0)


class NoFiles:
    """No descriptors came with the request."""

    def take(self) -> int:
        raise AssertionError("no handler under test takes a descriptor")


class Ending(Deadlines):
    """Deadlines that pass when the test says so."""

    def __init__(self) -> None:
        super().__init__(1e9)

    def pass_now(self) -> None:
        """Cancel what has not ended by now."""
        self._running = {task: (0.0, done) for task, (_, done) in self._running.items()}
        self._look()


class Units:
    """A service manager whose units are a dictionary of states."""

    systemctl = "systemctl"

    def __init__(self, **states: str) -> None:
        self.active = {f"{name}.service": state for name, state in states.items()}
        self.jobs: list[tuple[str, str]] = []
        self.boot: dict[str, str] = {}
        self.result = "done"
        self.awaited = False

    async def states(self, units: Sequence[str]) -> list[UnitState]:
        return [
            UnitState(
                unit,
                f"the unit {unit}",
                "loaded" if unit in self.active else "not-found",
                self.active.get(unit, "inactive"),
                "dead",
                result="exit-code" if self.result != "done" else "success",
                exit_status=3 if self.result != "done" else 0,
                triggered_by=(unit.replace(".service", ".socket"),) if self.awaited else (),
                listening=self.awaited,
            )
            for unit in units
        ]

    async def detail(self, unit: str) -> UnitState:
        (state,) = await self.states([unit])
        return state

    async def listening(self, unit: str) -> list[str]:
        state = await self.detail(unit)
        return [*state.triggered_by] if state.listening else []

    async def stale(self, unit: str) -> bool:
        return False

    async def matching(self, pattern: str) -> list[str]:
        return fnmatch.filter(self.active, pattern)

    async def job(self, verb: Verb, unit: str) -> str:
        if unit not in self.active:
            raise NotFound(f"no unit {unit}")
        self.jobs.append((verb, unit))
        if self.result == "done":
            self.active[unit] = "inactive" if verb == "stop" else "active"
        return self.result

    async def switch(self, verb: Switch, unit: str) -> str:
        self.jobs.append((verb, unit))
        self.boot[unit] = f"{verb}d"
        return self.boot[unit]

    async def enabled(self, unit: str) -> str:
        return self.boot.get(unit, "disabled")

    async def watch(self, units: Sequence[str], pattern: str = "") -> AsyncGenerator[UnitState, None]:
        for state in await self.states([*units, *await self.matching(pattern)]):
            yield state

    async def logs(self, unit: str, lines: int, since: float | None = None) -> list[LogLine]:
        return [LogLine(1.0, "one"), LogLine(2.0, "two")][-lines:]

    async def follow(self, unit: str, lines: int, since: float | None = None) -> AsyncGenerator[LogLine, None]:
        for line in await self.logs(unit, lines, since):
            yield line

    async def log_tail(self, unit: str, lines: int) -> list[str]:
        return ["cannot bind port 80"]


class LateNews(Database):
    """A database whose writer hears of a commit only some time after it, and after `meanwhile` if there is one."""

    meanwhile: Callable[[], None] | None = None

    async def write(self, work: Callable[[Transaction], Any]) -> Any:
        result = await super().write(work)
        if meanwhile := self.meanwhile:
            self.meanwhile = None
            meanwhile()
            await asyncio.sleep(0.2)
        return result


class SlowWorker(Worker):
    """A worker of a plugin, without a process, which takes `seconds` to answer; `ended` and `closed` are moments."""

    ended = 0.0

    def __init__(self, seconds: float) -> None:
        super().__init__("p", self._no_host_call, 1, Voice("p"))
        self._seconds = seconds
        self.closed: asyncio.Future[float] = self._loop.create_future()

    async def _no_host_call(self, call: str, args: dict[str, str], cause: Cause) -> bytes:
        raise AssertionError("it asks nothing")

    async def call(self, kind: int, name: str, payload: bytes, timeout: float, cause: Cause) -> bytes:
        await asyncio.sleep(self._seconds)
        self.ended = time.monotonic()
        return payload

    def close(self) -> None:
        self.closed.set_result(time.monotonic())


def with_worker(
    directory: Path,
    worker: SlowWorker | None,
    settings: PluginSettings | None = None,
    open_artifact: Callable[[str], int] | None = None,
    **limits: Any,
) -> tuple[Runners, Plugin]:
    """Runners that have this worker and start no other, and its plugin, `p`, which asks for these limits."""

    def unused(*args: Any) -> Any:
        raise AssertionError("no worker is started")

    settings = settings or PluginSettings()
    plugin = Plugin(Manifest("p", limits=Limits(**limits)), "", Record(), {}, settings)
    runners = Runners("", directory, Compiled(directory, 0), open_artifact or unused, unused, unused, settings)
    runners._of(plugin).worker = worker
    return runners, plugin
