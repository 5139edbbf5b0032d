"""The worker's end of its connection: whole frames in and out of a blocking socket."""

from __future__ import annotations

import array
import socket
import threading
from collections import deque
from typing import Final

from circleosd.worker.frames import HEADER, TO_MANAGER, TO_WORKER, Buffer, Frame, FrameError, check, encode
from circleosd.worker.receiving import PIECE, Receiver

_MAX_DESCRIPTORS: Final = 2


class Channel:
    """Frames over one connected Unix stream socket. `send` may be called from any thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._receiver = Receiver(TO_WORKER)
        self._received: deque[Frame] = deque()
        self._send_lock = threading.Lock()

    def receive_first(self) -> tuple[Frame | None, list[int]]:
        """The first frame and the descriptors that came with it; None for the frame at the end of the stream.

        Descriptors are received only here: the kernel closes those of later frames.
        """
        descriptors = array.array("i")
        space = socket.CMSG_SPACE(_MAX_DESCRIPTORS * descriptors.itemsize)
        buffer = self._receiver.buffer()
        count, ancillary, _, _ = self._socket.recvmsg_into([buffer], space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(data)
        self._received.extend(self._receiver.received(count))
        return self.receive(), list(descriptors)

    def receive(self) -> Frame | None:
        """The next frame, or None at the end of the stream. Raises `FrameError`."""
        while not self._received:
            try:
                count = self._socket.recv_into(self._receiver.buffer())
            except ConnectionResetError:  # the peer left unread data when it ended
                return None
            if count == 0 and self._receiver.within_a_frame:
                raise FrameError("cannot read the frame: the stream ends within it")
            if count == 0:
                return None
            self._received.extend(self._receiver.received(count))
        return self._received.popleft()

    def send(self, kind: int, call_id: int, body: Buffer) -> None:
        """Sends one frame. Raises OSError if the peer is gone."""
        if len(body) <= PIECE:
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
