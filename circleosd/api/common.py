"""Actions that every service has."""

from typing import Annotated, Any, TypedDict

from circleosd.api.contract import Between, Doc, Length, Mark, Request, contract
from circleosd.policy import Access


class Report(TypedDict):
    """How a service is. Times in seconds, memory in bytes."""

    service: str
    version: str
    pid: int
    uptime: float
    memory: int
    connections: int
    requests: int


class Event(TypedDict):
    """One row of the ledger; see circleosd/ledger.py for its fields."""

    service: str
    seq: int
    time: float
    phase: str
    actor: dict[str, Any]
    action: str
    object: str | None
    params: dict[str, Any]
    before: Any
    after: Any
    error: str | None
    message: str | None
    duration: float | None
    intent: int | None


@contract
class Health(Request, action="health", access=Access.VIEWER, reply=Report, command=None):
    """Tell how the service is: version, process, memory, connections."""


@contract
class History(Request, action="history", access=Access.ADMIN, reply=list[Event], command=None):
    """Show what was done, by whom, and how it ended."""

    user: Annotated[str | None, Doc("only acts of this CircleOSD user"), Length(1, 64), Mark.OPTION] = None
    object: Annotated[str | None, Doc("only acts on this object"), Length(1, 256), Mark.OPTION] = None
    action_name: Annotated[str | None, Doc("only this action"), Length(1, 64), Mark.OPTION] = None
    since: Annotated[float | None, Doc("only acts since this time"), Mark.TIME, Mark.OPTION] = None
    failed: Annotated[bool, Doc("only acts that failed or were denied"), Mark.OPTION] = False
    lines: Annotated[int, Doc("at most this many, the newest"), Between(1, 10_000), Mark.OPTION] = 100
