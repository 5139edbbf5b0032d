"""Closing descriptors that were passed by others: this may take arbitrarily long, and nobody must wait for it."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from collections import deque
from collections.abc import Iterable
from threading import Lock, Thread

MOST = 64  # descriptors of one uid that are waiting to be closed; with so many, it may pass no more
_NO_LINGER = struct.pack("ii", 0, 0)

_waiting: dict[int, deque[int]] = {}  # descriptors to be closed, by the uid that passed them
_closing: set[int] = set()  # uids with a thread at work
_lock = Lock()


def discard(descriptors: Iterable[int], uid: int) -> None:
    """Close descriptors passed by `uid`; if close(2) may block, one after the other in a thread of that uid.

    Closing the last descriptor of a TCP socket may wait for its peer (SO_LINGER, socket(7)), of a Unix socket for
    what was sent over it, and of a file on a user's own file system for the program that serves it (fuse(4)).
    """
    for descriptor in descriptors:
        if _may_wait(descriptor):
            with _lock:
                _waiting.setdefault(uid, deque()).append(descriptor)
            _begin(uid)
            continue
        with contextlib.suppress(OSError):  # closed anyway, close(2)
            os.close(descriptor)


def crowded(uid: int) -> bool:
    """Whether so many descriptors of `uid` are waiting to be closed that no more should be accepted."""
    if not _waiting or len(_waiting.get(uid, ())) < MOST:
        return False
    _begin(uid)  # perhaps no thread could be started for it until now
    return True


def _may_wait(descriptor: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:  # EACCES: a file system that only its owner may access
        return True


def _begin(uid: int) -> None:
    """Start a thread to close waiting descriptors, unless there is one."""
    with _lock:
        if uid in _closing or uid not in _waiting:
            return
        _closing.add(uid)
    try:
        Thread(target=_close_all, args=(uid,), name="discarding", daemon=True).start()
    except RuntimeError:  # perhaps no more threads are possible: they wait for the next one of this uid
        _closing.discard(uid)


def _close_all(uid: int) -> None:
    line = _waiting[uid]
    while True:
        _close(line[0])
        with _lock:
            line.popleft()
            if not line:
                del _waiting[uid]
                _closing.discard(uid)
                return


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # it is no socket
        _unlinger(descriptor)
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _unlinger(descriptor: int) -> None:
    """Make close(2) of a socket not wait; the sender may undo this meanwhile, and then blocks only this thread."""
    passed = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptor)
    try:
        passed.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    finally:
        passed.detach()
