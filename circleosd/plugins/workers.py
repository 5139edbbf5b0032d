"""The manager's side of a worker: a connection to the process that runs one plugin's code.

A worker may have been compromised by the code that it runs, so everything it sends is limited and checked: a frame that
it may not send at that moment ends the connection.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import socket
import termios
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final, Protocol, TypeVar

from circleosd import upstream
from circleosd.errors import CircleError, Limit, Timeout
from circleosd.handoff import Handoff
from circleosd.plugins import failures
from circleosd.plugins.cause import NOBODY, Cause
from circleosd.plugins.failures import BrokeProtocol, WorkerGone
from circleosd.plugins.voice import Voice
from circleosd.worker import frames
from circleosd.worker.frames import HEADER, FrameError
from circleosd.worker.host import LOG_BUDGET, logged
from circleosd.worker.receiving import PIECE, Receiver, Sink

log = logging.getLogger(__name__)

GRACE: Final = 1.5  # seconds by which the manager's deadline is later than the worker's own
# What a call may log before its connection ends: a worker stops earlier by itself, unless it is compromised.
MOST_LOGGED: Final = 2 * LOG_BUDGET
LOADING: Final = 0  # the call id of everything before READY

# How a load and a call end.
_OF_LOAD = (frames.READY, frames.FAILED)
_OF_CALL = (frames.RESULT, frames.FAILED)

T = TypeVar("T")


class HostCalls(Protocol):
    """Answers a worker's host calls with the body of HOST_REPLY. `cause`: the call during which the worker asks."""

    def __call__(self, call: str, args: dict[str, str], cause: Cause) -> Awaitable[bytes]: ...


class _Work:
    """What a worker may do under a call id: until when, for what cause, and how many bytes it may log."""

    __slots__ = ("cause", "deadline", "may_log")

    def __init__(self, deadline: float, cause: Cause, may_log: int = MOST_LOGGED) -> None:
        self.deadline = deadline
        self.cause = cause
        self.may_log = may_log


class _Call(_Work):
    """A running call. Its reply is done if nobody waits for it any more."""

    __slots__ = ("reply",)

    def __init__(self, reply: Handoff[tuple[int, bytes | bytearray]], deadline: float, cause: Cause) -> None:
        super().__init__(deadline, cause)
        self.reply = reply


