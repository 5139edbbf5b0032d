"""Why a job failed: from the service manager's information about the job and the unit, and from the log."""

from __future__ import annotations

import asyncio

from circleosd.errors import CircleError
from circleosd.registry.units import UnitManager, UnitState, Verb

LOG_LINES = 5  # shown with the error
JOURNAL_LAG = 10  # checks for lines that were just logged, every 50 ms
RUN = ("done", "failed", "timeout")  # results of a job that may have run the unit: not of one that systemd gave up
START_LIMIT = "start-limit-hit"  # systemd.service(5), SERVICE_RESULT
# The common part of systemd's messages when a condition was not met, from 252 to 257 (src/core/job.c); the properties
# are lost when the unit is garbage-collected.
SKIPPED = ("ondition check", "skipped")


async def explain(
    units: UnitManager, verb: Verb, result: str, before: UnitState, state: UnitState, began: float
) -> str:
    """The reason for the `result` of a job; the unit was as `before` when the job `began`, and is now in `state`.

    `began` is in seconds since the epoch. Details of a run of the unit are only given if the job caused it.
    """
    if verb == "reload" or result not in RUN:
        missing = await _missing(units, state) if result == "dependency" else ""
        down = f", and the unit is {state.active}" if result == "done" else ""
        return f"the job's result is {result}{down}{missing}{await _logged_since(units, began, state.unit)}"
    ended = [] if state.result in (None, "success", START_LIMIT) else [f"the unit's result is {state.result}"]
    if state.exit_status:
        ended.append(f"exit status {state.exit_status}")
    if state.signal:
        ended.append(state.signal)
    if ran := state.result != START_LIMIT and not _as_before(before, state):
        why = ", ".join((f"the job's result is {result}", *ended))
    else:
        why = (
            f"it was started too often in a short time, and systemd did not start it again ({START_LIMIT}); "
            f"try again later, or have an administrator run: {units.systemctl} reset-failed {state.unit}"
        )
        if state.result == START_LIMIT:
            return why
        why += "; as for its last run, " + ", ".join(ended)
    if tail := await units.log_tail(state.unit, LOG_LINES):
        return f"{why}; it said: {' | '.join(tail)}"
    return why + (await _logged_since(units, began, state.unit) if ran else "")


async def skipped(units: UnitManager, unit: str, began: float) -> str | None:
    """systemd's message about a start since `began` that a condition prevented (systemd.unit(5), Condition…=).

    For systemd, such a job is done, and leaves the unit inactive, like that of a program that has run and ended.
    """
    found = [line for line in await _logged(units, began, unit) if all(words in line for words in SKIPPED)]
    return found[-1].rstrip(".") if found else None


async def _missing(units: UnitManager, state: UnitState) -> str:
    """The required units that are missing, as part of a sentence."""
    found = [item for item in await units.states(state.requires) if item.active != "active"]
    named = [f"{item.unit}, which is {item.active if item.load == 'loaded' else item.load}" for item in found]
    return f"; it requires {' and '.join(named)}" if named else ""


async def _logged_since(units: UnitManager, began: float, unit: str) -> str:
    """The log of a job in which the unit's own processes logged nothing, as the end of a sentence."""
    lines = await _logged(units, began, unit)
    return f"; the log says: {' | '.join(lines)}" if lines else ""


async def _logged(units: UnitManager, began: float, unit: str) -> list[str]:
    """The last lines about a unit since `began`, as soon as there are any."""
    for _ in range(JOURNAL_LAG):
        await asyncio.sleep(0.05)  # lines that were just logged are not in the journal yet
        try:
            lines = await units.logs(unit, LOG_LINES, began)
        except CircleError:
            break
        if lines:
            return [line.text for line in lines]
    return []


def _as_before(before: UnitState, state: UnitState) -> bool:
    """Whether a failed unit is as it was before a job: not even a process was started.

    systemd only reports start-limit-hit (StartLimitBurst=, systemd.unit(5)) if the last run of the unit ended well;
    otherwise the result and its time stay the same.
    """
    unchanged = (before.active, before.since, before.result) == ("failed", state.since, state.result)
    return unchanged and state.active == "failed" and state.result != "resources"
