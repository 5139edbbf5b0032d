"""The supervisor: all units by name, and jobs for them."""

from __future__ import annotations

import asyncio
import fnmatch
import os
import re
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from circleosd.embedded.unitfile import UnitFile
from circleosd.embedded.units import Service, Socket, Unit
from circleosd.errors import CircleError, Conflict, NotFound, UnitFailed
from circleosd.registry.units import LogLine, UnitState

_ucred = struct.Struct("3i")  # pid, uid, gid; unix(7)


def _memory(pid: int) -> int | None:
    """The resident memory of a process; None where /proc hides workers, even from their own uid (hidepid=, proc(5))."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:  # EPERM with hidepid=1, ENOENT with hidepid=2
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


class Supervisor:
    """All units by name. `specifiers`: values of systemd.unit(5)'s specifiers; `places`: directories of files."""

    def __init__(self, specifiers: Mapping[str, str], places: Sequence[Path]) -> None:
        self.specifiers, self._places = specifiers, places
        self._units: dict[str, Unit] = {}
        self.stopping = False
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
        """Stop everything: first the sockets, so that nothing starts again. Waiting jobs are canceled."""
        self.stopping = True
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
            state = state._replace(memory=_memory(state.pid))
        listening = self.socket_of(name)
        return state._replace(triggered_by=(listening.state.unit,), listening=True) if listening else state
