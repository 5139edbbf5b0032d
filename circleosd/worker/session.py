"""The calls of one plugin, from loading it to the end of the connection."""

from __future__ import annotations

import errno
import gc
import os
import queue
import sys
import threading
from collections import deque
from typing import NoReturn

from circleosd.worker import frames
from circleosd.worker.channel import Channel
from circleosd.worker.failure import PluginFailure, require_payload
from circleosd.worker.frames import Buffer, Frame, FrameError, Load
from circleosd.worker.host import Host
from circleosd.worker.limits import NO_MEMORY
from circleosd.worker.loader import THREAD_STACK, Loaded, load_plugin


def begin(channel: Channel, load: Load, descriptors: list[int]) -> _Serial | None:
    """Loads the plugin and reports READY; None after FAILED. Raises OSError if the machine lacks something."""
    session = (_Parallel if load.limits.concurrency > 1 else _Serial)(channel, load)
    try:
        session.loaded = load_plugin(load, descriptors, channel, session.host)
        session.prepare()
    except PluginFailure as exc:
        channel.send(frames.FAILED, 0, frames.failed_body(exc.as_failed()))
        return None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    channel.send(frames.READY, 0, frames.ready_body(session.loaded.ready))
    gc.freeze()
    gc.enable()  # each call leaves reference cycles, made by ctypes.cast
    return session


class _Serial:
    """Calls one after the other, on the thread that reads the connection."""

    loaded: Loaded

    def __init__(self, channel: Channel, load: Load) -> None:
        self.channel = channel
        self.host = Host(load, self.send, self.ask)
        self._waiting: deque[Frame] = deque()

    def prepare(self) -> None:
        """Allocates what serving needs. Raises OSError if the machine lacks something."""

    def serve(self) -> None:
        """Returns at the end of the stream."""
        while True:
            frame = self._waiting.popleft() if self._waiting else self.channel.receive()
            if frame is None:
                return
            self.answer(frame)

    def answer(self, frame: Frame) -> None:
        """Runs one call, sends its result, and prepares for the next, all under the watch."""
        if frame.kind not in (frames.INVOKE, frames.EVENT):
            raise FrameError(f"a frame of kind {frame.kind} came where a call was expected")
        name, payload = frames.split_named(frame.body)
        plugin, watch, _ = self.loaded
        self.host.begin(frame.call_id)
        watch.begin()
        try:
            if not frame.body.isascii():
                require_payload(payload)
            reply = plugin.call(name, payload) if frame.kind == frames.INVOKE else plugin.event(name, payload)
        except PluginFailure as exc:
            self.send(frames.FAILED, frame.call_id, frames.failed_body(exc.as_failed()))
        else:
            self.send(frames.RESULT, frame.call_id, reply)
        watch.extend()
        self.host.begin(frame.call_id | frames.PREPARING)
        plugin.prepare()
        watch.end()

    def send(self, kind: int, call_id: int, body: Buffer) -> None:
        """Sends a frame of a call. If the manager is gone, the worker ends here: plugin code may be on the stack."""
        try:
            self.channel.send(kind, call_id, body)
        except (BrokenPipeError, ConnectionResetError):
            _end(0)

    def ask(self, call_id: int, body: Buffer) -> Buffer:
        """Sends a host call and waits for its reply; calls that arrive meanwhile wait."""
        self.send(frames.HOST_CALL, call_id, body)
        try:
            while (frame := self.channel.receive()) is not None:
                if frame.kind == frames.HOST_REPLY and frame.call_id == call_id:
                    return frame.body
                self._waiting.append(frame)
        except (OSError, FrameError):
            sys.excepthook(*sys.exc_info())
        # Plugin code is on the stack, so an exception cannot leave it; and nobody is waiting any more.
        return _end(0)


class _Parallel(_Serial):
    """Concurrent calls, on as many threads; the first thread only reads."""

    def __init__(self, channel: Channel, load: Load) -> None:
        super().__init__(channel, load)
        self._tasks: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._replies: dict[int, queue.SimpleQueue[Buffer]] = {}
        self._threads = load.limits.concurrency
        self._serving = False

    def prepare(self) -> None:
        self._serving = True
        threading.stack_size(THREAD_STACK)
        try:
            for _ in range(self._threads):
                threading.Thread(target=self._work, daemon=True).start()
        except RuntimeError as exc:  # it has no type of its own
            raise OSError(errno.EAGAIN, f"{exc}") from exc

    def serve(self) -> None:
        for frame in self._waiting:
            self._tasks.put(frame)
        while (received := self.channel.receive()) is not None:
            if received.kind != frames.HOST_REPLY:
                self._tasks.put(received)
            elif (replies := self._replies.get(received.call_id)) is not None:
                replies.put(received.body)

    def _work(self) -> None:
        try:
            while True:
                self.answer(self._tasks.get())
        except MemoryError:
            _end(NO_MEMORY)
        except BaseException:  # noqa: BLE001  a thread that is gone would leave its calls without an answer
            sys.excepthook(*sys.exc_info())
            _end(1)

    def ask(self, call_id: int, body: Buffer) -> Buffer:
        if not self._serving:
            return super().ask(call_id, body)
        replies: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
        self._replies[call_id] = replies
        try:
            self.send(frames.HOST_CALL, call_id, body)
            return replies.get()
        finally:
            del self._replies[call_id]


def _end(status: int) -> NoReturn:
    sys.stderr.flush()
    os._exit(status)
