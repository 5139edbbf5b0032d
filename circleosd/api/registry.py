"""Contracts of service-registry: names, the systemd units behind them, and actions on those."""

from typing import Annotated, TypedDict

from circleosd.api.common import EVERYWHERE
from circleosd.api.contract import Between, Doc, Effect, Length, Mark, Pattern, Request, contract
from circleosd.policy import Access

SERVICE = "service-registry"
GROUP = "service"
MAX_LINES = 2000  # of one answer from the journal: with the longest lines at most 4 MiB of ASCII

SERVICE_NAME = r"[a-zA-Z0-9][a-zA-Z0-9_.@:-]{0,127}"
ServiceName = Annotated[
    str,
    Doc("the service's name in the catalog"),
    Pattern(
        SERVICE_NAME,
        "a service name: an ASCII letter or digit, then those or _ . @ : -, at most 128 characters",
    ),
]
OnBehalf = Annotated[
    str | None,
    Doc("the plugin on whose behalf plugin-manager acts; reserved for plugin-manager"),
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
    """Start a service and wait until it is running or has failed."""

    name: ServiceName


@contract
class Stop(Request, action="stop", access=Access.OPERATOR, reply=Job, effect=Effect.EXTERNAL, object="name"):
    """Stop a service and wait until it has stopped."""

    name: ServiceName


@contract
class Restart(Request, action="restart", access=Access.OPERATOR, reply=Job, effect=Effect.EXTERNAL, object="name"):
    """Stop a service if it is running, then start it."""

    name: ServiceName
    on_behalf: OnBehalf = None
    called_by: Annotated[str | None, Doc("who called the plugin, for the record"), Length(1, 256), Mark.HIDDEN] = None


@contract
class Reload(Request, action="reload", access=Access.OPERATOR, reply=Job, effect=Effect.EXTERNAL, object="name"):
    """Make a running service reload its configuration."""

    name: ServiceName


@contract
class Enable(Request, action="enable", access=Access.ADMIN, reply=Enabled, effect=Effect.EXTERNAL, object="name"):
    """Make a service start at boot."""

    name: ServiceName


@contract
class Disable(Request, action="disable", access=Access.ADMIN, reply=Enabled, effect=Effect.EXTERNAL, object="name"):
    """Stop a service from starting at boot."""

    name: ServiceName


@contract
class Logs(Request, action="logs", access=Access.OPERATOR, reply=list[LogLine], object="name", stream=True):
    """Show the log of a service."""

    name: ServiceName
    lines: Annotated[
        int, Doc(f"only the last so many lines, up to {MAX_LINES}"), Between(0, MAX_LINES), Mark.OPTION
    ] = 50
    since: Annotated[float | None, Doc("only lines since this time"), Mark.TIME, Mark.OPTION] = None
    follow: Annotated[bool, Doc("keep printing new lines until interrupted"), Mark.OPTION] = False


@contract
class Watch(
    Request, action="watch", access=Access.VIEWER, reply=list[Service], object="name", rows="name", stream=True
):
    """Show the state of a service, or of all services and plugins, then every change until interrupted.

    Services that are added to the catalog later are not included.
    """

    name: Annotated[ServiceName | None, Doc("only this service")] = None


CONTRACTS: tuple[type[Request], ...] = (
    ListServices, Status, Start, Stop, Restart, Reload, Enable, Disable, Logs, Watch, *EVERYWHERE,
)  # fmt: skip
