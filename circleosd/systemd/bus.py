"""One connection to a message bus: calls, error replies, and systemd's signals in order (D-Bus Specification)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from dbus_fast import Message, MessageFlag, MessageType
from dbus_fast.aio import MessageBus

from circleosd.errors import Timeout, Unavailable
from circleosd.systemd.buserrors import NO_REPLY, ErrorReply, Lost
from circleosd.systemd.names import MANAGER, SYSTEMD

log = logging.getLogger(__name__)

DAEMON = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
OWNER_CHANGED = f"type='signal',sender='{DAEMON[0]}',member='NameOwnerChanged',arg0='{SYSTEMD}'"
CALL_TIMEOUT = 25.0  # seconds; libdbus's default
ARRIVAL = 5.0  # seconds for systemd to appear on a bus that has just started; measured: under 80 ms
# Bytes of calls that are waiting for their replies. If the socket cannot take more immediately, dbus-fast closes the
# connection (issue 153 of python-dbus-next, of which it is a fork); a socket takes some 200 KiB (net.core.wmem_default,
# socket(7)). The bus also refuses more than 128 calls (max_replies_per_connection, dbus-daemon(1)).
IN_FLIGHT = 64 * 1024
CALL_SIZE = 1024  # of these per call, besides its texts
MAX_WAITING = 1000  # signals that a slow reader may leave unread; one has some twenty values


class Connection:
    """A connection to systemd, valid until it is `lost`; then every call and every waiting reader gets `Lost`."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus
        self._systemd = ""  # unique name of the peer whose signals are accepted
        self._found = asyncio.Event()
        self._readers: set[Callable[[Message | None], None]] = set()
        self._replies: dict[int, asyncio.Future[Message | None]] = {}  # by the call's serial; None: lost
        self._in_flight = 0
        self._in_line = asyncio.Lock()
        self._answered = asyncio.Event()
        self._next: dict[tuple[str, ...], asyncio.Task[tuple[float, Message]]] = {}  # lists that will be requested
        self._asked: dict[tuple[str, ...], asyncio.Task[tuple[float, Message]]] = {}  # and those that wait for answers
        self._matches: Counter[str] = Counter()
        self._kept: set[str] = set()  # permanent match rules
        self._preparing = asyncio.Lock()
        self._subscribed = False
        self._finished = False
        bus.add_message_handler(self._receive)
        self._end: asyncio.Task[None] = asyncio.create_task(bus.wait_for_disconnect())  # type: ignore[no-untyped-call]  # by dbus-fast
        self._end.add_done_callback(self._ended)

    @property
    def lost(self) -> bool:
        """Whether it cannot be used any more."""
        return self._finished or not self._bus.connected

    async def call(
        self,
        target: tuple[str, str, str],
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        timeout: float | None = None,
    ) -> Message:
        """Call a method of `target` (name, object path, interface). Raises `ErrorReply`, `Lost`, `Timeout`."""
        within = timeout or CALL_TIMEOUT
        try:
            async with asyncio.timeout(within), self._room(_size(body)):
                answer = await self._reply(target, member, signature, body)
        except TimeoutError as exc:
            raise Timeout(f"{target[0]} did not answer within {within:g} s") from exc
        if answer is None or answer.error_name == NO_REPLY:
            raise Lost
        if answer.message_type is MessageType.ERROR:
            raise ErrorReply(answer.error_name or "", str(answer.body[0]) if answer.body else "no reason given")
        return answer

    async def list_units(self, units: Sequence[str]) -> tuple[float, Message]:
        """As `call`, of ListUnitsByNames; callers who ask for the same list during a query share the next one.

        Also returns the time of the query in seconds since the epoch, which is after the caller's call.
        """
        key = tuple(units)
        if key not in self._next:
            self._next[key] = asyncio.create_task(self._list_next(key))
            self._next[key].add_done_callback(_note)
        return await asyncio.shield(self._next[key])

    async def _list_next(self, units: tuple[str, ...]) -> tuple[float, Message]:
        if units in self._asked:
            await asyncio.wait([self._asked[units]])
        self._asked[units] = self._next.pop(units)
        try:
            return time.time(), await self.call(MANAGER, "ListUnitsByNames", "as", [[*units]])
        finally:
            del self._asked[units]

    @asynccontextmanager
    async def _room(self, size: int) -> AsyncIterator[None]:
        """Wait until not too much is waiting for replies, then hold a place for a call."""
        async with self._in_line:
            while self._in_flight and self._in_flight + size > IN_FLIGHT:
                self._answered.clear()
                await self._answered.wait()
            self._in_flight += size
        try:
            yield
        finally:
            self._in_flight -= size
            self._answered.set()

    async def _reply(
        self, target: tuple[str, str, str], member: str, signature: str, body: Sequence[Any]
    ) -> Message | None:
        """The reply to a call; None if the connection is lost."""
        # If used after its end, dbus-fast writes to a descriptor that already belongs to something else.
        if self.lost:
            raise Lost
        reply: asyncio.Future[Message | None] = asyncio.get_running_loop().create_future()
        serial = self._bus.next_serial()
        self._replies[serial] = reply
        try:
            self._send(target, member, signature, body, serial=serial)
            return await reply
        finally:
            del self._replies[serial]

    @asynccontextmanager
    async def signals(
        self, rules: Sequence[str], wanted: Callable[[Message], bool], *, keep: bool = False
    ) -> AsyncIterator[asyncio.Queue[Message | None]]:
        """Collect those signals of systemd that match `rules` and are `wanted`, from now on.

        With `keep`, the bus keeps the rules as long as the connection exists, so that the next caller with the same
        rules need not wait for it. None in the queue: nothing more will come, since the connection is lost or the
        reader was too slow.
        """
        await self._subscribe()
        queue: asyncio.Queue[Message | None] = asyncio.Queue()

        def read(message: Message | None) -> None:
            if message is None or queue.qsize() >= MAX_WAITING:
                queue.put_nowait(None)
                self._readers.discard(read)
            elif wanted(message):
                queue.put_nowait(message)

        added = []
        self._readers.add(read)
        try:
            for rule in rules:
                if rule not in self._kept:
                    await self._add_match(rule)
                    added.append(rule)
            if keep:
                self._kept.update(added)
                added.clear()
            yield queue
        finally:
            self._readers.discard(read)
            for rule in added:
                self._remove_match(rule)

    async def close(self) -> None:
        """End the connection."""
        self._finish()
        await asyncio.wait([self._end])

    async def find_systemd(self) -> None:
        """Wait until systemd is on the bus, shortly after the bus has started, and learn its unique name.

        Any peer may send us a signal that looks like one of systemd's: only the sender's name cannot be forged.
        """
        await self._add_match(OWNER_CHANGED)
        try:
            owner = await self.call(DAEMON, "GetNameOwner", "s", [SYSTEMD])
        except ErrorReply as error:
            if error.name != "org.freedesktop.DBus.Error.NameHasNoOwner":
                raise
            await self._found.wait()
        else:
            self._follow_systemd(owner.body[0])
        if self.lost:
            raise Lost

    async def _subscribe(self) -> None:
        """Make systemd send its signals."""
        async with self._preparing:
            if self._subscribed:
                return
            try:
                await self.call(MANAGER, "Subscribe")
            except ErrorReply as error:
                if error.name != f"{SYSTEMD}.AlreadySubscribed":
                    raise
            self._subscribed = True

    async def _add_match(self, rule: str) -> None:
        """Have the bus forward matching signals. A second caller waits for that, or asks if the first one gave up."""
        async with self._preparing:
            self._matches[rule] += 1
            if self._matches[rule] > 1:
                return
            try:
                await self.call(DAEMON, "AddMatch", "s", [rule])
            except BaseException:
                self._remove_match(rule)
                raise

    def _remove_match(self, rule: str) -> None:
        self._matches[rule] -= 1
        if self._matches[rule] == 0 and not self.lost:
            with suppress(Lost):  # it would replace a cancellation
                self._send(DAEMON, "RemoveMatch", "s", [rule], flags=MessageFlag.NO_REPLY_EXPECTED)

    def _send(
        self,
        target: tuple[str, str, str],
        member: str,
        signature: str,
        body: Sequence[Any],
        *,
        serial: int | None = None,
        flags: MessageFlag = MessageFlag.NONE,
    ) -> None:
        name, path, interface = target
        message = Message(
            destination=name,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=[*body],
            serial=serial,
            flags=flags,
        )
        try:
            self._bus.send(message).add_done_callback(_note)
        except OSError as exc:
            # Otherwise only dbus-fast holds the future, and asyncio would log that its exception was never retrieved.
            failed: asyncio.Future[None] | None = getattr(getattr(self._bus, "_writer", None), "fut", None)
            if failed is not None and failed.done():
                _note(failed)
            self._finish()
            raise Lost from exc

    def _receive(self, message: Message) -> None:
        if message.message_type is not MessageType.SIGNAL:
            if (reply := self._replies.get(message.reply_serial)) and not reply.done():
                reply.set_result(message)
        elif message.sender == DAEMON[0]:
            if message.member == "NameOwnerChanged" and message.body[0] == SYSTEMD:
                self._follow_systemd(message.body[2])
        elif message.sender == self._systemd:
            for read in tuple(self._readers):
                read(message)

    def _follow_systemd(self, owner: str) -> None:
        if not self._systemd:
            self._systemd = owner
            self._found.set()
        elif owner != self._systemd:  # after systemd was re-executed, it has forgotten pending calls
            self._finish()

    def _finish(self) -> None:
        self._finished = True
        self._found.set()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_result(None)
        if self._bus.connected:
            self._bus.disconnect()
        for read in tuple(self._readers):
            read(None)

    def _ended(self, end: asyncio.Task[None]) -> None:
        if not end.cancelled() and (error := end.exception()) and not isinstance(error, (OSError, EOFError)):
            log.error("the message bus sent what cannot be read: %r", error)
        self._finish()


