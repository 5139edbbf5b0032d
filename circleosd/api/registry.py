"""Contracts of service-registry: names, the systemd units behind them, and what is done to those."""

from typing import Annotated, TypedDict

from circleosd.api.common import Health, History
from circleosd.api.contract import Doc, Effect, Pattern, Request, contract
from circleosd.policy import Access

SERVICE = "service-registry"
GROUP = "service"

ServiceName = Annotated[
    str,
    Doc("the service's name in the catalog"),
    Pattern(r"[a-zA-Z0-9][a-zA-Z0-9_.@:-]{0,127}", "a service name: letters, digits and _ . @ : -, at most 128"),
]


class Service(TypedDict):
    """A cataloged service and the state of its unit, in systemd's words (systemctl(1))."""

    name: str
    state: str
    sub: str
    description: str
    unit: str


class ServiceStatus(Service):
    """One service in detail. Times in seconds since the epoch, memory in bytes; None is unknown or not applicable."""

    since: float | None
    pid: int | None
    memory: int | None
    restarts: int | None
    result: str | None
    exit_status: int | None
    triggered_by: list[str]
    listening: bool


class Job(TypedDict):
    """How a job ended: the job's result and the state that it left the unit in."""

    name: str
    unit: str
    result: str
    state: str
    sub: str
    pid: int | None


@contract
class ListServices(Request, action="list", access=Access.VIEWER, reply=list[Service]):
    """List the services and their states."""


@contract
class Status(Request, action="status", access=Access.VIEWER, reply=ServiceStatus, object="name"):
    """Show one service in detail."""

    name: ServiceName


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


CONTRACTS: tuple[type[Request], ...] = (ListServices, Status, Start, Stop, Restart, Health, History)
