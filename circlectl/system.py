"""Commands that ask every service: the state of CircleOSD, and what was done through it."""

import time
from collections.abc import Iterable
from typing import Annotated, Any

from circlectl.asking import Asking, going_by_replies
from circleosd.api import common
from circleosd.api.contract import Doc, Mark, Request, contract, quoted
from circleosd.errors import BadRequest, CircleError, Conflict, Internal, Limit, Timeout, Unavailable
from circleosd.paths import SERVICES
from circleosd.policy import Access


class Condition(common.Report, total=False):
    """The state of a service. `state`: running, or the code of the error that kept it from answering; then the only
    other field is `problem`, the error in words.
    """

    state: str
    problem: str


@contract
class Status(Request, action="status", access=Access.VIEWER, reply=list[Condition]):
    """Show the state of each service of CircleOSD."""


@contract
class History(common.History, action="history", access=Access.ADMIN, reply=list[common.Event]):
    """Show what was done through all services, by whom, and how it ended, ordered by time."""

    follow: Annotated[bool, Doc("keep printing new rows until interrupted"), Mark.OPTION] = False
    verify: Annotated[bool, Doc("only check that no row was altered, deleted or inserted"), Mark.OPTION] = False


# Actions of rows without a request: those of ledgers and of the plugin manager themselves, and attempts of plugins.
OF_NO_REQUEST = ("prune", "quarantine", "services.restart")
MOST = 10_000  # rows that one service gives (common.History)
# Errors of a single service; others concern the request, which is the same for all.
_OF_ONE = (Unavailable, Timeout, Limit, Internal)

ANSWER = 20.0  # seconds for a report: a start that resolves interrupted acts takes up to ten (circleosd/recovery.py)

CONTRACTS: tuple[type[Request], ...] = (Status, History)


def status(ask: Asking, request: dict[str, Any]) -> tuple[Any, CircleError | None]:
    """Each service's report, or the error of one that cannot be asked, and the first error."""
    rows: list[dict[str, Any]] = []
    first: CircleError | None = None
    for service in SERVICES:
        try:
            with going_by_replies():
                rows.append({"state": "running", **ask.once(service, {"action": "health"}, timeout=ANSWER)})
        except CircleError as failed:
            # It hangs, or systemd keeps restarting it in vain: its log has the details.
            late = isinstance(failed, Timeout)
            error = Unavailable(f"{service} did not answer within {ANSWER:g} s") if late else failed
            rows.append({"service": service, "state": error.code, "problem": str(error)})
            first = first or error
    return rows, first


def history(ask: Asking, request: dict[str, Any]) -> tuple[Any, CircleError | None]:
    """The rows of the newest `lines` acts in all ledgers, by time, and the error of a service that cannot be asked.

    With `follow` an iterator that continues with new rows as they are written, also those of a service that could not
    be asked at first; with `verify` what the check of the records found.
    """
    query = dict(request)
    if query.pop("verify", False):
        if query.keys() - {"action"}:
            raise BadRequest("--verify checks the whole record; it takes no other flags")
        return _verify(ask)
    following = query.pop("follow", False)
    started = time.time()
    services = [*SERVICES]
    if "action_name" in query:
        services, query["action_name"] = _action(query["action_name"])
    count = query.pop("lines", History.lines)
    # An act has up to two rows; the last row is where following starts.
    query["lines"] = min(2 * count or 1, MOST) if 0 <= count < MOST else count
    from circlectl.ordering import merged

    found, first = _of_each(ask, services, {**query, "action": "history"})
    rows = _newest(merged([*found.values()], time.time()), count)
    if not following:
        return rows, first
    if first:
        if not found:
            raise first
        ask.said(f"{first} [{first.code}]; meanwhile showing the others")
    del query["lines"]
    query.pop("since", None)  # a row after a known one is new, even if the clock was set back
    from circlectl.following import follow

    known = {service: found[service][-1]["seq"] if found.get(service) else 0 for service in services}
    return follow(ask, query, rows, known, started), None


def _of_each(
    ask: Asking, services: Iterable[str], request: dict[str, Any]
) -> tuple[dict[str, Any], CircleError | None]:
    """The reply of each service that can be asked, and the first error of one that cannot."""
    found: dict[str, Any] = {}
    first: CircleError | None = None
    for service in services:
        try:
            found[service] = ask.once(service, request)
        except _OF_ONE as error:
            first = first or error
    return found, first


def _action(name: str) -> tuple[list[str], str]:
    """The services that a name means, as used in rules (`service:stop`) or in the record (`stop`), and the action.

    Raises `BadRequest` if no row can have it.
    """
    from circleosd.api import actions

    group, _, action = name.rpartition(":")
    if name in actions.BY_VERB:
        return [actions.SERVICES[group]], action
    if name in OF_NO_REQUEST or name in {contract.action for contract in actions.BY_VERB.values()}:
        return [*SERVICES], action
    raise BadRequest(f"no action {quoted(name)}; available: {', '.join([*actions.similar(name), *OF_NO_REQUEST])}")


def _newest(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The rows of the newest `count` acts; an intent and its outcome count as one."""
    ended = {(row["service"], row["intent"]) for row in rows}
    acts = [row for row in rows if (row["service"], row["seq"]) not in ended]
    acts = acts[max(0, len(acts) - count) :]
    kept = {(row["service"], seq) for row in acts for seq in (row["seq"], row["intent"])}
    return [row for row in rows if (row["service"], row["seq"]) in kept]


def _verify(ask: Asking) -> tuple[Any, CircleError | None]:
    """What each service reports, and an error: of a broken record, or else of a service that cannot be asked."""
    found, problem = _of_each(ask, SERVICES, {"action": "audit"})
    if broken := [f"{name}: {item['problems'][0]}" for name, item in found.items() if item["problems"]]:
        problem = Conflict(f"the record is not what CircleOSD wrote: {'; '.join(broken)}")
    return [*found.values()], problem


COMMANDS = {"status": status, "history": history}
