"""The embedded mode: one foreground supervisor that stands in for systemd, to try CircleOSD without it.

It reads the unit files that systemd would, holds their sockets, starts a service on its first connection and speaks
sd_listen_fds(3), sd_notify(3) and the watchdog. It knows services of Type simple, exec and notify, and nothing else
of systemd.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import fnmatch
import logging
import os
import shutil
import signal
import socket
import struct
import sys
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from circleosd import spawn, unitfile, wire
from circleosd.config import ServerSettings
from circleosd.errors import BadRequest, CircleError, Conflict, Denied, Internal, NotFound, UnitFailed, UnknownAction
from circleosd.policy import Peer, role_of_uid
from circleosd.registry.units import UnitState
from circleosd.server import Server
from circleosd.systemd.notify import Notifier
from circleosd.unitfile import UnitFile

log = logging.getLogger(__name__)

TYPES = ("simple", "exec", "notify")
LOG_LINES = 200  # kept of each unit's output
LONGEST_DELAY = 30.0  # seconds between attempts to restart a unit that does not become ready
DIRECTORIES = {"StateDirectory": "S", "CacheDirectory": "C", "RuntimeDirectory": "t", "ConfigurationDirectory": "E"}


@dataclass(frozen=True)
class Places:
    """Where the embedded mode keeps things: `runtime` the sockets, `state` and `cache` what lasts, `units` unit
    files.
    """

    runtime: Path
    state: Path
    cache: Path
    units: tuple[Path, ...]

    def specifiers(self) -> dict[str, str]:
        """%t, %S, %C, %E and %h (systemd.unit(5))."""
        return {
            "t": str(self.runtime.parent),
            "S": str(self.state),
            "C": str(self.cache),
            "E": os.environ.get("XDG_CONFIG_HOME", str(Path.home() / ".config")),
            "h": str(Path.home()),
            "u": str(os.getuid()),
            "U": str(os.getuid()),
        }


class Unit:
    """A service or socket, its file and its state. All of it runs in the supervisor's event loop."""

    def __init__(self, name: str, file: UnitFile, specifiers: Mapping[str, str]) -> None:
        self.name = name
        self.file = file
        self.specifiers = specifiers
        self.active = "inactive"
        self.sub = "dead"
        self.since = time.time()
        self.job = asyncio.Lock()  # one job at a time, the others wait

    def expand(self, text: str) -> str:
        """Replace the specifiers in a value of this unit."""
        return unitfile.expand(text, self.specifiers)

    def enter(self, active: str, sub: str) -> None:
        """Change state."""
        self.active, self.sub, self.since = active, sub, time.time()

    def state(self) -> UnitState:
        """The state as the registry shows it."""
        description = self.file.get("Unit", "Description").replace("%i", self.specifiers["i"])
        return UnitState(self.name, description, "loaded", self.active, self.sub, self.since)


