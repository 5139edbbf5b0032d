"""Sockets and services: each is a task while it is active, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

from circleosd.embedded.process import Process
from circleosd.embedded.sockets import bound, readable
from circleosd.embedded.unitfile import UnitFile
from circleosd.errors import BadRequest, CircleError, Unavailable
from circleosd.refusal import refuse
from circleosd.registry.units import LogLine, UnitState
from circleosd.steering import plain

LOG_LINES = 200  # lines of each unit
LONGEST_DELAY = 30.0  # seconds between starts of a service that fails
PAUSE = 0.2  # seconds until a failed service is started for the connection that is still waiting
LATE = 1.0  # seconds past its deadline at which a service is not failed at once: we were stopped ourselves
LEFTOVERS = 1.0  # seconds that the output of a service may stay open after its end
CLEAN = ("0", "SIGHUP", "SIGINT", "SIGTERM", "SIGPIPE")  # ends that are not a failure, systemd.service(5)
FRESH: dict[str, Any] = {"result": "success", "exit_status": None, "signal": None}  # of a state: nothing has ended yet


class Owner(Protocol):
    """What a unit needs of its supervisor."""

    specifiers: Mapping[str, str]
    stopping: bool  # nothing starts any more

    def file(self, name: str) -> UnitFile: ...

    def unit(self, name: str) -> Unit: ...

    def socket_of(self, service: str) -> Socket | None: ...

    def tell(self, name: str, event: UnitState | LogLine) -> None: ...


def _answer(started: asyncio.Future[str], result: str) -> None:
    if not started.done():
        started.set_result(result)


class Unit:
    """A unit of any type. It is active while its task runs; cancelling the task stops it."""

    def __init__(self, name: str, supervisor: Owner) -> None:
        self._supervisor, self._file = supervisor, supervisor.file(name)
        self.state = UnitState(name, self._file.get("Unit", "Description"), "loaded", "inactive", "dead", time.time())
        self.lines: deque[LogLine] = deque(maxlen=LOG_LINES)
        self._task: asyncio.Task[None] | None = None
        self._started: asyncio.Future[str]

    async def start(self) -> str:
        """Start it unless it is active; return the job's result."""
        if self._task and self._task.cancelling():
            await self.ended()
        if self._supervisor.stopping:
            return "canceled"
        if not self._task or self._task.done():
            self._started = started = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._main())
            # It may have been started again before this is called.
            self._task.add_done_callback(lambda task: _answer(started, "canceled" if task.cancelled() else "failed"))
        return await asyncio.shield(self._started)

    async def stop(self) -> None:
        """Stop it."""
        if self._task and not self._task.cancelling():
            self._task.cancel()
        await self.ended()

    def requires(self, name: str) -> bool:
        """Whether it requires another unit (Requires=, systemd.unit(5))."""
        return name in self._file.words("Unit", "Requires")

    def collect(self) -> None:
        """Forget that it failed, if its CollectMode= says so: nothing needs it any more (systemd.unit(5))."""
        modes = ("inactive", "inactive-or-failed")
        if self.state.active == "failed" and self._file.get("Unit", "CollectMode", modes[0], of=modes) == modes[1]:
            self._enter("inactive", "dead", **FRESH)

    async def ended(self) -> None:
        """Wait until it has stopped."""
        if self._task:
            await asyncio.wait([self._task])

    def _enter(self, active: str, sub: str, **more: Any) -> None:
        self.state = self.state._replace(active=active, sub=sub, since=time.time(), **more)
        self._supervisor.tell(self.state.unit, self.state)
        if active == "active":
            _answer(self._started, "done")

    def _say(self, text: str) -> None:
        self.lines.append(LogLine(time.time(), plain(text)))
        self._supervisor.tell(self.state.unit, self.lines[-1])
        with contextlib.suppress(OSError):  # nobody reads it any more
            print(f"{self.state.unit.removesuffix('.service')}: {self.lines[-1].text}", file=sys.stderr, flush=True)

    async def _main(self) -> None:
        self.state = self.state._replace(restarts=0, **FRESH)
        try:
            self._file = self._supervisor.file(self.state.unit)
            self.state = self.state._replace(description=self._file.get("Unit", "Description"))
            await self._work()
        except (CircleError, OSError, ValueError, OverflowError, subprocess.SubprocessError) as exc:
            self.state = self.state._replace(result="resources")
            self._say(f"cannot run {self.state.unit}: {exc}")
        finally:
            failed = self.state.result != "success" and self.state.sub != "auto-restart"
            self._enter("failed" if failed else "inactive", "failed" if failed else "dead")

    async def _work(self) -> None:
        """What a unit of its type does while it is active."""
        raise BadRequest("the embedded mode runs only sockets and services")


