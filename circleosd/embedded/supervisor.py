"""The supervisor: units by name, jobs on them, and the socket over which the registry asks for both."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import fnmatch
import logging
import os
import socket
import struct
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from circleosd import wire
from circleosd.config import ServerSettings
from circleosd.embedded import unitfile
from circleosd.embedded.unitfile import UnitFile
from circleosd.embedded.units import LOG_LINES, Service, Socket
from circleosd.errors import BadRequest, CircleError, Conflict, Denied, Internal, NotFound, UnitFailed, UnknownAction
from circleosd.policy import Peer, role_of_uid
from circleosd.registry.units import LogLine, UnitState
from circleosd.server import Server
from circleosd.systemd.notify import Notifier

log = logging.getLogger(__name__)

TARGET = "circleosd.target"
Watcher = tuple[str, frozenset[str], "asyncio.Queue[UnitState | LogLine]"]


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
        """%t, %S, %C, %E, %h and %U (systemd.unit(5))."""
        home = Path.home()
        return {
            "t": str(self.runtime.parent),
            "S": str(self.state),
            "C": str(self.cache),
            "E": os.environ.get("XDG_CONFIG_HOME", f"{home}/.config"),
            "h": str(home),
            "U": str(os.getuid()),
        }


class Supervisor:
    """All units, and the actions `states`, `matching`, `job`, `logs`, `watch` and `follow` for the registry."""

    name = "supervisor"
    requests = 0

    def __init__(self, places: Places) -> None:
        self.connections: Callable[[], int] = lambda: 0
        self._places = places
        self._sockets: dict[str, Socket] = {}
        self._services: dict[str, Service] = {}
        self._jobs: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # one job at a time on a unit
        self._tasks: set[asyncio.Task[None]] = set()
        self._watchers: list[Watcher] = []
        self._notify_path = places.runtime / "notify"

    async def start(self) -> None:
        """Listen for notifications, then start what the target wants."""
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._notify_path.unlink(missing_ok=True)
        self._notify.bind(str(self._notify_path))
        asyncio.get_running_loop().add_reader(self._notify, self._notified)
        for name in self._file(TARGET).words("Unit", "Wants"):
            await self.job("start", name)

    async def stop(self) -> None:
        """Stop everything: sockets first, so that nothing starts again."""
        for task in self._tasks:
            task.cancel()
        for unit in self._sockets.values():
            unit.close()
        await asyncio.gather(*(service.stop() for service in self._services.values()))
        asyncio.get_running_loop().remove_reader(self._notify)
        self._notify.close()
        self._notify_path.unlink(missing_ok=True)

    # units

    def _file(self, name: str) -> UnitFile:
        """The file of a unit, or of its template. Raises `NotFound`, `UnitFailed`."""
        if "/" in name or name.startswith("."):
            raise NotFound(f"there is no unit {name[:64]!r}")
        names = [name, template] if (template := unitfile.template_of(name)) else [name]
        for path in (directory / candidate for directory in self._places.units for candidate in names):
            if path.is_file():
                try:
                    return unitfile.parse(path.read_text(encoding="utf-8"))
                except (OSError, ValueError, BadRequest) as exc:
                    raise UnitFailed(f"cannot read {path}: {exc}") from exc
        raise NotFound(f"there is no unit {name}")

    def _socket(self, name: str) -> Socket:
        if (known := self._sockets.get(name)) and known.listener:
            return known
        file, specifiers = self._file(name), self._places.specifiers() | unitfile.specifiers(name)
        stream = file.get("Socket", "ListenStream")
        # %t/circleosd is the runtime directory, whatever that is called here.
        own = stream.removeprefix("%t/circleosd/")
        path = Path(unitfile.expand(stream, specifiers))
        if own != stream:
            path = self._places.runtime / unitfile.expand(own, specifiers)
        self._sockets[name] = Socket(name, file, path)
        return self._sockets[name]

    def _service(self, name: str) -> Service:
        """The service of that name; one that does not run is read from its file anew."""
        known = self._services.get(name)
        if known and known.pid:
            return known
        file = self._file(name)
        if known:
            known.file = file
            return known
        if not name.endswith(".service"):
            raise UnitFailed(f"the embedded mode runs services and sockets, not {name}")
        specifiers = self._places.specifiers() | unitfile.specifiers(name)
        self._services[name] = Service(name, file, specifiers, lambda event: self._tell(name, event))
        return self._services[name]

    def _lines(self, name: str) -> list[LogLine]:
        return [*service.lines] if (service := self._services.get(name)) else []

    def _socket_of(self, service: str) -> Socket | None:
        found = self._sockets.get(service.removesuffix(".service") + ".socket")
        return found if found and found.listener else None

    # jobs

    async def job(self, verb: str, name: str) -> str:
        """Start, stop or restart a unit; return the job's result. Raises `NotFound`, `UnitFailed`, `Conflict`."""
        if verb not in ("start", "stop", "restart"):
            raise Conflict(f"the embedded mode cannot {verb} a unit")
        async with self._jobs[name]:
            if name.endswith(".socket"):
                unit = self._socket(name)
                if verb != "start":
                    unit.close()
                if verb != "stop" and not unit.listener:
                    service = name.removesuffix(".socket") + ".service"
                    unit.listen(lambda: self._in_background(self._on_demand(unit, service)))
                return "done"
            service_unit = self._service(name)
            if verb != "start":
                await service_unit.stop()
            return await self._start(service_unit) if verb != "stop" else "done"

    async def _start(self, service: Service) -> str:
        if service.pid:
            return "done"
        listening = self._socket_of(service.name)
        if listening:
            listening.ignore()
        try:
            result = await service.start(self._environment(service), listening.listener if listening else None)
        except CircleError:
            if listening:
                listening.watch()
            raise
        self._in_background(self._after_exit(service))
        return result

    def _environment(self, service: Service) -> dict[str, str]:
        """Ours, and how to reach the supervisor."""
        mine = ("LISTEN_", "NOTIFY_", "WATCHDOG_")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(mine)}
        environment["CIRCLEOSD_SUPERVISOR"] = str(self._places.runtime / "supervisor.sock")
        if service.file.get("Service", "Type") == "notify":
            environment["NOTIFY_SOCKET"] = str(self._notify_path)
        return environment

    async def _on_demand(self, unit: Socket, service: str) -> None:
        """A connection waits: start the service, which accepts it."""
        try:
            await self.job("start", service)
        except CircleError as exc:
            log.error("%s", exc)
            await asyncio.sleep(1)  # the connection still waits: do not spin on a service that cannot start
            unit.watch()

    async def _after_exit(self, service: Service) -> None:
        """When the process has ended: start it again if it should be, else look out for its next connection."""
        await service.gone.wait()
        async with self._jobs[service.name]:
            if service.pid:  # a job has started it again meanwhile
                return
            delay = service.restart_delay()
            if delay is None:
                failed = service.result != "success" and service.active != "inactive"
                service.enter("failed" if failed else "inactive", "failed" if failed else "dead")
                if listening := self._socket_of(service.name):
                    listening.watch()
                return
            service.enter("activating", "auto-restart")
        how = service.signal or service.exit_status
        log.warning("%s ended (%s, %s); restart in %g s", service.name, service.result, how, delay)
        await asyncio.sleep(delay)
        if service.sub == "auto-restart":
            service.restarts += 1
            try:
                await self.job("start", service.name)
            except CircleError as exc:
                log.error("%s", exc)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _notified(self) -> None:
        """Pass a notification on to the service whose main process the kernel says it comes from (unix(7))."""
        size = struct.calcsize("3i")
        data, ancillary, _, _ = self._notify.recvmsg(4096, socket.CMSG_SPACE(size))
        senders = [
            struct.unpack("3i", content[:size])[0]
            for level, kind, content in ancillary
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
        ]
        for service in self._services.values():
            if service.pid in senders:
                service.notified(data.decode("utf-8", "replace"))

    # what the registry asks

    async def dispatch(self, line: bytes, peer: Peer, files: object) -> bytes | AsyncGenerator[bytes, None]:
        """Answer one request of the registry. Never raises."""
        self.requests += 1
        try:
            if role_of_uid(peer.uid, os.getuid()) is None:
                raise Denied("the supervisor answers only to its own uid")
            action, params, _ = wire.envelope(wire.decode_object(line))
            answer = await self._carry_out(action, params)
            return answer if isinstance(answer, AsyncGenerator) else wire.success(answer)
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
                listening = [name for name, unit in self._sockets.items() if unit.listener]
                running = [name for name, unit in self._services.items() if unit.active != "inactive"]
                names = {*listening, *running, *(name.removesuffix(".socket") + ".service" for name in listening)}
                return sorted(fnmatch.filter(names, params["pattern"]))
            case "job":
                return await self.job(params["verb"], params["unit"])
            case "logs":
                return [asdict(line) for line in self._lines(params["unit"])]
            case "watch" | "follow":
                return self._events(action, params["units"])
            case _:
                raise UnknownAction(f"the supervisor has no action {action[:64]!r}")

    def _tell(self, name: str, event: UnitState | LogLine) -> None:
        """Pass an event of a unit on to who watches it; a watcher that does not keep up loses the oldest."""
        for kind, units, queue in self._watchers:
            if name in units and isinstance(event, UnitState if kind == "watch" else LogLine):
                if queue.full():
                    queue.get_nowait()
                queue.put_nowait(event)

    async def _events(self, kind: str, units: list[str]) -> AsyncGenerator[bytes, None]:
        """New states (watch) or new output (follow) of `units`, a reply each, until the connection ends."""
        watcher: Watcher = (kind, frozenset(units), asyncio.Queue(LOG_LINES))
        self._watchers.append(watcher)
        try:
            while True:
                yield wire.success(asdict(await watcher[2].get()), more=True)
        finally:
            self._watchers.remove(watcher)

    def _state(self, name: str) -> UnitState:
        try:
            if name.endswith(".socket"):
                return self._socket(name).state()
            state = self._service(name).state()
        except NotFound:
            return UnitState(name, "", "not-found", "inactive", "dead")
        except CircleError as exc:
            return UnitState(name, str(exc), "error", "inactive", "dead")
        listening = self._socket_of(name)
        return replace(state, triggered_by=(listening.name,), listening=True) if listening else state


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
        control.listen(4096)
        server = Server(supervisor, control, ServerSettings(idle_exit=0), max_line=64 * 1024, manager=Notifier())
        serving = asyncio.create_task(server.run())
        try:
            await supervisor.start()
            log.info("listening below %s; stop with Ctrl-C", places.runtime)
            await serving
        finally:
            await supervisor.stop()
            path.unlink(missing_ok=True)
    return 0


@contextlib.contextmanager
def _sole(runtime: Path) -> Iterator[None]:
    """Hold the lock of a runtime directory. Raises `Conflict`."""
    fd = os.open(runtime / "supervisor.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Conflict(f"CircleOSD already runs at {runtime}") from None
    finally:
        os.close(fd)
