"""The registry's service manager: the system's or the user's systemd, over D-Bus (org.freedesktop.systemd1(5))."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from circleosd.errors import BadRequest, CircleError, Conflict, Denied, NotFound, Timeout, Unavailable
from circleosd.registry.units import LogLine, Scope, Switch, UnitManager, UnitState, Verb
from circleosd.systemd.buserrors import ErrorReply, Lost, Unheard, explained
from circleosd.systemd.names import (
    FROM_SYSTEMD,
    MANAGER,
    PROPERTIES,
    SYSTEMD,
    UNIT,
    UNIT_NAME,
    object_path,
    switch_unit,
)  # fmt: skip
from circleosd.systemd.states import absent, plain, state_of
from circleosd.systemd.watching import Watched, changes, differs

if TYPE_CHECKING:  # dbus-fast is imported at the first call: a registry asked for its health does not need it
    from dbus_fast import Message

    from circleosd.systemd.bus import Connection
    from circleosd.systemd.logs import Source

T = TypeVar("T")

RULE_MAKER = "circleosd-polkit.service"  # updates the polkit rule; the registry may start it
RULE_ARRIVAL = (0.0, 0.1, 0.2, 0.4)  # seconds between updating the rule and checking whether polkit has it
LOOK = 0.1  # seconds between checks of a job whose end will not be reported
RELOAD_TIMEOUT = 180.0  # seconds; systemctl's: generators, which systemd runs then, may take half of that
TRIES = 5  # of a lost call: systemd may be re-executed more than once in a row
METHODS: dict[Verb, str] = {
    "start": "StartUnit",
    "stop": "StopUnit",
    "restart": "RestartUnit",
    "reload": "ReloadUnit",
}
_JOB_REMOVED = f"{FROM_SYSTEMD},interface='{MANAGER[2]}',member='JobRemoved'"
_GONE = "systemd or the message bus went away"


class SystemdUnits(UnitManager):
    """A `UnitManager` for the units of `scope`; a job may take `timeout` seconds.

    Connects to the bus at the first call, and again after the bus or systemd went away.
    """

    def __init__(self, scope: Scope, *, timeout: float, env: Mapping[str, str] = os.environ) -> None:
        self.systemctl = "systemctl" if scope == "system" else "systemctl --user"
        self._scope = scope
        self._timeout = timeout
        self._env = env
        self._connecting = asyncio.Lock()
        self._connection: Connection | None = None

    async def states(self, units: Sequence[str]) -> list[UnitState]:
        """One round trip for any number of units, and for many concurrent callers: loading some thousand units that are
        not in memory takes systemd a good part of a second.
        """
        sent = [unit for unit in units if UNIT_NAME.fullmatch(unit)]
        rows = iter(await self._rows(sent) if sent else ())
        return [UnitState(unit, *next(rows)[1:5]) if UNIT_NAME.fullmatch(unit) else absent(unit) for unit in units]

    async def detail(self, unit: str) -> UnitState:
        """One round trip, and another one for the units that trigger it."""
        if not UNIT_NAME.fullmatch(unit):
            return absent(unit)
        properties = await self._properties(unit)
        state = state_of(unit, properties)
        triggers = await self.states(state.triggered_by)
        return state._replace(listening=any(trigger.active == "active" for trigger in triggers))

    async def listening(self, unit: str) -> list[str]:
        """For everything that `detail` returns, systemd needs 2 ms if the unit has just stopped."""
        triggers = await self._property(unit, "TriggeredBy")
        return [trigger.unit for trigger in await self.states(triggers) if trigger.active == "active"]

    async def stale(self, unit: str) -> bool:
        return bool(UNIT_NAME.fullmatch(unit)) and bool(await self._property(unit, "NeedDaemonReload"))

    async def matching(self, pattern: str) -> list[str]:
        rows = await self._ask(MANAGER, "ListUnitsByPatterns", "asas", [], [pattern])
        return sorted(row[0] for row in rows)

    async def job(self, verb: Verb, unit: str) -> str:
        """A job that takes too long is not canceled."""
        _check(unit)
        try:
            async with asyncio.timeout(self._timeout):
                return await self._allowed_job(verb, unit)
        except ErrorReply as error:
            raise await self._explained(verb, unit, error) from error
        except TimeoutError as exc:
            raise Timeout(f"the job to {verb} {unit} has not finished after {self._timeout:g} s; it continues") from exc

    async def _allowed_job(self, verb: Verb, unit: str) -> str:
        """Do a job; if the unit has just been cataloged, as soon as polkit has the new rule. Raises `ErrorReply`.

        The rule is requested each time: a service already writing it may have read the catalog before it changed.
        """
        for again in RULE_ARRIVAL:
            try:
                return await self._whole_job(verb, unit)
            except ErrorReply as error:
                if not error.refusal or self._scope == "user" or os.geteuid() == 0:
                    raise
                with suppress(ErrorReply, Lost, Unheard):  # there is none where the rule is made otherwise
                    await _job(await self._connected(), METHODS["start"], RULE_MAKER)
                await asyncio.sleep(again)
        return await self._whole_job(verb, unit)

    async def _whole_job(self, verb: Verb, unit: str) -> str:
        """Do a job and return its result, even if systemd was re-executed or the bus restarted meanwhile.

        If it is unclear whether the job exists, it is requested again unless there is one or it was done: doing a
        start, stop or reload twice is harmless, and a restart is visible in the unit's invocation.
        """
        before = (await self._properties(unit))["InvocationID"] if verb == "restart" else None
        for _ in range(TRIES):
            try:
                return await _job(await self._connected(), METHODS[verb], unit)
            except Unheard:
                return await self._unheard(verb, unit)
            except Lost:
                properties = await self._properties(unit)
                if properties["Job"][0] or (verb == "restart" and properties["InvocationID"] != before):
                    return await self._unheard(verb, unit)
        raise Unavailable(f"cannot tell whether there is a job to {verb} {unit}: {_GONE}")

    async def _unheard(self, verb: Verb, unit: str) -> str:
        """The result of a job whose end will not be reported: by the unit's state once it has ended."""
        while (properties := await self._properties(unit))["Job"][0]:
            await asyncio.sleep(LOOK)
        wanted = ("inactive", "failed") if verb == "stop" else ("active", "reloading", "inactive")
        return "done" if properties["ActiveState"] in wanted else "failed"

    async def switch(self, verb: Switch, unit: str) -> str:
        """polkit is not told which unit file a request is about (systemd 252), and the right to enable any unit file is
        equivalent to root. So if we are not root, we start a unit that does just this: `switch_unit`. NixOS has no such
        unit.
        """
        _check(unit)
        if self._scope == "system" and os.geteuid() != 0:
            switch = switch_unit(verb, unit)
            try:
                result = await self.job("start", switch)
            except NotFound as exc:
                template = f"circleosd-{verb}@.service"
                raise Conflict(
                    f"cannot {verb} {unit}: this host has no {template}; its configuration decides what starts at boot"
                ) from exc
            if result != "done":
                said = " | ".join(await self.log_tail(switch, 3)) or f"the result of {switch} is {result}"
                with suppress(ErrorReply, Lost, CircleError):  # otherwise the host's state would be degraded
                    await (await self._connected()).call(MANAGER, "ResetFailedUnit", "s", [switch])
                raise Conflict(f"cannot {verb} {unit}: {said}")
        else:
            await self._switch(verb, unit)
        try:
            state = await self.enabled(unit)
        except NotFound:
            if verb == "enable":
                raise
            state = "not-found"  # as systemctl(1) has it; disabling removed the link that was all there is of the unit
        if verb == "enable" and state == "static":
            raise Conflict(f"cannot enable {unit}: it has no [Install] section")
        return state

    async def _switch(self, verb: Switch, unit: str) -> None:
        """Enable or disable a unit file and make systemd reload, as systemctl(1) does."""

        async def work(connection: Connection) -> None:
            if verb == "enable":
                await connection.call(MANAGER, "EnableUnitFiles", "asbb", [[unit], False, False])
            else:
                await connection.call(MANAGER, "DisableUnitFiles", "asb", [[unit], False])
            await connection.call(MANAGER, "Reload", timeout=RELOAD_TIMEOUT)

        await self._repeated(f"{verb} {unit}", work)

    async def enabled(self, unit: str) -> str:
        _check(unit)
        return str(await self._ask(MANAGER, "GetUnitFileState", "s", unit))

    async def watch(self, units: Sequence[str], pattern: str = "") -> AsyncGenerator[UnitState, None]:
        """Does not poll."""
        shown: dict[str, UnitState] = {}
        watched = Watched()
        in_vain = 0  # connections in a row that reported no unit
        while True:
            try:
                async with aclosing(changes(await self._connected(), watched, units, pattern)) as states:
                    async for state in states:
                        in_vain = 0
                        if differs(state, shown.get(state.unit)):
                            shown[state.unit] = state
                            yield state
            except ErrorReply as error:
                raise explained("watch units", error) from error
            except Lost as exc:
                in_vain += 1
                if in_vain == TRIES:
                    raise Unavailable(f"cannot watch units: {_GONE}") from exc
                watched.missed = True

    async def log_tail(self, unit: str, lines: int) -> list[str]:
        from circleosd.systemd import logs

        properties = await self._properties(unit)
        state = state_of(unit, properties)
        # A unit that waits for a restart has left the state inactive for that: take the time of its process instead.
        began = (state.waits and properties["ExecMainStartTimestamp"]) or properties["InactiveExitTimestamp"]
        invocation = bytes(properties["InvocationID"]).hex()
        if not began or not invocation:
            return []
        ended = state.waits or state.active in ("failed", "inactive")
        source = self._source(properties)
        return await asyncio.to_thread(logs.of_run, source, began / 1e6, invocation, lines, ended=ended)

    async def logs(self, unit: str, lines: int, since: float | None = None) -> list[LogLine]:
        from circleosd.systemd import logs

        _check(unit)
        return await asyncio.to_thread(logs.tail, await self._logged_as(unit), lines, since)

    async def follow(self, unit: str, lines: int, since: float | None = None) -> AsyncGenerator[LogLine, None]:
        from circleosd.systemd import logs

        _check(unit)
        async with aclosing(logs.follow(await self._logged_as(unit), lines, since)) as found:
            async for line in found:
                yield line

    async def close(self) -> None:
        """Leave the bus."""
        if self._connection:
            await self._connection.close()

    async def _connected(self) -> Connection:
        from circleosd.systemd import bus

        async with self._connecting:
            for _ in range(2):  # lets the event loop check the socket, and then handle its end
                await asyncio.sleep(0)
            if self._connection is None or self._connection.lost:
                self._connection = await bus.connect(bus_address(self._scope, self._env))
            return self._connection

    async def _rows(self, units: Sequence[str]) -> Any:
        """What systemd lists of `units`."""

        async def ask(connection: Connection) -> Message:
            if len(units) == 1:
                return await connection.call(MANAGER, "ListUnitsByNames", "as", [units])
            return (await connection.list_units(units))[1]

        return (await self._repeated("ask systemd", ask)).body[0]

    async def _ask(self, target: tuple[str, str, str], member: str, signature: str, *body: Any) -> Any:
        reply = await self._repeated("ask systemd", lambda connection: connection.call(target, member, signature, body))
        return reply.body[0]

    async def _repeated(self, doing: str, work: Callable[[Connection], Awaitable[T]]) -> T:
        """The result of `work`, which is repeated if the connection is lost: it may be done twice."""
        for _ in range(TRIES):
            try:
                return await work(await self._connected())
            except ErrorReply as error:
                raise explained(doing, error) from error
            except Lost:
                continue
        raise Unavailable(f"cannot {doing}: {_GONE}")

    async def _explained(self, verb: Verb, unit: str, error: ErrorReply) -> CircleError:
        meaning = explained(f"{verb} {unit}", error)
        if isinstance(meaning, Denied) and (name := (await self._properties(unit))["Id"]) != unit:
            return Denied(f"{meaning}; {unit} is an alias of {name}, which the catalog must use instead")
        return meaning

    async def _logged_as(self, unit: str) -> Source:
        """The name under which a unit logs: the journal does not know aliases, but can be read without the bus."""
        try:
            return self._source(await self._properties(unit))
        except Unavailable:
            return self._source({"Id": unit})

    def _source(self, properties: Mapping[str, Any]) -> Source:
        from circleosd.systemd.logs import Source

        return Source(properties["Id"], self._scope, properties.get("LogNamespace", ""))

    async def _property(self, unit: str, name: str) -> Any:
        return (await self._ask((SYSTEMD, object_path(unit), PROPERTIES), "Get", "ss", UNIT, name)).value

    async def _properties(self, unit: str) -> dict[str, Any]:
        return plain(await self._ask((SYSTEMD, object_path(unit), PROPERTIES), "GetAll", "s", ""))


