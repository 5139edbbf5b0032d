"""Sockets through which a peer passes descriptors (SCM_RIGHTS, unix(7)), and the handling of these descriptors."""

from __future__ import annotations

import array
import contextlib
import errno
import socket
import struct
from collections import deque

from circleosd.discarding import crowded, discard
from circleosd.errors import BadRequest, Limit
from circleosd.policy import Peer

MAX_FILES = 4  # descriptors that may wait on a connection; one more is closed at once, and the connection refused
MOST_PASSED = 253  # descriptors in one message (SCM_MAX_FD, unix(7)); the kernel closes those that exceed it
# Bytes to receive at once. asyncio asks for 256 KiB, which malloc(3) would have to map and unmap for every line.
PIECE = 64 * 1024


class Descriptors:
    """Descriptors passed by a peer of `uid` (SCM_RIGHTS), first in, first out. At most `MAX_FILES` wait.

    A peer may send some with each byte, even during a request or after a refusal. Descriptors are valid only for the
    request that they came with, which may have been refused unread.
    """

    received = 0  # number of bytes received on the connection

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self._waiting: deque[tuple[int, int]] = deque()  # each with the value of `received` when it came
        self._most = MAX_FILES
        self.too_many = False  # some were closed without being taken
        self._missed = False  # some could not be received for lack of descriptors

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, descriptors: list[int], *, cut: bool) -> None:
        """Add the descriptors that came with some bytes. `cut`: there were more, but no room for them (MSG_CTRUNC)."""
        self._missed = self._missed or cut
        room = self._most - len(self._waiting)
        self._waiting.extend((descriptor, self.received) for descriptor in descriptors[:room])
        if descriptors[room:]:
            self.too_many = True
            discard(descriptors[room:], self.uid)

    def accept_none(self) -> None:
        """Close waiting descriptors and all future ones."""
        self._most = 0
        self.close()

    def take(self) -> int:
        """The next descriptor; the caller closes it. Raises `BadRequest` if there is none, `Limit` if it was lost."""
        if not self._waiting:
            if self._missed:
                raise Limit("too many open files here to receive the descriptor; try again later")
            raise BadRequest("the request names a descriptor that did not come with it (SCM_RIGHTS)")
        return self._waiting.popleft()[0]

    def answered(self, rest: int) -> None:
        """All received bytes but the last `rest` are answered: close the descriptors that came with them."""
        while self._waiting and self._waiting[0][1] <= self.received - rest:
            discard([self.take()], self.uid)

    def close(self) -> None:
        discard((descriptor for descriptor, _ in self._waiting), self.uid)
        self._waiting.clear()


_ANCILLARY = socket.CMSG_SPACE(MOST_PASSED * array.array("i").itemsize)
# The operators of an enumeration would cost more than the rest of `recv`.
_CLOSE_ON_EXEC, _PEEK, _TRUNCATED = int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_PEEK), int(socket.MSG_CTRUNC)


class PassingSocket(socket.socket):
    """A socket whose `recv` also collects descriptors, so that asyncio's transport can read from it."""

    def __init__(self, accepted: socket.socket) -> None:
        """Replace `accepted`."""
        super().__init__(fileno=accepted.detach())
        self.peer = peer_of(self)
        self.descriptors = Descriptors(self.peer.uid)

    def recv(self, size: int, flags: int = 0) -> bytes:
        if crowded(self.descriptors.uid):
            raise OSError(errno.ETOOMANYREFS, "too many descriptors are waiting to be closed")
        try:
            data, ancillary, told, _ = self.recvmsg(min(size, PIECE), _ANCILLARY, flags | _CLOSE_ON_EXEC)
        except MemoryError as exc:  # asyncio would take this for a bug
            raise OSError(errno.ENOMEM, "no memory") from exc
        self.descriptors.received += len(data)
        if ancillary or told & _TRUNCATED:
            numbers = array.array("i")
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    numbers.frombytes(content)  # Linux gives whole descriptors only
            self.descriptors.add(list(numbers), cut=bool(told & _TRUNCATED))
        return data

    def close(self) -> None:
        """Close the socket. If there are unread descriptors, closing may block, so do it in a thread."""
        self.descriptors.accept_none()
        with contextlib.suppress(OSError, MemoryError):
            self.shutdown(socket.SHUT_RD)  # nothing more can arrive
            while (found := self.recvmsg(PIECE, 0, _PEEK))[0]:
                if found[2] & _TRUNCATED:  # it contains a descriptor
                    discard([self.detach()], self.descriptors.uid)
                    break
                super().recv(len(found[0]))
        super().close()


def peer_of(sock: socket.socket) -> Peer:
    """The process that connected, as identified by the kernel (SO_PEERCRED, unix(7))."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return Peer(uid=uid & 0xFFFFFFFF, gid=gid & 0xFFFFFFFF, pid=pid)
