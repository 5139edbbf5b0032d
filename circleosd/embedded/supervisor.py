"""The supervisor: each socket or service that is up is a task, and the registry asks about them over a socket."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import fnmatch
import itertools
import logging
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
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from circleosd import wire
from circleosd.activation import FIRST
from circleosd.config import ServerSettings
from circleosd.embedded.unitfile import UnitFile
from circleosd.errors import BadRequest, CircleError, Conflict, Denied, Internal, NotFound, UnitFailed
from circleosd.paths import socket_path
from circleosd.policy import Peer, role_of_uid
from circleosd.registry.units import LogLine, UnitState, plain, signal_name
from circleosd.server import Server
from circleosd.systemd.notify import Notifier

log = logging.getLogger(__name__)

TARGET = "circleosd.target"
LOG_LINES = 200  # kept of each unit
LONGEST_LINE = 8192  # bytes; a longer one is cut
BURST, INTERVAL = 4 << 20, 30.0  # bytes of output that are taken in so many seconds; journald counts lines
LONGEST_DELAY = 30.0  # seconds between starts of a service that fails
PAUSE = 0.2  # seconds until a service that failed is started for the connection that still waits
LEFTOVERS = 1.0  # seconds that the output of a service may stay open after its end
CLEAN = ("0", "SIGHUP", "SIGINT", "SIGTERM", "SIGPIPE")  # ends that are no failure, systemd.service(5)
DIRECTORIES = {"StateDirectory": "S", "CacheDirectory": "C", "RuntimeDirectory": "t"}  # by the specifier of the parent
FRESH: dict[str, Any] = {"result": "success", "exit_status": None, "signal": None}  # of a state: nothing has ended yet
PR_SET_PDEATHSIG = 1  # prctl(2)

_libc = ctypes.CDLL(None)
_ucred = struct.Struct("3i")  # pid, uid, gid; unix(7)


async def readable(fd: int) -> None:
    """Wait until there is something to read, a connection waits, or a process has ended (pidfd_open(2))."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