def _size(body: Sequence[Any]) -> int:
    """Bytes that a call occupies of `IN_FLIGHT`."""
    return CALL_SIZE + sum(len(text) for part in body if isinstance(part, list) for text in part)


def _note(future: asyncio.Future[Any]) -> None:
    """Retrieve an error of which all waiting callers are told in another way, such as that a message could not be sent:
    asyncio would log it as forgotten.
    """
    if not future.cancelled():
        future.exception()


async def connect(address: str) -> Connection:
    """Connect to systemd on the bus at `address`. Raises `Unavailable`."""
    try:
        bus = MessageBus(bus_address=address)
        async with asyncio.timeout(CALL_TIMEOUT):
            await bus.connect()
    except TimeoutError as exc:
        raise Unavailable(f"the message bus at {address} did not answer within {CALL_TIMEOUT:g} s") from exc
    except Exception as exc:  # of many kinds, if the bus sends what dbus-fast cannot read
        why = "it hung up" if isinstance(exc, EOFError) else getattr(exc, "strerror", None) or exc
        raise Unavailable(f"cannot reach the message bus at {address}: {why}") from exc
    connection = Connection(bus)
    try:
        async with asyncio.timeout(ARRIVAL):
            await connection.find_systemd()
    except BaseException as exc:
        await connection.close()
        if isinstance(exc, (TimeoutError, ErrorReply, Lost)):
            late = isinstance(exc, TimeoutError)
            why = str(exc) or (f"it did not come within {ARRIVAL:g} s" if late else "the connection was lost")
            raise Unavailable(f"cannot find systemd on the message bus at {address}: {why}") from exc
        raise
    return connection
