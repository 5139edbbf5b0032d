"""Watching units by the signals of systemd: nothing is polled."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from circleosd.registry.units import UnitState
from circleosd.systemd.buserrors import Lost
from circleosd.systemd.names import FROM_SYSTEMD, MANAGER, PROPERTIES, SYSTEMD, UNIT, UNIT_NAME, UNITS
from circleosd.systemd.states import absent, plain, state_of

if TYPE_CHECKING:
    from dbus_fast import Message

    from circleosd.systemd.bus import Connection

_UNIT_NEW = f"{FROM_SYSTEMD},interface='{MANAGER[2]}',member='UnitNew'"
_RELOADING = f"{FROM_SYSTEMD},interface='{MANAGER[2]}',member='Reloading'"
_CHANGED = f"{FROM_SYSTEMD},interface='{PROPERTIES}',path_namespace='{UNITS}'"


async def changes(connection: Connection, units: Sequence[str], pattern: str) -> AsyncGenerator[UnitState, None]:
    """The states of `units` and of those that match `pattern`, and again after signals that concern them, also when a
    state stayed as it was.
    """
    names: dict[str, list[str]] = {}  # by object path; several when one is another's alias
    known: dict[str, dict[str, Any]] = {}
    serials: dict[str, int] = {}

    async def read(path: str) -> None:
        reply = await connection.call((SYSTEMD, path, PROPERTIES), "GetAll", "s", [""])
        known[path], serials[path] = plain(reply.body[0]), reply.serial

    def wanted(signal: Message) -> bool:
        if signal.member == "UnitNew":
            return fnmatchcase(signal.body[0], pattern)
        return signal.path in names or signal.member == "Reloading"

    async with connection.signals([_CHANGED, _RELOADING, *([_UNIT_NEW] if pattern else [])], wanted) as signals:
        while True:
            names.clear()
            valid = [unit for unit in units if UNIT_NAME.fullmatch(unit)]
            if pattern:
                found = (await connection.call(MANAGER, "ListUnitsByPatterns", "asas", [[], [pattern]])).body[0]
                valid += [row[0] for row in found if row[0] not in valid]
            rows = (await connection.call(MANAGER, "ListUnitsByNames", "as", [valid])).body[0]
            for unit, row in zip(valid, rows, strict=True):
                names.setdefault(row[6], []).append(unit)
            for unit in set(units).difference(valid):
                yield absent(unit)
            for path in names:
                await read(path)
                for unit in names[path]:
                    yield state_of(unit, known[path])
            while signal := await signals.get():
                if signal.member == "Reloading":
                    if not signal.body[0]:  # the unit files were read anew
                        break
                elif signal.member == "UnitNew":
                    unit, path = signal.body
                    if path not in names:
                        names[path] = [unit]
                        await read(path)
                        yield state_of(unit, known[path])
                elif (path := signal.path or "") in names and signal.serial > serials[path]:  # later than what we read
                    interface, changed, _invalidated = signal.body
                    known[path] |= plain(changed)
                    if interface == UNIT:  # comes after the one of the unit's type, and completes it
                        for unit in names[path]:
                            yield state_of(unit, known[path])
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
