"""The states of units, from their properties (org.freedesktop.systemd1(5))."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from circleosd.registry.units import UnitState, signal_name

_UNKNOWN = 2**64 - 1  # how systemd says that it cannot tell a figure
_EXITED, _KILLED = 1, (2, 3)  # CLD_EXITED; CLD_KILLED, CLD_DUMPED: waitid(2)
STAMPS = (
    "StateChangeTimestamp",
    "InactiveExitTimestamp",
    "ActiveEnterTimestamp",
    "ActiveExitTimestamp",
    "InactiveEnterTimestamp",
)
_SINCE = {  # when a unit entered its state, by the state
    "active": "ActiveEnterTimestamp",
    "reloading": "ActiveEnterTimestamp",
    "inactive": "InactiveEnterTimestamp",
    "failed": "InactiveEnterTimestamp",
    "activating": "InactiveExitTimestamp",
    "deactivating": "ActiveExitTimestamp",
}


def since_stamp(active: str) -> str:
    """The property that tells since when a unit has been in a state (ActiveState)."""
    return _SINCE.get(active, "StateChangeTimestamp")


def state_of(unit: str, properties: Mapping[str, Any]) -> UnitState:
    """The state that a unit's properties describe, without listening."""
    active = properties["ActiveState"]
    alive = active not in ("inactive", "failed")  # while a unit starts, its PID is told before its state
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
    """The properties that a row of ListUnitsByNames tells of a unit.

    Since when it has been in its state such a row does not tell: it is said to be `began`, seconds since the epoch.
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
    """That of a unit which does not exist."""
    return UnitState(unit, unit, "not-found", "inactive", "dead")


def plain(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Properties without the signatures of their values."""
    return {name: variant.value for name, variant in properties.items()}


def _figure(value: int) -> int | None:
    return None if value == _UNKNOWN else value