class SocketUnit(Unit):
    """A listening Unix socket, watched while its service does not run."""

    listener: socket.socket | None = None

    async def start(self, path: Path, trigger: Callable[[], None]) -> None:
        """Bind and listen; call `trigger` whenever a connection waits while the socket is watched."""
        if self.listener:
            return
        path.parent.mkdir(mode=int(self.file.get("Socket", "DirectoryMode", "0755"), 8), parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            before = os.umask(0o777 & ~int(self.file.get("Socket", "SocketMode", "0666"), 8))
            try:
                listener.bind(str(path))
            finally:
                os.umask(before)
            listener.listen(int(self.file.get("Socket", "Backlog", "4096")))
        except OSError as exc:
            listener.close()
            raise UnitFailed(f"cannot listen at {path}: {exc.strerror or exc}") from exc
        self.listener, self._path, self._trigger = listener, path, trigger
        self.watch()
        self.enter("active", "listening")

    def watch(self) -> None:
        """The service does not run: start it at the next connection."""
        if self.listener:
            asyncio.get_running_loop().add_reader(self.listener, self._trigger)

    def ignore(self) -> None:
        """The service runs and accepts by itself."""
        if self.listener:
            asyncio.get_running_loop().remove_reader(self.listener)

    async def stop(self) -> None:
        """Close the socket and remove its name."""
        self.ignore()
        if self.listener:
            self.listener.close()
            self.listener = None
            self._path.unlink(missing_ok=True)
        self.enter("inactive", "dead")


class ServiceUnit(Unit):
    """A process and its main events: ready, watchdog, exit."""

    def __init__(self, name: str, file: UnitFile, specifiers: Mapping[str, str]) -> None:
        super().__init__(name, file, specifiers)
        self.pid: int | None = None
        self.result = "success"
        self.exit_status: int | None = None
        self.restarts = 0
        self.failures = 0  # in a row, before the unit became ready
        self.lines: deque[str] = deque(maxlen=LOG_LINES)
        self.ready = asyncio.Event()
        self.gone = asyncio.Event()
        self.gone.set()
        self.stopping = False
        self.watchdog: asyncio.TimerHandle | None = None
        self.restart_timer: asyncio.TimerHandle | None = None

    def state(self) -> UnitState:
        base = asdict(super().state())
        base |= {"pid": self.pid, "restarts": self.restarts, "result": self.result, "exit_status": self.exit_status}
        base["memory"] = _resident(self.pid) if self.pid else None
        return UnitState(**base)

    def check(self) -> None:
        """Refuse what the embedded mode cannot run. Raises `UnitFailed`."""
        kind = self.file.get("Service", "Type", "simple")
        if kind not in TYPES:
            raise UnitFailed(f"{self.name} is of Type={kind}; the embedded mode runs only {', '.join(TYPES)}")
        if len(self.file.all("Service", "ExecStart")) != 1:
            raise UnitFailed(f"{self.name} must have one ExecStart=")

    def launch(self, places: Places, listeners: Sequence[int], notify: Path) -> None:
        """Start the process. Raises `UnitFailed`, `BadRequest`."""
        environment = self._environment(places, notify)
        argv = [self.expand(word) for word in unitfile.command(self.file.get("Service", "ExecStart"), environment)]
        program = shutil.which(argv[0], path=f"{Path(sys.executable).parent}:{environment.get('PATH', os.defpath)}")
        if program is None:
            self.result, self.exit_status = "exit-code", spawn.EXIT_EXEC
            raise UnitFailed(f"cannot start {self.name}: no program {argv[0]}")
        reading, output = os.pipe()
        try:
            directory = (
                self.expand(self.file.get("Service", "WorkingDirectory", "/"))
                .lstrip("-")
                .replace("~", str(Path.home()))
            )
            self.pid, pidfd = spawn.spawn(
                [program, *argv[1:]], environment, sockets=listeners, output=output, directory=directory
            )
        except OSError as exc:
            os.close(reading)
            self.result, self.exit_status = "exit-code", spawn.EXIT_EXEC
            raise UnitFailed(f"cannot start {self.name}: {exc}") from exc
        finally:
            os.close(output)
        self.result, self.exit_status, self.stopping = "success", None, False
        self.gone.clear()
        self.ready.clear()
        loop = asyncio.get_running_loop()
        os.set_blocking(reading, False)
        loop.add_reader(reading, self._read_output, reading)
        loop.add_reader(pidfd, self._ended, pidfd)
        self.pet()

    def _environment(self, places: Places, notify: Path) -> dict[str, str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("LISTEN_", "NOTIFY_"))}
        for assignment in self.file.words("Service", "Environment"):
            key, _, value = self.expand(assignment).partition("=")
            environment[key] = value
        for key, specifier in DIRECTORIES.items():
            names = self.file.words("Service", key)
            if names:
                paths = [Path(self.specifiers[specifier]) / self.expand(name) for name in names]
                for path in paths:
                    path.mkdir(mode=int(self.file.get("Service", f"{key}Mode", "0755"), 8), parents=True, exist_ok=True)
                variable = key.removesuffix("Directory").upper() + "_DIRECTORY"
                environment[variable] = ":".join(map(str, paths))
        environment["INVOCATION_ID"] = uuid.uuid4().hex
        environment["CIRCLEOSD_SUPERVISOR"] = str(places.runtime / "supervisor.sock")
        if self.file.get("Service", "Type") == "notify":
            environment["NOTIFY_SOCKET"] = str(notify)
            if seconds := self.file.seconds("Service", "WatchdogSec", 0):
                environment["WATCHDOG_USEC"] = str(int(seconds * 1e6))
        return environment

    def notified(self, message: str) -> None:
        """What the process said by sd_notify(3)."""
        for line in message.splitlines():
            if line == "READY=1":
                self.ready.set()
            elif line == "WATCHDOG=1":
                self.pet()

    def pet(self) -> None:
        """(Re)start the watchdog's clock."""
        if self.watchdog:
            self.watchdog.cancel()
            self.watchdog = None
        if seconds := self.file.seconds("Service", "WatchdogSec", 0):
            self.watchdog = asyncio.get_running_loop().call_later(seconds, self._bark)

    def _bark(self) -> None:
        self.result = "watchdog"
        log.error("%s: no sign of life in time", self.name)
        self.kill(signal.SIGABRT)

    def kill(self, number: int) -> None:
        """Send a signal to the unit's process group."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def _read_output(self, fd: int) -> None:
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return
        if not data:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)
            return
        for line in data.decode("utf-8", "replace").splitlines():
            self.lines.append(line)
            print(f"{self.name.removesuffix('.service')}: {line}", file=sys.stderr, flush=True)

    def _ended(self, pidfd: int) -> None:
        assert self.pid is not None
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        self.kill(signal.SIGKILL)  # what the main process left behind in its group
        if self.watchdog:
            self.watchdog.cancel()
        code = os.waitstatus_to_exitcode(status)
        self.exit_status = abs(code)
        if self.result == "success" and not (self.stopping and code == -signal.SIGTERM):
            self.result = "signal" if code < 0 else "exit-code" if code else "success"
        self.failures = 0 if self.ready.is_set() else self.failures + 1
        self.pid = None
        self.gone.set()

    def wants_restart(self) -> bool:
        """Whether Restart= applies to how the process ended."""
        policy = self.file.get("Service", "Restart", "no")
        failed = self.result != "success"
        return not self.stopping and (policy == "always" or (policy == "on-failure" and failed))

    def delay(self) -> float:
        """Seconds until the restart: RestartSec=, doubled for each failure before the unit was ready."""
        first = self.file.seconds("Service", "RestartSec", 0.1)
        return min(first * 2.0 ** min(self.failures, 16), max(LONGEST_DELAY, first))


def _resident(pid: int) -> int | None:
    """Resident bytes of a process, proc_pid_statm(5)."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