async def _job(connection: Connection, method: str, unit: str) -> str:
    """Start a job and wait for its JobRemoved, which may come before the reply that names the job."""
    async with connection.signals([_JOB_REMOVED], lambda signal: signal.member == "JobRemoved", keep=True) as removed:
        job = (await connection.call(MANAGER, method, "ss", [unit, "replace"])).body[0]
        while signal := await removed.get():
            _number, path, _unit, result = signal.body
            if path == job:
                return str(result)
    raise Unheard


def bus_address(scope: Scope, env: Mapping[str, str]) -> str:
    """The address of the bus of the scope's systemd. Raises `Unavailable` if it cannot be determined."""
    if scope == "system":
        return env.get("DBUS_SYSTEM_BUS_ADDRESS") or "unix:path=/run/dbus/system_bus_socket"
    if address := env.get("DBUS_SESSION_BUS_ADDRESS"):
        return address
    if runtime := env.get("XDG_RUNTIME_DIR"):
        return f"unix:path={quote(f'{runtime}/bus')}"
    raise Unavailable("cannot find the user's message bus: XDG_RUNTIME_DIR is not set; log in with a systemd session")


def _check(unit: str) -> None:
    if not UNIT_NAME.fullmatch(unit):
        raise BadRequest(f"{unit[:64]!r} is not the name of a unit")
