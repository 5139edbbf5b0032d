"""The states of units, from their properties (org.freedesktop.systemd1(5))."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from circleosd.registry.units import UnitState, signal_name

_UNKNOWN = 2**64 - 1  # systemd's value for a number that is not available
_EXITED, _KILLED = 1, (2, 3)  # CLD_EXITED; CLD_KILLED, CLD_DUMPED: waitid(2)
STAMPS = (
    "StateChangeTimestamp",
    "InactiveExitTimestamp",
    "ActiveEnterTimestamp",
    "ActiveExitTimestamp",
    "InactiveEnterTimestamp",
)
_SINCE = {  # the property with the time at which a unit entered its state, by state
    "active": "ActiveEnterTimestamp",
    "reloading": "ActiveEnterTimestamp",
    "inactive": "InactiveEnterTimestamp",
    "failed": "InactiveEnterTimestamp",
    "activating": "InactiveExitTimestamp",
    "deactivating": "ActiveExitTimestamp",
}


def since_stamp(active: str) -> str:
    """The property with the time since which a unit has been in a state (ActiveState)."""
    return _SINCE.get(active, "StateChangeTimestamp")


def state_of(unit: str, properties: Mapping[str, Any]) -> UnitState:
    """The state described by a unit's properties, except for `listening`."""
    active = properties["ActiveState"]
    alive = active not in ("inactive", "failed")  # while a unit starts, its PID is reported before its state
    ended, how = properties.get("ExecMainCode"), properties.get("ExecMainStatus", 0)
    return UnitState(
        unit=unit,
        description=properties["Description"],
        load=properties["LoadState"],
        active=active,
        sub=properties["SubState"],
        since=properties[since_stamp(active)] / 1e6 or None,
        pid=properties.get("MainPID") or None if alive else None,
        memory=_figure(properties.get("MemoryCurrent", _UNKNOWN)),
        restarts=properties.get("NRestarts"),
        result=properties.get("Result"),
        exit_status=how if ended == _EXITED else None,
        signal=signal_name(how) if ended in _KILLED else None,
        triggered_by=tuple(properties["TriggeredBy"]),
        requires=tuple(unit for kind in ("Requires", "Requisite", "BindsTo") for unit in properties[kind]),
        enabled=properties.get("UnitFileState") or None,
    )


def listed(row: Sequence[Any], began: float) -> dict[str, Any]:
    """The properties in a row of ListUnitsByNames.

    It lacks the time at which the unit entered its state: `began`, in seconds since the epoch, takes its place.
    """
    _name, description, load, active, sub = row[:5]
    return {
        "Description": description,
        "LoadState": load,
        "ActiveState": active,
        "SubState": sub,
        **dict.fromkeys(STAMPS, began * 1e6),
        **dict.fromkeys(("TriggeredBy", "Requires", "Requisite", "BindsTo"), ()),
    }


def absent(unit: str) -> UnitState:
    """The state of a unit that does not exist."""
    return UnitState(unit, unit, "not-found", "inactive", "dead")


def plain(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Properties without the signatures of their values."""
    return {name: variant.value for name, variant in properties.items()}


def _figure(value: int) -> int | None:
    return None if value == _UNKNOWN else value