class Supervisor:
    """All units, and the actions `states`, `matching`, `job` and `log_tail` for the registry."""

    name = "supervisor"

    def __init__(self, places: Places) -> None:
        self.connections: Callable[[], int] = lambda: 0
        self._places = places
        self._units: dict[str, Unit] = {}
        self._notify_path = places.runtime / "notify"
        self._tasks: set[asyncio.Task[None]] = set()

    async def start_target(self, target: str) -> None:
        """Listen for notifications, then start what a target wants."""
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._notify_path.unlink(missing_ok=True)
        self._notify.bind(str(self._notify_path))
        asyncio.get_running_loop().add_reader(self._notify, self._notified)
        for name in self._load_file(target).words("Unit", "Wants"):
            await self._job("start", name)

    async def stop_all(self) -> None:
        """Stop sockets, then services."""
        for kind in (SocketUnit, ServiceUnit):
            await asyncio.gather(
                *(self._job("stop", unit.name) for unit in self._units.values() if isinstance(unit, kind))
            )
        asyncio.get_running_loop().remove_reader(self._notify)
        self._notify.close()
        self._notify_path.unlink(missing_ok=True)

    # units

    def _load_file(self, name: str) -> UnitFile:
        template = unitfile.template_of(name)
        for directory in self._places.units:
            for candidate in filter(None, (name, template)):
                path = directory / candidate
                if path.is_file():
                    try:
                        return unitfile.parse(path.read_text(encoding="utf-8"))
                    except (OSError, ValueError, BadRequest) as exc:
                        raise UnitFailed(f"cannot read {path}: {exc}") from exc
        raise NotFound(f"there is no unit {name}")

    def _unit(self, name: str) -> Unit:
        """The unit of that name; an inactive one is read from its file anew. Raises `NotFound`, `UnitFailed`."""
        known = self._units.get(name)
        if known and (known.active != "inactive" or known.job.locked()):
            return known
        if "/" in name or name.startswith("."):
            raise NotFound(f"there is no unit {name[:64]!r}")
        file = self._load_file(name)
        if known:
            known.file = file
            return known
        kind = name.rpartition(".")[2]
        classes: dict[str, type[Unit]] = {"socket": SocketUnit, "service": ServiceUnit}
        if kind not in classes:
            raise UnitFailed(f"the embedded mode runs services and sockets, not {name}")
        unit = classes[kind](name, file, self._places.specifiers() | unitfile.specifiers(name))
        self._units[name] = unit
        return unit

    def _socket_of(self, service: str) -> SocketUnit | None:
        unit = self._units.get(service.removesuffix(".service") + ".socket")
        return unit if isinstance(unit, SocketUnit) and unit.listener else None

    # jobs

    async def _job(self, verb: str, name: str) -> str:
        unit = self._unit(name)
        async with unit.job:
            if isinstance(unit, SocketUnit):
                await self._socket_job(verb, unit)
                return "done"
            assert isinstance(unit, ServiceUnit)
            if verb in ("stop", "restart"):
                await self._stop(unit)
            if verb in ("start", "restart"):
                return await self._start(unit)
            return "done"

    async def _socket_job(self, verb: str, unit: SocketUnit) -> None:
        if verb in ("stop", "restart"):
            await unit.stop()
        if verb in ("start", "restart"):
            streams = unit.file.all("Socket", "ListenStream")
            # %t/circleosd is the runtime directory, whatever that is called here.
            path = Path(unit.expand(streams[0].replace("%t/circleosd", str(self._places.runtime).replace("%", "%%"))))
            service = unit.name.removesuffix(".socket") + ".service"
            await unit.start(path, lambda: self._spawn_task(self._on_demand(unit, service)))

    async def _on_demand(self, unit: SocketUnit, service: str) -> None:
        """A connection waits: start the service, which will accept it."""
        try:
            await self._job("start", service)
        except CircleError as exc:
            log.error("%s", exc)
            await asyncio.sleep(1)  # the connection still waits; do not spin on a service that cannot start
            unit.watch()

    async def _start(self, unit: ServiceUnit) -> str:
        if unit.pid:
            return "done"
        if unit.restart_timer:
            unit.restart_timer.cancel()
            unit.restart_timer = None
        unit.check()
        listening = self._socket_of(unit.name)
        if listening:
            listening.ignore()
        unit.enter("activating", "start")
        try:
            listeners = [listening.listener.fileno()] if listening and listening.listener else []
            unit.launch(self._places, listeners, self._notify_path)
        except CircleError:
            unit.enter("failed", "failed")
            if listening:
                listening.watch()
            raise
        self._spawn_task(self._after_exit(unit))
        if unit.file.get("Service", "Type", "simple") != "notify":
            unit.ready.set()
        timeout = unit.file.seconds("Service", "TimeoutStartSec", 90)
        ready, gone = asyncio.create_task(unit.ready.wait()), asyncio.create_task(unit.gone.wait())
        done, pending = await asyncio.wait(
            (ready, gone), timeout=None if timeout == float("inf") else timeout, return_when=asyncio.FIRST_COMPLETED
        )
        for task in pending:
            task.cancel()
        if not done:
            unit.result = "timeout"
            unit.kill(signal.SIGKILL)
            await unit.gone.wait()
        if ready in done and not unit.gone.is_set():
            unit.enter("active", "running")
            return "done"
        return "done" if unit.result == "success" and ready in done else "failed"

    async def _after_exit(self, unit: ServiceUnit) -> None:
        """When the process has ended: note it, and restart the unit or watch its socket again."""
        await unit.gone.wait()
        listening = self._socket_of(unit.name)
        if unit.wants_restart():
            delay = unit.delay()
            unit.enter("activating", "auto-restart")
            log.warning("%s ended (%s, %s); starting again in %g s", unit.name, unit.result, unit.exit_status, delay)
            unit.restarts += 1
            restart = lambda: self._spawn_task(self._restart(unit.name))  # noqa: E731
            unit.restart_timer = asyncio.get_running_loop().call_later(delay, restart)
            return
        failed = unit.result != "success"
        unit.enter("failed" if failed else "inactive", "failed" if failed else "dead")
        if listening:
            listening.watch()

    async def _restart(self, name: str) -> None:
        try:
            await self._job("start", name)
        except CircleError as exc:
            log.error("%s", exc)

    async def _stop(self, unit: ServiceUnit) -> None:
        if unit.restart_timer:
            unit.restart_timer.cancel()
            unit.restart_timer = None
        unit.stopping = True
        if unit.pid:
            unit.enter("deactivating", "stop-sigterm")
            unit.kill(signal.SIGTERM)
            timeout = unit.file.seconds("Service", "TimeoutStopSec", 90)
            try:
                await asyncio.wait_for(unit.gone.wait(), None if timeout == float("inf") else timeout)
            except TimeoutError:
                unit.result = "timeout"
                unit.kill(signal.SIGKILL)
                await unit.gone.wait()
        if unit.active not in ("inactive", "failed") or unit.result == "success":
            unit.enter("failed" if unit.result != "success" else "inactive", "dead")
        elif unit.active == "failed":
            unit.result = "success"
            unit.enter("inactive", "dead")
        if listening := self._socket_of(unit.name):
            listening.watch()

    def _spawn_task(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _notified(self) -> None:
        size = struct.calcsize("3i")
        data, ancillary, _, _ = self._notify.recvmsg(4096, socket.CMSG_SPACE(size))
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                pid = struct.unpack("3i", content[:size])[0]
                for unit in self._units.values():
                    if isinstance(unit, ServiceUnit) and unit.pid == pid:
                        unit.notified(data.decode("utf-8", "replace"))

    # what the registry asks

    async def dispatch(self, line: bytes, peer: Peer, files: object) -> bytes | AsyncIterator[bytes]:
        """Answer one request of the registry. Never raises."""
        try:
            if role_of_uid(peer.uid, os.getuid()) is None:
                raise Denied("the supervisor answers only to its own uid")
            envelope = wire.envelope(wire.decode_object(line))
            return wire.success(await self._carry_out(envelope.action, envelope.params))
        except CircleError as error:
            return wire.failure(error)
        except (KeyError, TypeError) as exc:
            return wire.failure(BadRequest(f"the parameters are wrong: {exc}"))
        except Exception:
            log.exception("a request failed")
            return wire.failure(Internal("an internal error; the supervisor's log has the details"))

    async def _carry_out(self, action: str, params: dict[str, Any]) -> Any:
        match action:
            case "states":
                return [asdict(self._state(name)) for name in params["units"]]
            case "matching":
                active = [name for name, unit in self._units.items() if unit.active != "inactive"]
                sockets = [name.removesuffix(".socket") + ".service" for name in active if name.endswith(".socket")]
                names = sorted({*active, *sockets})
                return [name for name in names if fnmatch.fnmatchcase(name, params["pattern"])]
            case "job":
                if params["verb"] not in ("start", "stop", "restart"):
                    raise Conflict(f"the embedded mode cannot {params['verb']} a unit")
                return await self._job(params["verb"], params["unit"])
            case "log_tail":
                unit = self._units.get(params["unit"])
                return [*unit.lines][-params["lines"] :] if isinstance(unit, ServiceUnit) else []
            case _:
                raise UnknownAction(f"the supervisor has no action {action[:64]!r}")

    def _state(self, name: str) -> UnitState:
        try:
            unit = self._unit(name)
        except NotFound:
            return UnitState(name, "", "not-found", "inactive", "dead")
        except CircleError as exc:
            return UnitState(name, str(exc), "error", "inactive", "dead")
        state = asdict(unit.state())
        if listening := self._socket_of(name) if name.endswith(".service") else None:
            state |= {"triggered_by": (listening.name,), "listening": True}
        return UnitState(**state)


async def run(places: Places) -> int:
    """Supervise until SIGINT or SIGTERM; return the exit status. Raises `Conflict` if another supervisor runs there."""
    for directory in (places.runtime, places.state, places.cache):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _sole(places.runtime):
        supervisor = Supervisor(places)
        path = places.runtime / "supervisor.sock"
        path.unlink(missing_ok=True)
        control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        control.bind(str(path))
        control.listen(64)
        server = Server(supervisor, control, ServerSettings(idle_exit=0), max_line=64 * 1024, manager=Notifier())
        serving = asyncio.create_task(server.run())
        try:
            await supervisor.start_target("circleosd.target")
            log.info("listening below %s; stop with Ctrl-C", places.runtime)
            await serving
        finally:
            await supervisor.stop_all()
            path.unlink(missing_ok=True)
    return 0


@contextlib.contextmanager
def _sole(runtime: Path) -> Iterator[None]:
    """Hold the lock of a runtime directory. Raises `Conflict`."""
    fd = os.open(runtime / "supervisor.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Conflict(f"CircleOSD already runs at {runtime}") from None
    else:
        yield
    finally:
        os.close(fd)
