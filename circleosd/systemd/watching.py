"""Watching units by the signals of systemd: nothing is polled."""

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
    """What is known of the units that are watched, by their object paths; it outlives a connection."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}  # several when one is another's alias
        self._properties: dict[str, dict[str, Any]] = {}
        self._serials: dict[str, int] = {}  # of the message that told them first
        self._looking = False
        self.missed = False  # whether there were signals that nobody heard

    def wants(self, signal: Message) -> bool:
        """Whether a PropertiesChanged may be about one of them: while we look, an alias may lead to any unit."""
        return self._looking or signal.path in self._names

    def forget_names(self) -> None:
        """Look at all of them anew: a name may be another unit's by now."""
        self._names.clear()

    async def look(self, connection: Connection, units: Sequence[str]) -> list[UnitState]:
        """Watch these too. One round trip, however many, for all watches that look at once, as they do whenever unit
        files were read anew.
        """
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
            if all(known.get(name) == now[name] for name in _LOOKS):  # and it may be known better since when
                now |= {name: known[name] for name in STAMPS}
            self._properties[path] = now
            found.append(state_of(unit, now))
        return found

    async def catch_up(self, connection: Connection) -> list[UnitState]:
        """The states of those that entered theirs after we last heard of it, also where they look as before.

        A round trip for each: to be called only where signals were missed.
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
        """The states after a signal, of which more may follow until all of a change is told."""
        if signal.member == "UnitNew":
            unit, path = signal.body
            return [] if path in self._names else await self.look(connection, [unit])
        return self._change(signal) if signal.member == "PropertiesChanged" else []

    def _change(self, signal: Message) -> list[UnitState]:
        path = signal.path or ""
        if path not in self._names or signal.serial <= self._serials[path]:  # told before we looked
            return []
        interface, changed, _invalidated = signal.body
        self._properties[path] |= plain(changed)
        if interface != UNIT:  # which comes after the one of the unit's type, and completes it
            return []
        return [state_of(unit, self._properties[path]) for unit in self._names[path]]


async def changes(
    connection: Connection, watched: Watched, units: Sequence[str], pattern: str
) -> AsyncGenerator[UnitState, None]:
    """The states of `units` and of those that match `pattern`, and again after signals that concern them, also when a
    state stayed as it was.
    """

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
                if signal.member == "Reloading" and not signal.body[0]:  # the unit files were read anew
                    break
                for state in await watched.hear(connection, signal):
                    yield state
            else:
                raise Lost


def differs(new: UnitState, old: UnitState | None) -> bool:
    """Whether a state is news. A failed unit may have failed again; a unit dropped from memory has no `since`.

    The result is reset to success a moment before a unit leaves the state that it belonged to, which is no news; nor is
    the end of its main process while others of it stop.
    """
    if old is None or (new.since or 0.0) > (old.since or 0.0):
        return True
    if new.pid and old.pid and new.pid != old.pid:
        return True
    return (new.load, new.active, new.sub) != (old.load, old.active, old.sub)