@contextlib.contextmanager
def bound(name: str, kind: socket.SocketKind, mode: int = 0o600) -> Iterator[socket.socket]:
    """A Unix socket at the path `name`, until the end of the block."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.bind(name)
        path.chmod(mode)  # the umask has kept everybody out until now
        try:
            yield sock
        finally:
            path.unlink(missing_ok=True)


class Unit:
    """A socket or a service. It is up while its task runs; to cancel that takes it down."""

    def __init__(self, name: str, supervisor: Supervisor) -> None:
        self._supervisor, self._file = supervisor, supervisor.file(name)
        self.state = UnitState(name, self._file.get("Unit", "Description"), "loaded", "inactive", "dead", time.time())
        self.lines: deque[LogLine] = deque(maxlen=LOG_LINES)
        self.listener: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._started: asyncio.Future[str]

    async def start(self) -> str:
        """Bring it up unless it is; return the job's result."""
        if self._task and self._task.cancelling():
            await self.ended()
        if not self._task or self._task.done():
            self._started = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._main())
            self._task.add_done_callback(lambda task: self._answer("canceled" if task.cancelled() else "failed"))
        return await asyncio.shield(self._started)

    async def stop(self) -> None:
        """Take it down."""
        if self._task and not self._task.cancelling():
            self._task.cancel()
        await self.ended()

    async def ended(self) -> None:
        """Wait until it is down."""
        if self._task:
            await asyncio.wait([self._task])

    def _answer(self, result: str) -> None:
        if not self._started.done():
            self._started.set_result(result)

    def _enter(self, active: str, sub: str, **more: Any) -> None:
        self.state = replace(self.state, active=active, sub=sub, since=time.time(), **more)
        self._supervisor.tell(self.state.unit, self.state)
        if active == "active":
            self._answer("done")

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
            if not (work := {"socket": self._listen, "service": self._serve}.get(self.state.unit.rpartition(".")[2])):
                raise BadRequest("the embedded mode runs sockets and services, and nothing else")
            await work()
        except (CircleError, OSError, ValueError, OverflowError, subprocess.SubprocessError) as exc:
            self.state = replace(self.state, result="resources")
            self._say(f"cannot run {self.state.unit}: {exc}")
        finally:
            failed = self.state.result != "success" and self.state.sub != "auto-restart"
            self._enter("failed" if failed else "inactive", "failed" if failed else "dead")

    async def _listen(self) -> None:
        """Listen, and run the service of that name while there are connections for it to accept."""
        service = self._supervisor.unit(self.state.unit.removesuffix("socket") + "service")
        path, mode = self._file.get("Socket", "ListenStream"), self._file.get("Socket", "SocketMode", "0666")
        if not path.startswith("/"):
            raise BadRequest(f"the embedded mode knows absolute paths as ListenStream=, not {path}")
        with bound(path, socket.SOCK_STREAM, int(mode, 8)) as self.listener:
            self.listener.listen(int(self._file.get("Socket", "Backlog", "4096")))
            self._enter("active", "listening")
            while True:
                await readable(self.listener.fileno())
                await service.start()
                await service.ended()
                await asyncio.sleep(0 if service.state.result == "success" else PAUSE)

    async def _serve(self) -> None:
        """Run the process, again and again as Restart= says, and later each time that it has not worked."""
        policy, failures = self._file.get("Service", "Restart", "no", of=("no", "always", "on-failure")), 0
        first = self._file.seconds("Service", "RestartSec", "100ms")
        for restarts in itertools.count():
            self._enter("activating", "start", restarts=restarts, **FRESH)
            failures = 0 if await self._run() else failures + 1
            if policy == "no" or (policy == "on-failure" and self.state.result == "success"):
                return
            if str(self.state.exit_status) in self._file.words("Service", "RestartPreventExitStatus"):
                return
            delay = min(first * 2 ** min(failures, 16), max(LONGEST_DELAY, first))
            self._enter("activating", "auto-restart")
            self._answer("failed")
            how = self.state.signal or f"exit status {self.state.exit_status}"
            self._say(f"ended ({self.state.result}, {how}); restart in {delay:g} s")
            await asyncio.sleep(delay)

    async def _run(self) -> bool:
        """Run the process until it ends, a deadline passes or the task is cancelled. Return whether it has worked."""
        file, result = self._file, "success"
        limits = {"TimeoutStartSec": "90", "TimeoutStopSec": "10", "WatchdogSec": "infinity"}
        start, stop, self._watchdog = (file.seconds("Service", *limit) or math.inf for limit in limits.items())
        ending = signal.Signals[file.get("Service", "KillSignal", "SIGTERM", of=signal.Signals.__members__)]
        clean = {*CLEAN, *file.words("Service", "SuccessExitStatus")}
        notifies = file.get("Service", "Type", "simple", of=("simple", "exec", "notify")) == "notify"
        begun, process = time.monotonic(), self._spawn()
        pidfd, reading = os.pidfd_open(process.pid), asyncio.create_task(self._read(process.stdout))
        ended = asyncio.create_task(readable(pidfd))
        self.state = replace(self.state, pid=process.pid)
        try:
            async with asyncio.timeout(start) as self._deadline:
                if not notifies:
                    self.notified("READY=1")
                await asyncio.shield(ended)
        except TimeoutError:
            result = "timeout" if self.state.sub == "start" else "watchdog"
        except asyncio.CancelledError:
            self._enter("deactivating", "stop-sigterm")
            os.killpg(process.pid, ending)
            if not (await asyncio.wait([ended], timeout=stop))[0]:
                result = "timeout"
            raise
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # it, or what it left behind
            await ended
            os.close(pidfd)
            self.state = replace(self.state, pid=None)
            code = process.wait()
            await asyncio.wait([reading], timeout=LEFTOVERS)
            reading.cancel()
            status, killed = (code, None) if code >= 0 else (None, signal_name(-code))
            if result == "success" and (killed or str(code)) not in clean:
                result = "signal" if killed else "exit-code"
            self.state = replace(self.state, result=result, exit_status=status, signal=killed)
        return (notifies and self.state.sub == "running") or time.monotonic() - begun > LONGEST_DELAY

    def notified(self, message: str) -> None:
        """What the process said by sd_notify(3)."""
        said = message.splitlines()
        if "READY=1" in said and self.state.sub == "start":
            self._enter("active", "running")
        if self.state.sub == "running" and ("READY=1" in said or "WATCHDOG=1" in said):
            with contextlib.suppress(RuntimeError):  # the deadline has just passed
                self._deadline.reschedule(asyncio.get_running_loop().time() + self._watchdog)

    def _spawn(self) -> subprocess.Popen[bytes]:
        file, supervisor = self._file, os.getpid()
        environment = dict(os.environ)
        for assignment in file.words("Service", "Environment"):
            key, _, environment[key] = assignment.partition("=")
        for key, specifier in DIRECTORIES.items():
            paths = [Path(self._supervisor.specifiers[specifier], name) for name in file.words("Service", key)]
            for path in paths:
                path.mkdir(parents=True, exist_ok=True)
                path.chmod(int(file.get("Service", f"{key}Mode", "0755"), 8))
            if paths:
                environment[key.removesuffix("Directory").upper() + "_DIRECTORY"] = ":".join(map(str, paths))
        if self._watchdog < math.inf:
            environment["WATCHDOG_USEC"] = str(int(self._watchdog * 1e6))
        listening = self._supervisor.socket_of(self.state.unit)
        passed = listening.listener if listening else None
        if passed:
            environment["LISTEN_FDS"] = "1"

        def become() -> None:
            """In the child, which alone knows its pid."""
            os.environ.update(environment, LISTEN_PID=str(os.getpid()), WATCHDOG_PID=str(os.getpid()))
            if passed:
                os.dup2(passed.fileno(), FIRST)  # in the place of the event loop's own
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != supervisor:
                os.kill(os.getpid(), signal.SIGKILL)

        if user := file.get("Service", "User"):
            raise BadRequest(f"the embedded mode runs everything as you, not as User={user}")
        return subprocess.Popen(
            file.command(environment),
            cwd=file.get("Service", "WorkingDirectory", "/").lstrip("-"),
            umask=int(file.get("Service", "UMask", "0022"), 8),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=become, pass_fds=(FIRST,) if passed else (),
        )  # fmt: skip

    async def _read(self, output: IO[bytes] | None) -> None:
        assert output is not None
        with output:
            data, rest, since, taken = b"-", b"", 0.0, 0
            while data:
                await readable(output.fileno())
                data = os.read(output.fileno(), LONGEST_LINE)
                if time.monotonic() - since > INTERVAL:
                    since, taken = time.monotonic(), 0
                taken += len(data)
                if taken > BURST:
                    if taken - len(data) <= BURST:
                        self._say(
                            f"wrote more than {BURST} bytes within {INTERVAL:g} s; some of what follows is left out"
                        )
                    rest = b""
                    continue
                *lines, rest = (rest + data).split(b"\n")
                if rest and (not data or len(rest) >= LONGEST_LINE):
                    lines, rest = [*lines, rest], b""
                for line in lines:
                    self._say(line.decode("utf-8", "replace"))


