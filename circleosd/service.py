"""From contract to handler: one line in, one reply (or a stream of them) out.

The order for every request: decode, identify the caller, authorize, validate the parameters, execute, record. This is
the only gate: a handler runs only for callers who may do what they ask, and listings contain only what they may see.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from circleosd import __version__, wire
from circleosd.api.common import EVERYWHERE, Audit, Audited, Event, Follow, Health, History, Report
from circleosd.api.contract import Effect, Mark, Request, completed, parameters
from circleosd.deadlines import Deadlines
from circleosd.errors import BadRequest, CircleError, Denied, Internal, Timeout, Unavailable, UnknownAction, shortage
from circleosd.handlers import Act, Files, Handlers, Identify
from circleosd.ledger import Ledger, shown
from circleosd.policy import Access, Caller, Peer, authorize, sees

log = logging.getLogger(__name__)

PART = 200  # items of a list that are encoded at once, in some milliseconds


class Endpoint:
    """A contract and its handler. `verb` is the action's name in rules."""

    def __init__(self, contract: type[Request], handler: Any, verb: str) -> None:
        self.contract = contract
        self.handler = handler
        self.verb = verb

    @cached_property
    def secrets(self) -> frozenset[str]:
        """The parameters that must not be stored in rows. Determined for the first row, not at the start."""
        return frozenset(item.name for item in parameters(self.contract) if Mark.SECRET in item.marks)

    def claimed(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What to store of parameters that were not validated: short texts and numbers that a user may have given."""
        known = {item.name for item in parameters(self.contract) if not item.marks & {Mark.SECRET, Mark.HIDDEN}}
        return {key: shown(value) for key, value in params.items() if key in known and _is_short(value)}


class Service:
    """The actions of one service.

    `identify` turns a peer and its token into a caller, and raises `Denied` for a token without a valid session.
    `request_timeout` is in seconds; it does not apply to streams.
    """

    def __init__(
        self,
        name: str,
        group: str,
        contracts: Sequence[type[Request]],
        handlers: Handlers,
        *,
        identify: Identify,
        ledger: Ledger,
        request_timeout: float,
    ) -> None:
        self.name = name
        self.requests = 0
        self._handlers = handlers
        self._identify = identify
        self._ledger = ledger
        self._timeout = request_timeout
        self._deadlines = Deadlines(request_timeout)
        self._validators: dict[str, Callable[[Any], Any]] = {}
        self._endpoints: dict[str, Endpoint] = {}
        for contract in contracts:
            handler = getattr(self if contract in EVERYWHERE else handlers, contract.action)
            self._endpoints[contract.action] = Endpoint(contract, handler, f"{group}:{contract.action}")
        # Actions that a rule can allow on one object; a rule about any of these shows the object in listings.
        self._object_verbs = frozenset(item.verb for item in self._endpoints.values() if item.contract.takes_rules())
        self.connections: Callable[[], int] = lambda: 0
        self._started = time.monotonic()

    async def start(self) -> None:
        """Complete the record of acts interrupted by the end of the last process. Call before serving."""
        if intents := await self._ledger.unfinished():
            from circleosd.recovery import complete  # most starts need none of it

            await complete(self.name, intents, self._handlers, self._ledger)

    def busy(self) -> bool:
        """Whether something is under way that no connection waits for."""
        return self._handlers.busy()

    async def close(self) -> None:
        """Write data that is only in memory."""
        for close in (self._handlers.close, self._ledger.close):
            try:
                await close()
            except CircleError as error:
                log.error("data that was only in memory is lost: %s", error)
            except Exception:
                log.exception("data that was only in memory is lost")

    async def dispatch(self, line: bytes, peer: Peer, files: Files) -> bytes | AsyncGenerator[bytes, None]:
        """Execute the request in `line`; return the reply line, or an iterator of reply lines for a stream.

        Raises only the exceptions that end a task or the process.
        """
        tag: object = wire.ABSENT
        self.requests += 1
        try:
            request = wire.decode_request(line)
            tag = wire.tag_of(request)
            envelope = wire.envelope(request)
            endpoint = self._endpoints.get(envelope.action)
            if endpoint is None:
                raise UnknownAction(f"{self.name} has no action {envelope.action[:64]!r}")
            act, parsed = await self._admit(endpoint, envelope, peer, files)
            data = await self._in_time(endpoint, parsed, act)
            if endpoint.contract.stream and isinstance(data, AsyncGenerator):
                return self._stream(endpoint, act, data, tag)
            if isinstance(data, list) and len(data) > PART:
                return wire.success_of_parts(await _in_parts(data), message=act.message, tag=tag)
            return wire.success(data, message=act.message, tag=tag)
        except CircleError as error:
            return wire.failure(error, tag=tag)
        except (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as exc:  # a panic of pydantic-core (pyo3) is not an Exception
            if isinstance(told := _error_of(exc), Internal):
                log.exception("a request failed")
            return wire.failure(told, tag=tag)

    async def _admit(self, endpoint: Endpoint, envelope: wire.Envelope, peer: Peer, files: Files) -> tuple[Act, Any]:
        """Identify, authorize, validate. Raises the error for the caller; a denial has been recorded by then."""
        contract = endpoint.contract
        value = envelope.params.get(contract.object_field) if contract.object_field else None
        # Not validated yet, and part of the message of a denial: the cut is longer than any valid name.
        name = shown(value) if isinstance(value, str) else None
        gate = partial(self._authorize, endpoint)
        act = Act(self._ledger, Caller(peer), envelope.token, contract, name, files, self._identify, gate)
        try:
            act.caller = await self._identify(peer, envelope.token)  # known even if the next line refuses
            act.caller = _speaker(act.caller, envelope.params)
            if contract.own_object and value is None:
                act.object = name = act.caller.user
            self._authorize(endpoint, act.caller, name)
        except Denied as error:
            if contract.access is Access.ANYONE:
                # A login with an invalid token: nobody has looked up the name, which may be a password.
                act.object = None
            elif contract.effect is not Effect.NONE:
                act.params = endpoint.claimed(envelope.params)
            if _matters(contract):
                await act.refuse("denied", error)
            raise
        parsed = self._validate(contract, envelope.params)
        if contract.effect is not Effect.NONE:  # otherwise there will be no row
            act.params = {key: shown(value) for key, value in envelope.params.items() if key not in endpoint.secrets}
        return act, parsed

    def _authorize(self, endpoint: Endpoint, caller: Caller, name: str | None) -> None:
        """Raises `Denied` unless `caller` may do this to the object `name`."""
        contract = endpoint.contract
        authorize(
            caller,
            contract.access,
            endpoint.verb,
            None if contract.claimed_object else name,
            own=contract.own_object,
            among=self._object_verbs if contract.row_field else (),
        )

    def _shows(self, endpoint: Endpoint, caller: Caller, row: Any) -> bool:
        """Whether `caller` may see this row of a listing; always true if it is not a listing."""
        field = endpoint.contract.row_field
        if field is None:
            return True
        return sees(caller, endpoint.contract.access, endpoint.verb, row[field], among=self._object_verbs)

    def _validate(self, contract: type[Request], params: dict[str, Any]) -> Any:
        """The request as its contract. A start for one without parameters need not wait for the validators."""
        if not params and not contract.has_fields():
            return contract.__new__(contract)
        validate = self._validators.get(contract.action)
        if validate is None:
            from circleosd.validation import validator

            validate = self._validators[contract.action] = validator(completed(contract)).validate_python
        try:
            return validate(params)
        except ValueError as exc:  # its ValidationError
            raise BadRequest(_sentence(contract, exc)) from exc

    async def _in_time(self, endpoint: Endpoint, parsed: Any, act: Act) -> Any:
        """Execute the request. Raises `Timeout` if it is not done within `request_timeout`."""
        task = asyncio.current_task()
        assert task is not None
        self._deadlines.begin(task, lambda: act.done)
        try:
            return await self._carry_out(endpoint, parsed, act)
        except asyncio.CancelledError:
            if self._deadlines.end(task):
                raise self._too_late(act) from None
            raise
        finally:
            self._deadlines.end(task)

    async def _carry_out(self, endpoint: Endpoint, parsed: Any, act: Act) -> Any:
        """Run the handler and make sure that the ledger is written."""
        contract = endpoint.contract
        effect = contract.effect
        try:
            if effect is Effect.EXTERNAL:
                await self._intend(parsed, act)
            act.begun = True
            result = await endpoint.handler(parsed, act)
        except BaseException as exc:
            error = self._failure(exc, act)
            denied = isinstance(error, Denied) and _matters(contract)
            if error and (denied or effect is not Effect.NONE) and not act.done:
                act.done = True
                if act.intent:
                    await _conclude(act, error)
                else:
                    await act.refuse("denied" if denied else "failed", error)
            raise
        if effect is Effect.EXTERNAL:
            act.done = True
            await _conclude(act)
        elif effect is Effect.STATE and not act.done:
            raise AssertionError(f"{endpoint.verb} changed state without a row in the ledger")
        if contract.row_field and not isinstance(result, AsyncGenerator):
            return [row for row in result if self._shows(endpoint, act.caller, row)]
        return result

    async def _intend(self, parsed: Any, act: Act) -> None:
        """Record an intent, and determine the previous state meanwhile."""
        self._handlers.check(parsed, act)  # floods of denials are counted, whereas an intent always has its row
        looking = asyncio.create_task(self._handlers.look(parsed, act))
        try:
            await act.intend()
            if (task := asyncio.current_task()) and task.cancelling():  # the write ignored that
                raise asyncio.CancelledError
            await looking
        except BaseException:
            looking.cancel()
            raise

    def _failure(self, exc: BaseException, act: Act) -> CircleError | None:
        """The error to record; None if the end of the service cut off what had begun: its next start finds out more."""
        if not isinstance(exc, asyncio.CancelledError):
            return _error_of(exc)
        task = asyncio.current_task()
        if task and self._deadlines.late(task):
            return self._too_late(act)
        return None if act.begun else Unavailable(f"{self.name} ended before this began")

    def _too_late(self, act: Act) -> Timeout:
        """The error of an act whose time has run out."""
        within = f"within {self._timeout:g} s (server.request_timeout)"
        return Timeout(f"not done {within}; what was started may continue" if act.begun else f"not begun {within}")

    async def _stream(
        self, endpoint: Endpoint, act: Act, items: AsyncGenerator[Any, None], tag: object
    ) -> AsyncGenerator[bytes, None]:
        """Each item as a reply with `more`, and a last one with null; an error ends the stream.

        A stream outlives the initial reply, so the caller's rights are checked again for each item.
        """
        try:
            async with contextlib.aclosing(items):
                async for item in items:
                    await act.renew()
                    if self._shows(endpoint, act.caller, item):
                        yield wire.success(item, tag=tag, more=True)
            yield wire.success(None, tag=tag)
        except CircleError as error:
            yield wire.failure(error, tag=tag)
        except Exception as exc:
            if isinstance(told := _error_of(exc), Internal):
                log.exception("a stream failed")
            yield wire.failure(told, tag=tag)

    # the actions of every service

    async def health(self, request: Health, act: Act) -> Report:
        with open("/proc/self/statm", encoding="utf-8") as statm:
            pages = int(statm.read().split()[1])
        return Report(
            service=self.name,
            version=__version__,
            pid=os.getpid(),
            uptime=round(time.monotonic() - self._started, 3),
            memory=pages * os.sysconf("SC_PAGE_SIZE"),
            connections=self.connections(),
            requests=self.requests,
        )

    async def history(self, request: History, act: Act) -> list[Event]:
        return await self._ledger.history(request)

    async def follow(self, request: Follow, act: Act) -> AsyncGenerator[Event, None]:
        return self._ledger.follow(request)

    async def audit(self, request: Audit, act: Act) -> Audited:
        return await self._ledger.audit()


def _speaker(caller: Caller, params: dict[str, Any]) -> Caller:
    """The caller, or the plugin on whose behalf it acts. Raises `Denied` for a caller who may not act for plugins."""
    plugin = params.get("on_behalf")
    if (isinstance(plugin, str) or params.get("called_by") is not None) and not caller.vouches:
        raise Denied(f"only CircleOSD itself may act on behalf of a plugin, not {caller}")
    return caller._replace(plugin=plugin[:64]) if isinstance(plugin, str) else caller


def _is_short(value: Any) -> bool:
    """Whether this is a text, which `shown` cuts, or a number without thousands of digits, which JSON allows."""
    return isinstance(value, str) or (isinstance(value, int) and value.bit_length() < 64)


def _matters(contract: type[Request]) -> bool:
    """Whether a denied attempt is recorded: at a change, or at what takes more than the lowest role."""
    return contract.effect is not Effect.NONE or contract.access in (Access.OPERATOR, Access.ADMIN)


async def _in_parts(items: list[Any]) -> list[bytes]:
    """A long list, encoded so that other requests get a turn."""
    parts = []
    for start in range(0, len(items), PART):
        parts.append(wire.items(items[start : start + PART]))
        await asyncio.sleep(0)
    return parts


async def _conclude(act: Act, error: CircleError | None = None) -> None:
    """Record how an act outside the database ended. Raises the error of writing, which then also tells that."""
    try:
        await act.conclude(error)
    except CircleError as exc:
        how = f"it failed: {error}" if error else "it was carried out"
        raise type(exc)(f"{how}, but that is not on record yet: {exc}") from exc


def _error_of(exc: BaseException) -> CircleError:
    """The error that the caller is told, and that the ledger records, for an exception."""
    if isinstance(exc, CircleError):
        return exc
    if isinstance(exc, TimeoutError):
        return Timeout("not done in the time allowed")
    return shortage(exc) or Internal("an internal error; the service's log has the details")


def _sentence(contract: type[Request], exc: Any) -> str:
    """The first error in a request's parameters, in words."""
    from circleosd.validation import first_wrong

    kind, place, what = first_wrong(exc)
    where = ".".join(str(part) for part in place if not isinstance(part, int) or part)
    match kind:
        case "missing":
            return f"{contract.action} needs the parameter {where}"
        case "unexpected_keyword_argument":
            known = ", ".join(item.name for item in parameters(contract)) or "none"
            return f"{contract.action} has no parameter {where[:64]!r}; it has: {known}"
        case _:
            return f"{where}: {what}"
