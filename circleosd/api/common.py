"""Actions that every service has."""

from typing import Annotated, Any, TypedDict

from circleosd.api.contract import Between, Doc, Flag, Length, Mark, Request, contract
from circleosd.policy import Access


class Report(TypedDict):
    """The state of a service. Times in seconds, memory in bytes."""

    service: str
    version: str
    pid: int
    uptime: float
    memory: int
    connections: int
    requests: int


class Event(TypedDict):
    """One row of the ledger; see circleosd/ledger.py for its fields. `count`: how many attempts it stands for."""

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
    count: int


class Audited(TypedDict):
    """The result of verifying a ledger's chain: its rows, the hash of the last one, and in words what is wrong."""

    service: str
    rows: int
    first: int
    last: int
    hash: str
    problems: list[str]


@contract
class Health(Request, action="health", access=Access.VIEWER, reply=Report, command=None):
    """Show the state of the service: version, process, memory, connections."""


UserOrUid = Annotated[str | None, Doc("only acts of this user or uid"), Length(1, 64), Mark.OPTION]
ObjectOrGlob = Annotated[str | None, Doc("only acts on this object; may be a glob"), Length(1, 256), Mark.OPTION]
# On the wire, the name `action` is taken by the envelope.
ActionName = Annotated[str | None, Doc("only this action"), Length(1, 64), Mark.OPTION, Flag("action")]
Since = Annotated[float | None, Doc("only acts since this time"), Mark.TIME, Mark.OPTION]
Failed = Annotated[bool, Doc("only acts that failed or were denied"), Mark.OPTION]


@contract
class History(Request, action="history", access=Access.ADMIN, reply=list[Event], command=None):
    """Show what was done, by whom, and how it ended."""

    user: UserOrUid = None
    object: ObjectOrGlob = None
    action_name: ActionName = None
    since: Since = None
    failed: Failed = False
    lines: Annotated[int, Doc("only the last so many acts"), Between(0, 10_000), Mark.OPTION] = 100


@contract
class Follow(Request, action="follow", access=Access.ADMIN, reply=Event, command=None, stream=True):
    """Show what is done, as it is done: the rows after the row `after`, until the caller disconnects."""

    after: Annotated[int, Doc("the number of the last known row"), Between(0, 2**62)] = 0
    user: UserOrUid = None
    object: ObjectOrGlob = None
    action_name: ActionName = None
    since: Since = None
    failed: Failed = False


@contract
class Audit(Request, action="audit", access=Access.ADMIN, reply=Audited, command=None):
    """Check that no row of the ledger was altered, deleted or inserted."""


EVERYWHERE: tuple[type[Request], ...] = (Health, History, Follow, Audit)