class Supervisor:
    """All units by name. `specifiers`: what those of systemd.unit(5) stand for that units share; `places` of files."""

    name = "supervisor"
    requests = 0

    def __init__(self, specifiers: Mapping[str, str], places: Sequence[Path]) -> None:
        self.specifiers, self._places = specifiers, places
        self.connections: Callable[[], int] = lambda: 0
        self._units: dict[str, Unit] = {}
        self._followers: list[tuple[type, list[str], asyncio.Queue[UnitState | LogLine]]] = []

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
        raise NotFound(f"there is no unit {name}")

    def unit(self, name: str) -> Unit:
        """A unit. Raises `NotFound`, `UnitFailed`."""
        if name not in self._units:
            self._units[name] = Unit(name, self)
        return self._units[name]

    def socket_of(self, service: str) -> Unit | None:
        """The socket that starts a service, if it listens."""
        unit = self._units.get(service.removesuffix("service") + "socket")
        return unit if unit and unit.state.active == "active" else None

    async def job(self, verb: str, name: str) -> str:
        """Start, stop or restart a unit; return the job's result. Raises `NotFound`, `UnitFailed`, `Conflict`."""
        if verb not in ("start", "stop", "restart"):
            raise Conflict(f"the embedded mode cannot {verb} a unit")
        unit = self.unit(name)
        if verb != "start" or unit.state.sub == "auto-restart":
            await unit.stop()
        return await unit.start() if verb != "stop" else "done"

    async def stop(self) -> None:
        """Stop everything: sockets first, so that nothing starts again."""
        for kind in (".socket", ".service"):
            await asyncio.gather(*(unit.stop() for name, unit in self._units.items() if name.endswith(kind)))

    def notified(self, notify: socket.socket) -> None:
        """Pass a message on to the service whose main process sent it, by the kernel's word."""
        data, ancillary, _, _ = notify.recvmsg(4096, socket.CMSG_SPACE(_ucred.size))
        senders = [_ucred.unpack(content)[0] for _, _, content in ancillary]
        for unit in self._units.values():
            if unit.state.pid in senders:
                unit.notified(data.decode("utf-8", "replace"))

    def tell(self, name: str, event: UnitState | LogLine) -> None:
        """Pass an event of a unit on to who follows it; who does not keep up loses the oldest."""
        for kind, names, queue in self._followers:
            if name in names and isinstance(event, kind):
                if queue.full():
                    queue.get_nowait()
                queue.put_nowait(event)

    async def dispatch(self, line: bytes, peer: Peer, files: object) -> bytes | AsyncGenerator[bytes, None]:
        """Answer one request of the registry. Never raises."""
        try:
            if role_of_uid(peer.uid, os.getuid()) is None:
                raise Denied("the supervisor answers only to its own uid")
            match wire.decode_object(line):
                case {"action": "job", "verb": verb, "unit": name}:
                    return wire.success(await self.job(verb, name))
                case {"action": "matching", "pattern": pattern}:
                    up = {name for name, unit in self._units.items() if unit.state.active != "inactive"}
                    up |= {name.removesuffix("socket") + "service" for name in up if name.endswith(".socket")}
                    return wire.success(sorted(fnmatch.filter(up, pattern)))
                case {"action": "states" | "logs" as action, "units": names, "follow": follow}:
                    kind = UnitState if action == "states" else LogLine
                    return self._events(kind, names) if follow else wire.success(self._now(kind, names))
            raise BadRequest("the supervisor has no such action")
        except CircleError as error:
            return wire.failure(error)
        except Exception:
            log.exception("a request failed")
            return wire.failure(Internal("an internal error; the supervisor's log has the details"))

    async def _events(self, kind: type, names: list[str]) -> AsyncGenerator[bytes, None]:
        """What there is of `kind` now, then what is new, a list a reply, until the connection ends."""
        queue = asyncio.Queue[UnitState | LogLine](LOG_LINES)
        self._followers.append((kind, names, queue))
        try:
            yield wire.success(self._now(kind, names), more=True)
            while True:
                yield wire.success([asdict(await queue.get())], more=True)
        finally:
            self._followers.remove((kind, names, queue))

    def _now(self, kind: type, names: list[str]) -> list[dict[str, Any]]:
        if kind is UnitState:
            return [asdict(self._state(name)) for name in names]
        return [asdict(line) for name in names if name in self._units for line in self._units[name].lines]

    def _state(self, name: str) -> UnitState:
        try:
            state = self.unit(name).state
        except CircleError as exc:
            return UnitState(name, str(exc), "not-found" if isinstance(exc, NotFound) else "error", "inactive", "dead")
        if state.pid:
            pages = int(Path(f"/proc/{state.pid}/statm").read_text().split()[1])
            state = replace(state, memory=pages * os.sysconf("SC_PAGE_SIZE"))
        listening = self.socket_of(name)
        return replace(state, triggered_by=(listening.state.unit,), listening=True) if listening else state


