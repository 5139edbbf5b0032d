"""Watching units through the signals of systemd, without polling."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from circleosd.registry.units import UnitState
from circleosd.systemd.buserrors import Lost
from circleosd.systemd.names import FROM_SYSTEMD, MANAGER, PROPERTIES, SYSTEMD, UNIT, UNIT_NAME, UNITS
from circleosd.systemd.states import STAMPS, absent, listed, plain, since_stamp, state_of

if TYPE_CHECKING:
    from dbus_fast import Message

    from circleosd.systemd.bus import Connection

_UNIT_NEW = f"{FROM_SYSTEMD},interface='{MANAGER[2]}',member='UnitNew'"
_RELOADING = f"{FROM_SYSTEMD},interface='{MANAGER[2]}',member='Reloading'"
_CHANGED = f"{FROM_SYSTEMD},interface='{PROPERTIES}',path_namespace='{UNITS}'"
_LOOKS = ("LoadState", "ActiveState", "SubState")


class Watched:
    """The known state of the watched units, by object path; it survives a connection."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}  # several if one is another's alias
        self._properties: dict[str, dict[str, Any]] = {}
        self._serials: dict[str, int] = {}  # of the message that first reported them
        self._looking = False
        self.missed = False  # whether signals were missed

    def wants(self, signal: Message) -> bool:
        """Whether a PropertiesChanged may be about one of them: during a query, an alias may lead to any unit."""
        return self._looking or signal.path in self._names

    def forget_names(self) -> None:
        """Query all of them again: a name may belong to another unit by now."""
        self._names.clear()

    async def look(self, connection: Connection, units: Sequence[str]) -> list[UnitState]:
        """Watch these too. One round trip, shared by watches that query at once, as after unit files were reloaded."""
        self._looking = True
        try:
            began, reply = await connection.list_units(units)
        finally:
            self._looking = False
        found = []
        for unit, row in zip(units, reply.body[0], strict=True):
            path, now = row[6], listed(row, began)
            self._names.setdefault(path, []).append(unit)
            self._serials[path] = reply.serial
            known = self._properties.get(path, {})
            if all(known.get(name) == now[name] for name in _LOOKS):  # and the exact time may be known
                now |= {name: known[name] for name in STAMPS}
            self._properties[path] = now
            found.append(state_of(unit, now))
        return found

    async def catch_up(self, connection: Connection) -> list[UnitState]:
        """The states of units that changed since the last signal, even if they look the same.

        One round trip per unit: call this only if signals were missed.
        """
        found = []
        for path, units in [*self._names.items()]:
            known = self._properties[path]
            stamp = since_stamp(known["ActiveState"])
            reply = await connection.call((SYSTEMD, path, PROPERTIES), "Get", "ss", [UNIT, stamp])
            if (now := reply.body[0].value) > known[stamp]:
                known[stamp] = now
                found += [state_of(unit, known) for unit in units]
        self.missed = False
        return found

    async def hear(self, connection: Connection, signal: Message) -> list[UnitState]:
        """The states after a signal; more signals may follow until a change is completely reported."""
        if signal.member == "UnitNew":
            unit, path = signal.body
            return [] if path in self._names else await self.look(connection, [unit])
        return self._change(signal) if signal.member == "PropertiesChanged" else []

    def _change(self, signal: Message) -> list[UnitState]:
        path = signal.path or ""
        if path not in self._names or signal.serial <= self._serials[path]:  # sent before the query
            return []
        interface, changed, _invalidated = signal.body
        self._properties[path] |= plain(changed)
        if interface != UNIT:  # this comes after the signal of the unit's type, and completes it
            return []
        return [state_of(unit, self._properties[path]) for unit in self._names[path]]


async def changes(
    connection: Connection, watched: Watched, units: Sequence[str], pattern: str
) -> AsyncGenerator[UnitState, None]:
    """The states of `units` and of those that match `pattern`, and after signals about them, even if unchanged."""

    def wanted(signal: Message) -> bool:
        if signal.member == "UnitNew":
            return fnmatchcase(signal.body[0], pattern)
        return signal.member == "Reloading" or watched.wants(signal)

    async with connection.signals([_CHANGED, _RELOADING, *([_UNIT_NEW] if pattern else [])], wanted) as signals:
        while True:
            valid = [unit for unit in units if UNIT_NAME.fullmatch(unit)]
            for unit in set(units).difference(valid):
                yield absent(unit)
            if pattern:
                found = (await connection.call(MANAGER, "ListUnitsByPatterns", "asas", [[], [pattern]])).body[0]
                valid += [row[0] for row in found if row[0] not in valid]
            watched.forget_names()
            for state in await watched.look(connection, valid):
                yield state
            if watched.missed:
                for state in await watched.catch_up(connection):
                    yield state
            while signal := await signals.get():
                if signal.member == "Reloading" and not signal.body[0]:  # the unit files were reloaded
                    break
                for state in await watched.hear(connection, signal):
                    yield state
            else:
                raise Lost


def differs(new: UnitState, old: UnitState | None) -> bool:
    """Whether a state is news.

    A failed unit may have failed again; a unit dropped from memory has no `since`. Not news are: that the result is
    reset to success just before a unit leaves its state, and that its main process ends while other processes of it are
    still stopping.
    """
    if old is None or (new.since or 0.0) > (old.since or 0.0):
        return True
    if new.pid and old.pid and new.pid != old.pid:
        return True
    return (new.load, new.active, new.sub) != (old.load, old.active, old.sub)
