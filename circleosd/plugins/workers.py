"""The manager's side of a worker: a connection to the process that runs one plugin's code."""

from __future__ import annotations

import array
import asyncio
import itertools
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from circleosd import upstream
from circleosd.errors import BadRequest, CircleError, Limit, NotFound, PluginFailed, Timeout
from circleosd.worker import frames
from circleosd.worker.frames import FrameError

log = logging.getLogger(__name__)

GRACE = 1.5  # seconds by which the manager's deadline is later than the worker's own

HostCall = Callable[[str, dict[str, str]], Awaitable[bytes]]
T = TypeVar("T")

_LEVELS = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)


class WorkerGone(PluginFailed):
    """The worker's process ended while something was expected of it."""


class Worker(asyncio.Protocol):
    """One connection to one worker process. It serves calls until it is closed or breaks."""

    def __init__(self, name: str, host_call: HostCall) -> None:
        self._name = name
        self._host_call = host_call
        self._decoder = frames.Decoder(frames.TO_MANAGER)
        self._transport: asyncio.Transport | None = None
        self._calls: dict[int, asyncio.Future[frames.Frame]] = {}
        self._ids = itertools.cycle(range(1, 1 << 32))
        self._tasks: set[asyncio.Task[None]] = set()
        self.compiled: bytes | None = None
        self.lost = False

    @property
    def busy(self) -> bool:
        """Whether a call is in hand."""
        return bool(self._calls)

    async def load(self, path: Path, load: frames.Load, descriptors: Sequence[int], timeout: float) -> frames.Ready:
        """Connect to the worker's socket and have it load the plugin.

        Raises FileNotFoundError or ConnectionRefusedError when nobody listens, `BadRequest` with the reason when the
        worker refuses the artifact, `WorkerGone`, `Timeout` after `timeout` seconds.
        """
        loop = asyncio.get_running_loop()
        sock = await upstream.connect(str(path))
        try:
            frame = frames.encode(frames.LOAD, 0, frames.load_body(load))
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
            sent = sock.sendmsg([frame], [rights])
            await loop.sock_sendall(sock, frame[sent:])
        except BaseException:
            sock.close()
            raise
        waiting = self._expect(0)
        await loop.create_unix_connection(lambda: self, sock=sock)
        reply = await self._reply(0, waiting, timeout)
        if reply.kind == frames.READY:
            return self._checked(lambda: frames.parse_ready(reply.body))
        failed = self._checked(lambda: frames.parse_failed(reply.body))
        raise BadRequest(f"{self._name} cannot be loaded: {failed.message}")

    async def call(self, function: str, payload: bytes, timeout: float) -> bytes:
        """Call a function; `timeout` is the plugin's own limit in seconds. Raises what `_failure` says,
        `WorkerGone`.
        """
        assert self._transport is not None
        number = next(self._ids)
        waiting = self._expect(number)
        self._transport.write(frames.encode(frames.INVOKE, number, frames.named_body(function, payload)))
        reply = await self._reply(number, waiting, timeout + GRACE)
        if reply.kind == frames.RESULT:
            return bytes(reply.body)
        raise _failure(self._checked(lambda: frames.parse_failed(reply.body)))

    def close(self) -> None:
        """Hang up; the worker ends by itself."""
        if self._transport:
            self._transport.close()

    def _expect(self, number: int) -> asyncio.Future[frames.Frame]:
        self._calls[number] = asyncio.get_running_loop().create_future()
        return self._calls[number]

    async def _reply(self, number: int, waiting: asyncio.Future[frames.Frame], timeout: float) -> frames.Frame:
        try:
            async with asyncio.timeout(timeout):
                return await waiting
        except TimeoutError:
            self.abort()
            raise Timeout(f"{self._name} did not answer in time and was ended") from None
        finally:
            self._calls.pop(number, None)

    def _checked(self, parse: Callable[[], T]) -> T:
        """What `parse` makes of a frame of this worker, which may have been taken over. Raises `WorkerGone`."""
        try:
            return parse()
        except FrameError as exc:
            self.abort()
            raise WorkerGone(f"the worker of {self._name} broke the protocol: {exc}") from exc

    def abort(self) -> None:
        """Give the connection up at once."""
        self.lost = True
        if self._transport:
            self._transport.abort()

    # what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._decoder.feed(data):
                self._take(frame)
        except FrameError as exc:
            log.error("%s: the worker broke the protocol: %s", self._name, exc)
            self.abort()

    def _take(self, frame: frames.Frame) -> None:
        match frame.kind:
            case frames.LOG:
                level, text = frames.parse_log(frame.body)
                log.log(_LEVELS[level], "plugin %s: %s", self._name, text)
            case frames.HOST_CALL:
                task = asyncio.get_running_loop().create_task(self._answer(frame))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case frames.COMPILED:
                # Only before READY: no code of the plugin has run yet that could have made it up.
                if 0 not in self._calls:
                    raise FrameError("it sent a compilation after it was ready")
                self.compiled = bytes(frame.body)
            case _:
                waiting = self._calls.get(frame.call_id)
                if waiting and not waiting.done():
                    waiting.set_result(frame)

    async def _answer(self, frame: frames.Frame) -> None:
        call, args = frames.parse_host_call(frame.body)
        body = await self._host_call(call, args)
        if self._transport and not self._transport.is_closing():
            self._transport.write(frames.encode(frames.HOST_REPLY, frame.call_id, body))

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        for waiting in self._calls.values():
            if not waiting.done():
                waiting.set_exception(WorkerGone(f"the worker of {self._name} ended during the call"))


def _failure(failed: frames.Failed) -> CircleError:
    """The error that a FAILED frame stands for, with the plugin's own message or the trap and its backtrace."""
    message = failed.message
    if failed.backtrace:
        message += f" (at {', '.join(failed.backtrace)})"
    errors: dict[str, type[CircleError]] = {
        "timeout": Timeout, "limit": Limit, "not-found": NotFound, "bad-request": BadRequest
    }  # fmt: skip
    return errors.get(failed.code, PluginFailed)(message)