class Socket(Unit):
    """Listens, and runs the service of the same name while there are connections for it to accept."""

    listener: socket.socket | None = None

    async def _work(self) -> None:
        service = self._supervisor.unit(self.state.unit.removesuffix("socket") + "service")
        path, mode = self._file.get("Socket", "ListenStream"), self._file.get("Socket", "SocketMode", "0666")
        if not path.startswith("/"):
            raise BadRequest(f"the embedded mode supports only absolute paths in ListenStream=, not {path}")
        with bound(path, socket.SOCK_STREAM, int(mode, 8)) as self.listener:
            self.listener.listen(4096)  # net.core.somaxconn, systemd's default
            self._enter("active", "listening")
            while True:
                await readable(self.listener.fileno())
                await service.start()
                await service.ended()
                if service.state.result == "resources" and self.state.unit.startswith("circleosd-"):
                    # As the service itself would reply, had it been started; but a worker does not use lines.
                    why = None if "@" in self.state.unit else Unavailable(service.lines[-1].text)
                    with contextlib.suppress(RuntimeError, OSError):  # perhaps there can be no more threads either
                        await asyncio.to_thread(refuse, self.listener, why, seconds=PAUSE)
                        continue
                await asyncio.sleep(0 if service.state.result == "success" else PAUSE)


class Service(Unit):
    """Runs a process, again and again as Restart= says, with a longer delay after each failure."""

    _watchdog: float  # seconds until the process has to notify again; it is ended at the deadline
    _deadline: asyncio.Timeout

    async def _work(self) -> None:
        policy, failures = self._file.get("Service", "Restart", "no", of=("no", "always", "on-failure")), 0
        first = self._file.seconds("Service", "RestartSec", "100ms")
        final = self._file.ends("RestartPreventExitStatus")
        for restarts in itertools.count():
            self._enter("activating", "start", restarts=restarts, **FRESH)
            failures = 0 if await self._run() else failures + 1
            if policy == "no" or (policy == "on-failure" and self.state.result == "success"):
                return
            if (self.state.signal or str(self.state.exit_status)) in final:
                return
            delay = min(first * 2 ** min(failures, 16), max(LONGEST_DELAY, first))
            self._enter("activating", "auto-restart")
            _answer(self._started, "failed")
            how = self.state.signal or f"exit status {self.state.exit_status}"
            self._say(f"ended ({self.state.result}, {how}); restart in {delay:g} s")
            await asyncio.sleep(delay)

    async def _run(self) -> bool:
        """Run the process until it ends, a deadline passes or the task is cancelled. Return whether it succeeded."""
        file, result = self._file, "success"
        limits = {"TimeoutStartSec": "90", "TimeoutStopSec": "10", "WatchdogSec": "infinity"}
        start, stop, self._watchdog = (file.seconds("Service", *limit) or math.inf for limit in limits.items())
        ending = signal.Signals[file.get("Service", "KillSignal", "SIGTERM", of=signal.Signals.__members__)]
        clean, tolerates = {*CLEAN, *file.ends("SuccessExitStatus")}, file.tolerates()
        notifies = file.get("Service", "Type", "simple", of=("simple", "exec", "notify")) == "notify"
        listening = self._supervisor.socket_of(self.state.unit)
        begun, listener = time.monotonic(), listening.listener if listening else None
        process = Process(file, self._supervisor.specifiers, self._watchdog, listener)
        reading = asyncio.create_task(self._read(process))
        self.state = self.state._replace(pid=process.pid)
        try:
            result = await self._in_time(process, start, notifies=notifies)
        except asyncio.CancelledError:
            self._enter("deactivating", "stop-sigterm")
            process.signal(ending)
            if not (await asyncio.wait([process.ended], timeout=stop))[0]:
                result = "timeout"
            raise
        finally:
            process.signal(signal.SIGKILL)  # the process, or its remaining children
            status, killed = await process.reap()
            if result == "success" and not tolerates and (killed or str(status)) not in clean:
                result = "signal" if killed else "exit-code"
            self.state = self.state._replace(pid=None, result=result, exit_status=status, signal=killed)
            try:
                await asyncio.wait([reading], timeout=LEFTOVERS)
            finally:
                reading.cancel()
        if (task := asyncio.current_task()) and task.cancelling():  # it was stopped as it ended
            raise asyncio.CancelledError
        return (notifies and self.state.sub == "running") or time.monotonic() - begun > LONGEST_DELAY

    async def _in_time(self, process: Process, start: float, *, notifies: bool) -> str:
        """Wait for the end of the process; return `success`, or the result if a deadline passes before."""
        while not process.ended.done():
            try:
                async with asyncio.timeout(start if self.state.sub == "start" else self._watchdog) as self._deadline:
                    if not notifies:
                        self.notified("READY=1")
                    await asyncio.shield(process.ended)
            except TimeoutError:
                # Late: messages sent while this process was stopped, for example by Ctrl-Z, are not read yet.
                if time.monotonic() - (self._deadline.when() or 0.0) < LATE:
                    return "timeout" if self.state.sub == "start" else "watchdog"
        return "success"

    async def _read(self, process: Process) -> None:
        async for line in process.lines():
            self._say(line)

    def notified(self, message: str) -> None:
        """Handle a message from the process, sent by sd_notify(3)."""
        said = message.splitlines()
        if "READY=1" in said and self.state.sub == "start":
            self._enter("active", "running")
        if self.state.sub == "running" and ("READY=1" in said or "WATCHDOG=1" in said):
            with contextlib.suppress(RuntimeError):  # the deadline has just passed
                self._deadline.reschedule(asyncio.get_running_loop().time() + self._watchdog)
