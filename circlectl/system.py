"""Commands that ask every service: how CircleOSD is, and what was done with it."""

from collections.abc import Callable
from typing import Any

from circleosd.api import common
from circleosd.api.contract import Request, contract
from circleosd.errors import CircleError, Unavailable
from circleosd.paths import SERVICES
from circleosd.policy import Access

Ask = Callable[[str, dict[str, Any]], Any]


@contract
class Status(Request, action="status", access=Access.VIEWER, reply=list[common.Report]):
    """Show how each service of CircleOSD is."""


@contract
class History(common.History, action="history", access=Access.ADMIN, reply=list[common.Event]):
    """Show what was done, by whom, and how it ended, over all services in one order."""


CONTRACTS: tuple[type[Request], ...] = (Status, History)


def status(ask: Ask, request: dict[str, Any]) -> tuple[Any, CircleError | None]:
    """Each service's report; of one that cannot be asked the error. The first error is returned beside."""
    rows: list[dict[str, Any]] = []
    first: CircleError | None = None
    for service in SERVICES:
        try:
            rows.append({"state": "running", **ask(service, {"action": "health"})})
        except CircleError as error:
            rows.append({"service": service, "state": error.code, "problem": str(error)})
            first = first or error
    return rows, first


def history(ask: Ask, request: dict[str, Any]) -> tuple[Any, CircleError | None]:
    """The rows of all ledgers by time, at most `lines`. Of a service that cannot be asked, the error is returned
    beside.
    """
    rows: list[dict[str, Any]] = []
    first: CircleError | None = None
    for service in SERVICES:
        try:
            rows += ask(service, {**request, "action": "history"})
        except Unavailable as error:
            first = first or error
    rows.sort(key=lambda row: row["time"])
    return rows[-request.get("lines", 100) :], first


COMMANDS = {"status": status, "history": history}
