"""A socket and a service as the supervisor runs them: their files, their states, what happens to their processes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from circleosd.embedded import process, unitfile
from circleosd.embedded.unitfile import UnitFile
from circleosd.errors import UnitFailed
from circleosd.registry.units import LogLine, UnitState, signal_name

log = logging.getLogger(__name__)

TYPES = ("simple", "exec", "notify")
LOG_LINES = 200  # kept of each service's output
LONGEST_DELAY = 30.0  # seconds between restarts of a service that does not become ready
DIRECTORIES = {"StateDirectory": "S", "CacheDirectory": "C", "RuntimeDirectory": "t", "ConfigurationDirectory": "E"}


class Socket:
    """A listening Unix socket. `wanted` is called when a connection waits and `watch` was called after the last one."""

    def __init__(self, name: str, file: UnitFile, path: Path) -> None:
        self.name = name
        self.file = file
        self.path = path
        self.since = time.time()
        self.listener: socket.socket | None = None

    def state(self) -> UnitState:
        """The state as the registry shows it."""
        active, sub = ("active", "listening") if self.listener else ("inactive", "dead")
        return UnitState(self.name, self.file.get("Unit", "Description"), "loaded", active, sub, self.since)

    def listen(self, wanted: Callable[[], None]) -> None:
        """Bind and watch. Raises `UnitFailed`."""
        self._wanted = wanted
        mode = int(self.file.get("Socket", "SocketMode", "0666"), 8)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        before = os.umask(0o777 & ~mode)
        try:
            listener.bind(str(self.path))
            listener.listen(int(self.file.get("Socket", "Backlog", "4096")))
        except OSError as exc:
            listener.close()
            raise UnitFailed(f"cannot listen at {self.path}: {exc.strerror or exc}") from exc
        finally:
            os.umask(before)
        self.listener, self.since = listener, time.time()
        self.watch()

    def watch(self) -> None:
        """The service does not run: look out for a connection."""
        if self.listener:
            asyncio.get_running_loop().add_reader(self.listener, self._trigger)

    def ignore(self) -> None:
        """The service runs and accepts by itself."""
        if self.listener:
            asyncio.get_running_loop().remove_reader(self.listener)

    def _trigger(self) -> None:
        self.ignore()
        self._wanted()

    def close(self) -> None:
        """Stop listening and remove the socket's name."""
        self.ignore()
        if self.listener:
            self.listener.close()
            self.path.unlink(missing_ok=True)
            self.listener, self.since = None, time.time()


