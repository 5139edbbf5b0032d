"""Contracts of service-registry: names, the systemd units behind them, and what is done to those."""

from typing import Annotated, TypedDict

from circleosd.api.common import EVERYWHERE
from circleosd.api.contract import Between, Doc, Effect, Length, Mark, Pattern, Request, contract
from circleosd.policy import Access

SERVICE = "service-registry"
GROUP = "service"
MAX_LINES = 2000  # of one answer from the journal: with the longest lines at most 4 MiB of ASCII

ServiceName = Annotated[
    str,
    Doc("the service's name in the catalog"),
    Pattern(r"[a-zA-Z0-9][a-zA-Z0-9_.@:-]{0,127}", "a service name: ASCII letters, digits and _ . @ : -, at most 128"),
]
OnBehalf = Annotated[
    str | None,
    Doc("the plugin for which plugin-manager acts; nobody else may say so"),
    Length(1, 64),
    Mark.HIDDEN,
]


class Service(TypedDict):
    """A cataloged service and the state of its unit, in systemd's words (systemctl(1))."""

    name: str
    state: str
    sub: str
    description: str
    unit: str


class ServiceStatus(Service):
    """One service in detail. Times in seconds since the epoch, memory in bytes; None is unknown or not applicable.

    `enabled` is what it is in `Enabled`.
    """

    enabled: str | None
    since: float | None
    pid: int | None
    memory: int | None
    restarts: int | None
    result: str | None
    exit_status: int | None
    signal: str | None
    triggered_by: list[str]
    listening: bool


class Job(TypedDict):
    """How a job ended: the job's result and the state that it left the unit in."""

    name: str
    unit: str
    result: str
    state: str
    sub: str


class Enabled(TypedDict):
    """Whether a service starts at boot: the state of its unit file, in systemd's words (systemctl(1), is-enabled)."""

    name: str
    unit: str
    enabled: str


class LogLine(TypedDict):
    """One line of a log; time in seconds since the epoch."""

    time: float
    text: str


@contract
class ListServices(Request, action="list", access=Access.VIEWER, reply=list[Service], rows="name"):
    """List the services and their states."""

    on_behalf: OnBehalf = None


@contract
class Status(Request, action="status", access=Access.VIEWER, reply=ServiceStatus, object="name"):
    """Show one service in detail."""

    name: ServiceName
    on_behalf: OnBehalf = None


@contract
class Start(Request, action="start", access=Access.OPERATOR, reply=Job, effect=Effect.EXTERNAL, object="name"):
    """Start a service and wait until it runs or failed."""

    name: ServiceName


@contract
class Stop(Request, action="stop", access=Access.OPERATOR, reply=Job, effect=Effect.EXTERNAL, object="name"):
    """Stop a service and wait until it is gone."""

    name: ServiceName


@contract
class Restart(Request, action="restart", access=Access.OPERATOR, reply=Job, effect=Effect.EXTERNAL, object="name"):
    """Stop a service if it runs, then start it."""

    name: ServiceName
    on_behalf: OnBehalf = None
    called_by: Annotated[
        str | None, Doc("whose call of the plugin this is, for the record"), Length(1, 256), Mark.HIDDEN
    ] = None


@contract
class Reload(Request, action="reload", access=Access.OPERATOR, reply=Job, effect=Effect.EXTERNAL, object="name"):
    """Have a running service read its configuration again."""

    name: ServiceName


@contract
class Enable(Request, action="enable", access=Access.ADMIN, reply=Enabled, effect=Effect.EXTERNAL, object="name"):
    """Have a service start at boot."""

    name: ServiceName


@contract
class Disable(Request, action="disable", access=Access.ADMIN, reply=Enabled, effect=Effect.EXTERNAL, object="name"):
    """No longer have a service start at boot."""

    name: ServiceName


@contract
class Logs(Request, action="logs", access=Access.OPERATOR, reply=list[LogLine], object="name", stream=True):
    """Show what a service logged; a stream of lines with follow."""

    name: ServiceName
    lines: Annotated[int, Doc(f"the last so many, {MAX_LINES} at most"), Between(0, MAX_LINES), Mark.OPTION] = 50
    since: Annotated[float | None, Doc("none older than this time"), Mark.TIME, Mark.OPTION] = None
    follow: Annotated[bool, Doc("go on with what it logs from now on, until interrupted"), Mark.OPTION] = False


@contract
class Watch(
    Request, action="watch", access=Access.VIEWER, reply=list[Service], object="name", rows="name", stream=True
):
    """Show the state of a service, or of all cataloged by now and of plugins as they load, then every change."""

    name: Annotated[ServiceName | None, Doc("only this service")] = None


CONTRACTS: tuple[type[Request], ...] = (
    ListServices, Status, Start, Stop, Restart, Reload, Enable, Disable, Logs, Watch, *EVERYWHERE,
)  # fmt: skip
