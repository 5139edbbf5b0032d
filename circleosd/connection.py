"""One peer of a service: its lines in, the replies out, and the limits that apply to it.

Requests of a connection are answered in order, one at a time; connections do not wait for one another. Whatever a peer
sends or fails to send, it occupies at most one line buffer and one reply, and for a limited time.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from circleosd import wire
from circleosd.config import ServerSettings
from circleosd.errors import BadRequest, CircleError, Limit, Timeout
from circleosd.handoff import Handoff
from circleosd.passing import MAX_FILES, Descriptors
from circleosd.policy import Peer
from circleosd.turns import Turns

LINGER = 5.0  # seconds in which a refused peer's input is read and dropped, so that it can read the reply
SMALL = 64 * 1024  # bytes a connection may hold without asking the shared budget
NO_MEMORY = "this service has no memory left for the line; try again later"


class Dispatcher(Protocol):
    """What a server needs of a service."""

    name: str
    requests: int
    connections: Callable[[], int]

    async def dispatch(self, line: bytes, peer: Peer, files: Descriptors) -> bytes | AsyncGenerator[bytes, None]: ...


class Owner(Protocol):
    """What a connection needs of its server. `booked`: how many bytes of the shared budget each uid uses."""

    service: Dispatcher
    settings: ServerSettings
    max_line: int
    loop: asyncio.AbstractEventLoop
    booked: Counter[int]
    turns: Turns

    def lost(self, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """One peer. It is read from, perhaps drained after it exceeded a limit, and then gone."""

    _transport: asyncio.Transport

    def __init__(self, server: Owner, peer: Peer, descriptors: Descriptors) -> None:
        self._server = server
        self.peer = peer
        self._descriptors = descriptors
        self._buffer = wire.LineBuffer(server.max_line)
        self._task: asyncio.Task[None] | None = None  # answers one line after the other, starting with the first one
        self._idle: Handoff[bytes | None] | None = None  # where it waits for the next line
        self._writable = asyncio.Event()
        self._writable.set()
        self._ended = False  # the peer sends no more
        self._owes = False  # the current request has no reply yet
        self._streaming = False  # the current request continues until somebody ends it
        self._draining = False  # refused: its input is dropped until it has read why
        self._since = time.monotonic()  # when the connection last changed between working and waiting
        self._write_blocked: float | None = None  # when the peer stopped reading replies
        self._booked = 0  # bytes taken from the shared budget

    # what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(0)  # the time to read a reply starts with the first byte that is not read
        # asyncio starts reading a little later, where nobody would notice that it cannot.
        transport.pause_reading()
        self._resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        fresh = not len(self._buffer)
        if (
            fresh
            and not self._busy
            and not len(self._descriptors)
            and (line := wire.only_line(data, self._buffer.limit)) is not None
        ):
            self._work(line)
            return
        try:
            self._buffer.feed(data)
        except MemoryError:
            if self._busy:  # a reply would be taken for the reply to the current request
                self._transport.abort()
            else:
                self.refuse(Limit(NO_MEMORY))
            return
        if self._busy:
            if len(self._buffer) > SMALL:
                self._transport.pause_reading()
            return
        if fresh:
            self._since = time.monotonic()
        if (line := self._next_line()) is not None:
            self._work(line)

    def eof_received(self) -> bool:
        self._ended = True
        if not self._busy:
            self._end()
        return True  # keep the other direction open for replies

    def pause_writing(self) -> None:
        self._writable.clear()
        self._write_blocked = time.monotonic()

    def resume_writing(self) -> None:
        self._writable.set()
        self._write_blocked = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._descriptors.close()
        self._buffer = wire.LineBuffer(0)  # lines after the current request are not answered any more
        self._book(0)
        self._writable.set()
        self._end_stream()
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
        if self._task is not None and self._busy:  # work for a peer that has gone counts until it is done
            self._task.add_done_callback(lambda _: self._server.lost(self))
        else:
            self._server.lost(self)

    # what the server calls

    def refuse(self, error: CircleError) -> None:
        """Reply with an error, and close once the peer could read it: closing at once would lose the reply."""
        self._transport.write(wire.failure(error))
        self._transport.write_eof()
        with contextlib.suppress(OSError):  # its time to read why is limited
            self._transport.resume_reading()
        self._ended = self._draining = True
        self._since = time.monotonic()
        self._buffer = wire.LineBuffer(0)
        self._book(0)
        self._descriptors.accept_none()

    def check(self, now: float) -> None:
        """Close the connection if it has used up its time."""
        settings = self._server.settings
        if self._write_blocked is not None and now - self._write_blocked > settings.write_timeout:
            self._transport.abort()
        elif self._streaming:
            # The peer's end of file is not read while more than one line is waiting behind the stream.
            if not self._transport.is_closing() and self._hung_up():
                self._transport.abort()
        elif self._draining:
            if now - self._since > LINGER:
                self._transport.abort()
        elif not self._busy and not self._ended:
            if len(self._buffer):
                if now - self._since > settings.read_timeout:
                    self.refuse(Timeout(f"the line was not completed within {settings.read_timeout:g} s"))
            elif now - self._since > settings.idle_connection:
                self.refuse(Timeout(f"no request for {settings.idle_connection:g} s"))

    def close_if_quiet(self) -> None:
        """Close unless a request is being answered; a stream is ended."""
        self._end_stream()
        if not self._busy or self._streaming:
            self._transport.close()

    async def give_up(self, error: CircleError) -> None:
        """End the current request and wait for its cleanup; answer it with an error if it has no reply by then."""
        if not self._task:  # perhaps it is not even open yet
            return
        if self._busy:
            self._ended = True
            self._buffer = wire.LineBuffer(0)  # a request that cannot be cancelled any more is the last
            self._task.cancel()
            await asyncio.wait([self._task])
            if self._owes:
                self._transport.write(wire.failure(error))
        self._transport.close()

    # the work

    @property
    def _busy(self) -> bool:
        """Whether a request is being answered."""
        return self._task is not None and self._idle is None and not self._task.done()

    def _next_line(self) -> bytes | None:
        """The next request to answer; None if more input is needed, or nothing will follow."""
        if not len(self._buffer) and not self._booked and not len(self._descriptors):
            return None
        try:
            line = self._buffer.next_line()
            if self._descriptors.too_many:
                raise Limit(f"at most {MAX_FILES} descriptors may be waiting on a connection")
            self._book(len(self._buffer) + (len(line) if line is not None else 0))
        except Limit as error:
            self.refuse(error)
            return None
        except MemoryError:
            self.refuse(Limit(NO_MEMORY))
            return None
        return line

    def _book(self, size: int) -> None:
        """Account for `size` bytes of input or reply.

        Raises `Limit` if all connections together hold too much, or several of one uid more than half of that, so that
        there is room for others.
        """
        more = max(0, size - SMALL) - self._booked
        booked, uid, most = self._server.booked, self.peer.uid, self._server.settings.max_buffered
        if more > 0:
            if booked.total() + more > most:
                raise Limit("too much data is being sent and received here; try again later")
            if booked[uid] > self._booked and booked[uid] + more > most // 2:
                raise Limit(f"too much data is being sent and received for uid {uid}; try again later")
        booked[uid] += more
        self._booked += more

    def _end_stream(self) -> None:
        if self._streaming and self._task:
            self._task.cancel()

    def _hung_up(self) -> bool:
        """Whether the peer has closed both directions, not only announced that it sends no more (poll(2), POLLHUP)."""
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), 0)
        return any(event & select.POLLHUP for _, event in poll.poll(0))

    def _work(self, line: bytes) -> None:
        if self._task is None:
            self._task = self._server.loop.create_task(self._serve(line))
        elif self._idle is not None:
            idle, self._idle = self._idle, None
            idle.set_result(line)

    async def _serve(self, line: bytes | None) -> None:
        """Answer `line`, and each further line that is handed over, until the connection ends."""
        while line is not None:
            await self._answer(line)
            if self._ended or self._transport.is_closing():
                return
            self._idle = Handoff(self._server.loop)
            line = await self._idle

    async def _answer(self, line: bytes | None) -> None:
        """Answer `line` and the complete lines after it."""
        while line is not None and not self._transport.is_closing():
            self._owes = True
            if (turn := self._server.turns.take(self.peer.uid, len(line))) is not None:
                await turn
            reply = await self._server.service.dispatch(line, self.peer, self._descriptors)
            if len(self._descriptors):
                self._descriptors.answered(len(self._buffer))
            if isinstance(reply, bytes):
                if len(reply) > SMALL or self._booked:
                    reply = self._affordable(reply, line)
                self._transport.write(reply)
                self._owes = False
                if not self._writable.is_set():
                    await self._writable.wait()
            elif not self._transport.is_closing():  # a stream that starts after the peer has gone would never end
                await self._pass_on(reply)
            line = self._next_line()
            if line is not None:
                await asyncio.sleep(0)  # give other connections a turn: a request may be answered without ever waiting
        self._since = time.monotonic()
        if self._draining:
            return
        if self._ended:
            self._end()
        else:
            self._resume_reading()

    async def _pass_on(self, stream: AsyncGenerator[bytes, None]) -> None:
        """Send a stream as fast as the peer reads it."""
        self._owes, self._streaming = False, True
        async with contextlib.aclosing(stream):
            async for part in stream:
                if self._transport.is_closing():  # asyncio logs every write to a peer that is gone
                    break
                self._transport.write(part)
                await self._writable.wait()
                await asyncio.sleep(0)  # give other connections a turn, as above
        self._streaming = False

    def _affordable(self, reply: bytes, line: bytes) -> bytes:
        """The reply to `line`, if it may be held until the peer reads it; otherwise an error in its place."""
        try:
            self._book(len(self._buffer) + len(reply))
        except Limit as error:
            why = Limit(f"the request was carried out, but its reply cannot be kept: {error}")
            return wire.failure(why, tag=wire.tag_in(line))
        return reply

    def _resume_reading(self) -> None:
        """Continue reading; if the kernel has no memory for that (epoll_ctl(2)), say so and close."""
        try:
            self._transport.resume_reading()
        except OSError as exc:
            self._transport.write(wire.failure(Limit(f"cannot wait for a request: {exc.strerror}; try again later")))
            self._transport.close()

    def _end(self) -> None:
        """The peer has sent its last byte and received its replies: close."""
        if len(self._buffer):
            self._transport.write(wire.failure(BadRequest("the line is incomplete; a request ends with a newline")))
        self._transport.close()
