"""The worker's end of its connection: whole frames in and out of a blocking socket."""

from __future__ import annotations

import array
import socket
import threading
from typing import Final

from circleosd.worker.frames import HEADER, TO_MANAGER, TO_WORKER, Buffer, Frame, FrameError, check, encode

_PIECE: Final = 64 << 10
_MAX_DESCRIPTORS: Final = 2


class Channel:
    """Frames over one connected Unix stream socket. `send` may be called from any thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = bytearray(_PIECE)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._send_lock = threading.Lock()

    def receive_first(self) -> tuple[Frame | None, list[int]]:
        """The first frame and the descriptors that came with it; no frame at the end of the stream.

        Descriptors are taken only here: what a later frame carries, the kernel closes.
        """
        descriptors = array.array("i")
        space = socket.CMSG_SPACE(_MAX_DESCRIPTORS * descriptors.itemsize)
        count, ancillary, _, _ = self._socket.recvmsg_into([self._view], space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
        self._start, self._end = 0, count
        return (self.receive() if count else None), list(descriptors)

    def receive(self) -> Frame | None:
        """The next frame, or None at the end of the stream. Raises `FrameError`."""
        while self._end - self._start < HEADER.size:
            if not self._fill():
                return None
        length, kind, call_id = HEADER.unpack_from(self._buffer, self._start)
        check(kind, length, TO_WORKER)
        start = self._start + HEADER.size
        available = self._end - start
        if available >= length:
            end = start + length
            if end == self._end:
                self._start = self._end = 0
            else:
                self._start = end
            return Frame(kind, call_id, bytes(self._view[start:end]))
        body = bytearray(length)
        body[:available] = self._view[start : self._end]
        self._start = self._end = 0
        rest = memoryview(body)[available:]
        while rest:
            count = self._socket.recv_into(rest)
            if count == 0:
                raise FrameError("cannot read the frame: the stream ends within it")
            rest = rest[count:]
        return Frame(kind, call_id, body)

    def _fill(self) -> bool:
        if self._start:
            size = self._end - self._start
            self._view[:size] = self._view[self._start : self._end]
            self._start, self._end = 0, size
        try:
            count = self._socket.recv_into(self._view[self._end :])
        except ConnectionResetError:  # the peer left something unread when it ended
            count = 0
        self._end += count
        if count == 0 and self._end:
            raise FrameError("cannot read the frame: the stream ends within it")
        return count > 0

    def send(self, kind: int, call_id: int, body: Buffer) -> None:
        """Sends one frame. Raises OSError when the peer is gone."""
        if len(body) <= _PIECE:
            frame = encode(kind, call_id, body)
            with self._send_lock:
                self._socket.sendall(frame)
            return
        check(kind, len(body), TO_MANAGER)
        header = HEADER.pack(len(body), kind, call_id)
        with self._send_lock:
            sent = self._socket.sendmsg([header, body]) - HEADER.size
            if sent < len(body):
                self._socket.sendall(memoryview(body)[sent:])