class Service:
    """A process: started, watched, ended, started again. `tell` hears of each new state and line of output."""

    def __init__(
        self, name: str, file: UnitFile, specifiers: Mapping[str, str], tell: Callable[[UnitState | LogLine], None]
    ) -> None:
        self.name = name
        self.file = file
        self.specifiers = specifiers
        self._tell = tell
        self.active, self.sub, self.since = "inactive", "dead", time.time()
        self.pid: int | None = None
        self.result, self.restarts = "success", 0
        self.exit_status: int | None = 0
        self.signal: str | None = None
        self.lines: deque[LogLine] = deque(maxlen=LOG_LINES)
        self.ready, self.gone = asyncio.Event(), asyncio.Event()
        self.gone.set()
        self._failures = 0  # in a row, before the service became ready
        self._stopping = False
        self._watchdog: asyncio.TimerHandle | None = None

    def enter(self, active: str, sub: str) -> None:
        """Change state."""
        self.active, self.sub, self.since = active, sub, time.time()
        self._tell(self.state())

    def state(self) -> UnitState:
        """The state as the registry shows it."""
        description = self.file.get("Unit", "Description").replace("%i", self.specifiers["i"])
        return UnitState(
            self.name, description, "loaded", self.active, self.sub, self.since, self.pid,
            _resident(self.pid) if self.pid else None, self.restarts, self.result, self.exit_status,
            self.signal,
        )  # fmt: skip

    async def start(self, environment: Mapping[str, str], listener: socket.socket | None) -> str:
        """Start the process and wait until it is ready; return the job's result. Raises `UnitFailed`."""
        kind = self.file.get("Service", "Type", "simple")
        if kind not in TYPES or len(self.file.all("Service", "ExecStart")) != 1:
            raise UnitFailed(f"the embedded mode runs Type={'|'.join(TYPES)} with one ExecStart=, unlike {self.name}")
        self.enter("activating", "start")
        try:
            self._launch(self._environment(environment), listener)
        except OSError as exc:
            self.result, self.exit_status = "exit-code", process.EXIT_EXEC
            self.enter("failed", "failed")
            raise UnitFailed(f"cannot start {self.name}: {exc}") from exc
        if kind != "notify":
            self.ready.set()
        limit = self.file.seconds("Service", "TimeoutStartSec", 90)
        await first_of(self.ready.wait(), self.gone.wait(), timeout=limit)
        if not self.ready.is_set() and not self.gone.is_set():
            await self._end(signal.SIGKILL, "timeout")
        if self.gone.is_set():
            return "done" if self.ready.is_set() and self.result == "success" else "failed"
        self.enter("active", "running")
        return "done"

    async def stop(self) -> None:
        """Ask the process to end, make it end if it does not, and wait until it has."""
        self._stopping = True
        if self.pid:
            self.enter("deactivating", "stop-sigterm")
            self.kill(self._kill_signal)
            await first_of(self.gone.wait(), timeout=self.file.seconds("Service", "TimeoutStopSec", 90))
            if not self.gone.is_set():
                await self._end(signal.SIGKILL, "timeout")
        self.enter("inactive", "dead")

    @property
    def _kill_signal(self) -> signal.Signals:
        return signal.Signals[self.file.get("Service", "KillSignal", "SIGTERM")]

    def restart_delay(self) -> float | None:
        """Seconds until Restart= has an ended process start again, longer after each failed start; None: it has not."""
        policy, failed = self.file.get("Service", "Restart", "no"), self.result != "success"
        if self._stopping or not (policy == "always" or (policy == "on-failure" and failed)):
            return None
        first = self.file.seconds("Service", "RestartSec", 0.1)
        return float(min(first * 2 ** min(self._failures, 16), max(LONGEST_DELAY, first)))

    def notified(self, message: str) -> None:
        """What the process said by sd_notify(3)."""
        for line in message.splitlines():
            if line == "READY=1":
                self.ready.set()
            elif line == "WATCHDOG=1":
                self._pet()

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to the process and its group."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    async def _end(self, number: signal.Signals, result: str) -> None:
        self.result = result
        self.kill(number)
        await self.gone.wait()

    def _environment(self, given: Mapping[str, str]) -> dict[str, str]:
        environment = {**given, "INVOCATION_ID": uuid.uuid4().hex}
        for assignment in self.file.words("Service", "Environment"):
            key, _, value = unitfile.expand(assignment, self.specifiers).partition("=")
            environment[key] = value
        for key, specifier in DIRECTORIES.items():
            names = [unitfile.expand(name, self.specifiers) for name in self.file.words("Service", key)]
            paths = [Path(self.specifiers[specifier]) / name for name in names]
            for path in paths:
                path.mkdir(mode=int(self.file.get("Service", f"{key}Mode", "0755"), 8), parents=True, exist_ok=True)
            if paths:
                environment[f"{key.removesuffix('Directory').upper()}_DIRECTORY"] = ":".join(map(str, paths))
        if seconds := self.file.seconds("Service", "WatchdogSec", 0):
            environment["WATCHDOG_USEC"] = str(int(seconds * 1e6))
        return environment

    def _launch(self, environment: dict[str, str], listener: socket.socket | None) -> None:
        words = unitfile.command(self.file.get("Service", "ExecStart"), environment)
        argv = [unitfile.expand(word, self.specifiers) for word in words]
        # Our own programs are beside the interpreter, wherever that is.
        program = shutil.which(argv[0], path=f"{Path(sys.executable).parent}:{environment.get('PATH', os.defpath)}")
        if program is None:
            raise FileNotFoundError(f"no program {argv[0]}")
        directory = unitfile.expand(self.file.get("Service", "WorkingDirectory", "/"), self.specifiers).lstrip("-")
        sockets = [listener.fileno()] if listener else []
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            self.pid, pidfd = process.spawn(
                [program, *argv[1:]], environment, sockets=sockets, output=writing, directory=directory
            )
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        self.result, self.exit_status, self.signal, self._stopping = "success", 0, None, False
        self.ready.clear()
        self.gone.clear()
        os.set_blocking(reading, False)
        loop = asyncio.get_running_loop()
        loop.add_reader(reading, self._read_output, reading)
        loop.add_reader(pidfd, self._ended, pidfd)
        self._pet()

    def _read_output(self, fd: int) -> None:
        data = os.read(fd, 65536)
        if not data:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)
        for line in data.decode("utf-8", "replace").splitlines():
            self.lines.append(LogLine(time.time(), line))
            self._tell(self.lines[-1])
            print(f"{self.name.removesuffix('.service')}: {line}", file=sys.stderr, flush=True)

    def _pet(self) -> None:
        """Start the watchdog's clock anew."""
        if self._watchdog:
            self._watchdog.cancel()
        if seconds := self.file.seconds("Service", "WatchdogSec", 0):
            self._watchdog = asyncio.get_running_loop().call_later(seconds, self._bark)

    def _bark(self) -> None:
        log.error("%s gave no sign of life in time", self.name)
        self.result = "watchdog"
        self.kill(signal.SIGKILL)  # and not SIGABRT, which a stopped process would not notice

    def _ended(self, pidfd: int) -> None:
        assert self.pid is not None
        _, status = os.waitpid(self.pid, 0)  # it has ended, so this does not wait
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        self.kill(signal.SIGKILL)  # what it left behind in its group
        if self._watchdog:
            self._watchdog.cancel()
        code = os.waitstatus_to_exitcode(status)
        self.exit_status, self.signal = (code, None) if code >= 0 else (None, signal_name(-code))
        if self.result == "success" and not (self._stopping and code == -self._kill_signal):
            self.result = "signal" if code < 0 else "exit-code" if code else "success"
        self._failures = 0 if self.ready.is_set() else self._failures + 1
        self.pid = None
        self.gone.set()


async def first_of(*waits: object, timeout: float) -> None:
    """Wait until one of the awaitables is done, at most `timeout` seconds (inf: for ever)."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]  # type: ignore[call-overload]  # any awaitable
    await asyncio.wait(tasks, timeout=None if timeout == float("inf") else timeout, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _resident(pid: int) -> int | None:
    """Resident bytes of a process, proc_pid_statm(5); None when it has just ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