async def run(runtime: Path, state: Path, cache: Path, places: Sequence[Path]) -> int:
    """Supervise until SIGINT or SIGTERM; return the exit status.

    Sockets are in `runtime`, what lasts in `state` and `cache`, unit files in `places`. Raises OSError, `BadRequest`
    for a path that is too long, `Conflict` if another supervisor runs there.
    """
    os.umask(0o077)
    control_path, notify_path = socket_path("supervisor", str(runtime)), socket_path("notify", str(runtime))
    for directory in (runtime, state, cache):
        directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(runtime, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Conflict(f"CircleOSD already runs at {runtime}") from None
    ours = Notifier()
    for key in [key for key in os.environ if key.startswith(("LISTEN_", "WATCHDOG_"))]:
        del os.environ[key]
    os.environ.update(CIRCLEOSD_SUPERVISOR=control_path, NOTIFY_SOCKET=notify_path)
    # Our own programs are beside the interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    specifiers = {
        "t/circleosd": str(runtime), "t": str(runtime.parent), "S": str(state), "C": str(cache), "h": str(Path.home()),
    }  # fmt: skip
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    with bound(control_path, socket.SOCK_STREAM) as control, bound(notify_path, socket.SOCK_DGRAM) as notify:
        supervisor = Supervisor(specifiers, places)
        notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        loop.add_reader(notify, supervisor.notified, notify)
        control.listen()
        server = Server(supervisor, control, ServerSettings(idle_exit=0), max_line=64 * 1024, manager=ours)
        serving = asyncio.create_task(server.run())
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, told.set)
        try:
            for name in supervisor.file(TARGET).words("Unit", "Wants"):
                if await supervisor.job("start", name) != "done":
                    raise UnitFailed(f"cannot start {name}")
            log.info("listening below %s; stop with Ctrl-C", runtime)
            await told.wait()
        finally:
            await supervisor.stop()
            server.stop()
            await serving
            loop.remove_reader(notify)
    return 0
