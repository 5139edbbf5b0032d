"""The supervisor: each active socket or service is a task, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import itertools
import math
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from circleosd.embedded.process import Process
from circleosd.embedded.sockets import bound, readable
from circleosd.embedded.unitfile import UnitFile
from circleosd.errors import BadRequest, CircleError, Conflict, NotFound, Unavailable, UnitFailed
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

_ucred = struct.Struct("3i")  # pid, uid, gid; unix(7)


def _answer(started: asyncio.Future[str], result: str) -> None:
    if not started.done():
        started.set_result(result)


def _memory(pid: int) -> int | None:
    """The resident memory of a process; None where /proc hides workers, even from their own uid (hidepid=, proc(5))."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:  # EPERM with hidepid=1, ENOENT with hidepid=2
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


class Unit:
    """A unit of any type. It is active while its task runs; cancelling the task stops it."""

    def __init__(self, name: str, supervisor: Supervisor) -> None:
        self._supervisor, self._file = supervisor, supervisor.file(name)
        self.state = UnitState(name, self._file.get("Unit", "Description"), "loaded", "inactive", "dead", time.time())
        self.lines: deque[LogLine] = deque(maxlen=LOG_LINES)
        self._task: asyncio.Task[None] | None = None
        self._started: asyncio.Future[str]

    async def start(self) -> str:
        """Start it unless it is active; return the job's result."""
        if self._task and self._task.cancelling():
            await self.ended()
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
        self.state = replace(self.state, active=active, sub=sub, since=time.time(), **more)
        self._supervisor.tell(self.state.unit, self.state)
        if active == "active":
            _answer(self._started, "done")

    def _say(self, text: str) -> None:
        self.lines.append(LogLine(time.time(), plain(text)))
        self._supervisor.tell(self.state.unit, self.lines[-1])
        with contextlib.suppress(OSError):  # nobody reads it any more
            print(f"{self.state.unit.removesuffix('.service')}: {self.lines[-1].text}", file=sys.stderr, flush=True)

    async def _main(self) -> None:
        self.state = replace(self.state, restarts=0, **FRESH)
        try:
            self._file = self._supervisor.file(self.state.unit)
            self.state = replace(self.state, description=self._file.get("Unit", "Description"))
            await self._work()
        except (CircleError, OSError, ValueError, OverflowError, subprocess.SubprocessError) as exc:
            self.state = replace(self.state, result="resources")
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
        self.state = replace(self.state, pid=process.pid)
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
            self.state = replace(self.state, pid=None)
            await asyncio.wait([reading], timeout=LEFTOVERS)
            reading.cancel()
            if result == "success" and not tolerates and (killed or str(status)) not in clean:
                result = "signal" if killed else "exit-code"
            self.state = replace(self.state, result=result, exit_status=status, signal=killed)
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


class Supervisor:
    """All units by name. `specifiers`: values of systemd.unit(5)'s specifiers; `places`: directories of files."""

    def __init__(self, specifiers: Mapping[str, str], places: Sequence[Path]) -> None:
        self.specifiers, self._places = specifiers, places
        self._units: dict[str, Unit] = {}
        self.listeners: list[Callable[[str, UnitState | LogLine], None]] = []

    def file(self, name: str) -> UnitFile:
        """The file of a unit, or of its template. Raises `NotFound`, `UnitFailed`."""
        stem, template = name.rpartition(".")[0], re.sub(r"@.*\.", "@.", name)
        prefix, _, instance = stem.partition("@")
        own = {"n": name, "N": stem, "p": prefix, "i": instance, "I": instance.replace("-", "/"), "%": "%"}
        for path in (place / found for place in self._places for found in (name, template)):
            if path.exists():
                try:
                    return UnitFile(path.read_text(encoding="utf-8"), {**self.specifiers, **own})
                except (OSError, ValueError, CircleError) as exc:
                    raise UnitFailed(f"cannot read {path}: {exc}") from exc
        raise NotFound(f"no unit {name}")

    def unit(self, name: str) -> Unit:
        """A unit. Raises `NotFound`, `UnitFailed`."""
        if name not in self._units:
            kind: type[Unit] = {"socket": Socket, "service": Service}.get(name.rpartition(".")[2], Unit)
            self._units[name] = kind(name, self)
        return self._units[name]

    def socket_of(self, service: str) -> Socket | None:
        """The socket that starts a service, if it is listening."""
        unit = self._units.get(service.removesuffix("service") + "socket")
        return unit if isinstance(unit, Socket) and unit.state.active == "active" else None

    async def job(self, verb: str, name: str) -> str:
        """Start, stop or restart a unit; return the job's result. Raises `NotFound`, `UnitFailed`, `Conflict`."""
        if verb not in ("start", "stop", "restart"):
            raise Conflict(f"the embedded mode cannot {verb} a unit")
        unit = self.unit(name)
        if verb != "start" or unit.state.sub == "auto-restart":
            await unit.stop()
            served = self._units.get(name.removesuffix("socket") + "service")
            if served and served.requires(name):  # it would wait for connections that nobody can make any more
                await served.stop()
        if verb == "stop" and not self.socket_of(name):
            unit.collect()
        return await unit.start() if verb != "stop" else "done"

    async def stop(self) -> None:
        """Stop everything: first the sockets, so that nothing starts again."""
        for kind in (".socket", ".service"):
            await asyncio.gather(*(unit.stop() for name, unit in self._units.items() if name.endswith(kind)))

    def notified(self, notify: socket.socket) -> None:
        """Pass a message on to the service whose main process sent it, as identified by the kernel."""
        data, ancillary, _, _ = notify.recvmsg(4096, socket.CMSG_SPACE(_ucred.size))
        senders = [_ucred.unpack(content)[0] for _, _, content in ancillary]
        for unit in self._units.values():
            if isinstance(unit, Service) and unit.state.pid in senders:
                unit.notified(data.decode("utf-8", "replace"))

    def tell(self, name: str, event: UnitState | LogLine) -> None:
        """Report an event of a unit to all listeners."""
        for listener in self.listeners:
            listener(name, event)

    def matching(self, pattern: str) -> list[str]:
        """The services that match a pattern (fnmatch(3)) and are active, have an active socket, or have failed."""
        up = {name for name, unit in self._units.items() if unit.state.active != "inactive"}
        up |= {name.removesuffix("socket") + "service" for name in up if name.endswith(".socket")}
        return sorted(fnmatch.filter(up, pattern))

    def lines(self, name: str) -> list[LogLine]:
        """The latest output of a unit."""
        return [*self._units[name].lines] if name in self._units else []

    def state(self, name: str) -> UnitState:
        """The state of a unit, even if its file cannot be read."""
        try:
            state = self.unit(name).state
        except CircleError as exc:
            return UnitState(name, str(exc), "not-found" if isinstance(exc, NotFound) else "error", "inactive", "dead")
        if state.pid:
            state = replace(state, memory=_memory(state.pid))
        listening = self.socket_of(name)
        return replace(state, triggered_by=(listening.state.unit,), listening=True) if listening else state