class Worker(asyncio.BufferedProtocol):
    """One connection to one worker process. It serves calls until it is closed or breaks.

    `host_calls` answers the plugin, `voice` is its log; at most `concurrency` calls are made at once.
    """

    def __init__(self, name: str, host_calls: HostCalls, concurrency: int, voice: Voice) -> None:
        self._name = name
        self._voice = voice
        self._host_calls = host_calls
        self._concurrency = concurrency
        self._most_asked = 2 * concurrency + 1
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._calls: dict[int, _Call] = {}
        self._number = LOADING
        self._room = asyncio.Event()  # there may be fewer running calls now
        self._in_line = 0
        self._timer: asyncio.TimerHandle | None = None
        self._asked: set[asyncio.Task[None]] = set()
        self._written = 0  # bytes given to the transport
        self._unsent: deque[int] = deque()  # where in these bytes each reply to a host call ends
        self._preparation_time = 0.0
        # All preparations together: only the worker knows which calls they follow.
        self._preparing = _Work(0.0, NOBODY)
        self._receiver: Receiver
        self.lost = False
        self.counted = False  # its end is counted in the plugin's record
        self.heard = True  # false if it had read nothing when it was too late

    async def load(
        self,
        path: str,
        load: frames.Load,
        descriptors: Sequence[int],
        timeout: float,
        sink: Sink | None,
        cause: Cause = NOBODY,
    ) -> frames.Ready:
        """Connect to the worker's socket and have it load the plugin for `cause`; its compilation goes to `sink`.

        Raises FileNotFoundError or ConnectionRefusedError if nobody listens, `BadRequest` with the reason if the worker
        refuses the artifact, `Unavailable` if the machine lacks something it needs, `WorkerGone`, `Timeout` after
        `timeout` seconds.
        """
        self._receiver = Receiver({**frames.TO_MANAGER, frames.RESULT: load.limits.output})
        self._receiver.sink = sink
        if load.plugin_type == "wasm":
            self._preparation_time = load.limits.time + GRACE
        sock = await upstream.connect(path)
        try:
            frame = frames.encode(frames.LOAD, LOADING, frames.load_body(load))
            sent = socket.send_fds(sock, [frame], descriptors)
            if rest := frame[sent:]:  # a worker that has everything may have answered and ended by now
                await self._loop.sock_sendall(sock, rest)
        except BaseException:
            sock.close()
            raise
        waiting = self._expect(LOADING, self._loop.time() + timeout, cause)
        await self._loop.create_unix_connection(lambda: self, sock=sock)
        try:
            kind, body = await self._reply(LOADING, waiting)
        except Timeout as exc:
            setting = " (plugins.load_time)" if load.plugin_type == "wasm" else ""
            raise Timeout(f"{self._name} cannot be loaded: took longer than {timeout:g} s{setting}") from exc
        self._receiver.sink = None
        if kind == frames.READY:
            return self._checked(lambda: _ready(load, frames.parse_ready(body)))
        failed = self._checked(lambda: frames.parse_failed(body))
        raise failures.of_load(self._name, failed)

    async def call(self, kind: int, name: str, payload: bytes, timeout: float, cause: Cause) -> bytes | bytearray:
        """Call a function (INVOKE) or deliver an event (EVENT, with the topic `name`); return the reply.

        `timeout` is the plugin's own limit in seconds, `cause` what led to this. Raises `Trapped`, `Timeout` and
        `Exceeded` for what the plugin did, `PluginFailed` and `Limit` for what it reports, `NotFound` if it does not
        take events, `WorkerGone`. Cancelling does not stop the call: while others want the worker, it continues and
        keeps its place.
        """
        if self.lost or len(self._calls) >= self._concurrency:
            await self._until_room()
        named = frames.named_body(name, b"")
        number = self._number = self._number % frames.LAST_ID + 1
        length = len(named) + len(payload)
        if length > frames.TO_WORKER[kind]:
            raise Limit(f"a payload may have at most {frames.MAX_PAYLOAD} bytes")
        begins = max(self._loop.time(), self._preparing.deadline)  # the latest: all its threads may still prepare
        waiting = self._expect(number, begins + timeout + GRACE, cause)
        head = HEADER.pack(length, kind, number) + named
        if length <= PIECE:
            self._write(head + payload)
        else:
            self._write(head)
            self._write(payload)
        answer, body = await self._reply(number, waiting)
        if answer == frames.RESULT:
            return body
        raise failures.of_call(self._checked(lambda: frames.parse_failed(body)))

    def close(self) -> None:
        """Close the connection; the worker ends by itself."""
        if self._transport:
            self._transport.close()

    def abort(self) -> None:
        """Abort the connection at once."""
        self.lost = True
        if self._transport:
            self._transport.abort()

    # calls and their deadlines

    def _expect(self, number: int, deadline: float, cause: Cause) -> _Call:
        call = self._calls[number] = _Call(Handoff(self._loop), deadline, cause)
        # One timer for all calls: a call that ends in time costs none.
        if self._timer is None or deadline < self._timer.when():
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(deadline, self._late)
        return call

    def _late(self, *, looked: bool = False) -> None:
        """The timer: end the connection if a call is overdue, else wait for the next deadline."""
        self._timer = None
        if not self._calls:
            return
        next_deadline = min(call.deadline for call in self._calls.values())
        if next_deadline > self._loop.time():
            self._timer = self._loop.call_at(next_deadline, self._late)
            return
        if not looked:
            # If the process was stopped (SIGSTOP, a frozen cgroup), timers run before it has read the data that has
            # arrived: epoll_wait(2) was interrupted.
            self._timer = self._loop.call_later(0, partial(self._late, looked=True))
            return
        log.warning("plugin %s: its worker did not answer in time", self._name)
        self.heard = not self._unread()
        self.abort()  # first: whoever waits for a reply continues at once, and checks whether this is lost
        self._fail(f"{self._name} did not answer in time and was ended", Timeout)

    def _unread(self) -> bool:
        """Whether sent data has not been read, as is the case until the worker accepts the connection."""
        assert self._transport is not None
        return any(fcntl.ioctl(self._transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4)))

    async def _until_room(self) -> None:
        """Wait for the end of a call that nobody waits for. Raises `WorkerGone`."""
        self._in_line += 1
        try:
            while len(self._calls) >= self._concurrency and not self.lost:
                self._room.clear()
                await self._room.wait()
        finally:
            self._in_line -= 1
        if self.lost:
            raise WorkerGone(f"the worker of {self._name} ended before the call")

    async def _reply(self, number: int, call: _Call) -> tuple[int, bytes | bytearray]:
        try:
            return await call.reply
        except asyncio.CancelledError:
            unanswered = number in self._calls
            if unanswered and not self._in_line and all(other.reply.done() for other in self._calls.values()):
                self.abort()  # nobody wants the worker any more
            raise

    def _checked(self, parse: Callable[[], T]) -> T:
        """The result of `parse` for a frame of this worker. Raises `WorkerGone`."""
        try:
            return parse()
        except FrameError as exc:
            self.abort()
            raise BrokeProtocol(f"the worker of {self._name} broke the protocol: {exc}") from exc

    # what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._receiver.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            for frame in self._receiver.received(nbytes):
                if self.lost:
                    break
                self._take(*frame)
        except FrameError as exc:
            log.error("plugin %s: its worker broke the protocol: %s", self._name, exc)
            self._fail(f"the worker of {self._name} broke the protocol: {exc}", BrokeProtocol)
            self.abort()

    def _take(self, kind: int, number: int, body: bytes | bytearray) -> None:
        call = self._calls.get(number)
        if kind == frames.LOG:
            self._count_log(call or self._preparation(number), len(body))
            self._voice.say(*frames.parse_log(body), self._loop.time())
        elif kind == frames.HOST_CALL:
            work = call or self._preparation(number)
            if work is None or self._unanswered() >= self._most_asked:
                raise FrameError("it made a host call outside a call, or too many at once")
            task = self._loop.create_task(self._answer(number, *frames.parse_host_call(body), work.cause))
            self._asked.add(task)
            task.add_done_callback(self._asked.discard)
        elif call is None or kind not in (_OF_LOAD if number == LOADING else _OF_CALL):
            raise FrameError(f"it sent an answer of kind {kind} that nobody is waiting for")
        else:
            del self._calls[number]
            self._room.set()
            if number != LOADING:
                self._prepare(call.cause)
            if not call.reply.done():
                call.reply.set_result((kind, body))

    def _prepare(self, cause: Cause) -> None:
        """A call with that cause has ended: the worker may now make the next one's instance, in the time of a call."""
        now = self._loop.time()
        if now < self._preparing.deadline:  # an earlier preparation may be still running
            earlier = self._preparing.cause
            # When calls run concurrently, either may be the cause, and nobody must be blamed for another's acts.
            known = self._concurrency == 1 or cause.caller == earlier.caller
            cause = Cause(max(cause.depth, earlier.depth), cause.caller if known else None)
        self._preparing = _Work(now + self._preparation_time, cause, self._concurrency * MOST_LOGGED)

    def _preparation(self, number: int) -> _Work | None:
        """What the worker may do under a call id that is not a call's."""
        if number & frames.PREPARING and self._loop.time() < self._preparing.deadline:
            return self._preparing
        return None

    def _count_log(self, work: _Work | None, size: int) -> None:
        if work is None:
            raise FrameError("it logged outside a call")
        work.may_log -= logged(size)
        if work.may_log < 0:
            raise FrameError("it logged more than a call may")

    async def _answer(self, number: int, call: str, args: dict[str, str], cause: Cause) -> None:
        body = await self._host_calls(call, args, cause)
        if self._transport and not self._transport.is_closing():
            self._write(frames.encode(frames.HOST_REPLY, number, body))
            self._unsent.append(self._written)

    def _unanswered(self) -> int:
        """Host calls without a reply, or with one that waits for room in the socket: a worker that is not compromised
        reads the reply before it asks again.
        """
        assert self._transport is not None
        sent = self._written - self._transport.get_write_buffer_size()
        while self._unsent and self._unsent[0] <= sent:
            self._unsent.popleft()
        return len(self._asked) + len(self._unsent)

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)
        self._written += len(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._room.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        doing = "while it loaded the plugin" if LOADING in self._calls else "during the call"
        self._fail(f"the worker of {self._name} ended {doing}")

    def _fail(self, why: str, error: type[CircleError] = WorkerGone) -> None:
        for call in [*self._calls.values()]:
            if not call.reply.done():
                call.reply.set_exception(error(why))


def _ready(load: frames.Load, ready: frames.Ready) -> frames.Ready:
    """Raises `FrameError` if the worker reports an ABI other than the one it was given."""
    if load.abi not in (None, ready.abi) or (ready.abi == "native") != (load.plugin_type == "native"):
        raise FrameError(f"it was to load a {load.plugin_type} plugin, but reports the ABI {ready.abi}")
    return ready
