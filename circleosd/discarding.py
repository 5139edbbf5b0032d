"""Closing descriptors that others have passed: that may take as long as they like, and nobody waits for it."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from collections import deque
from collections.abc import Iterable
from threading import Lock, Thread

MOST = 64  # descriptors of one uid that wait to be closed; who has so many may pass no more
_NO_LINGER = struct.pack("ii", 0, 0)

_waiting: dict[int, deque[int]] = {}  # descriptors to be closed, by the uid that passed them
_closing: set[int] = set()  # uids for which a thread is at work
_lock = Lock()


def discard(descriptors: Iterable[int], uid: int) -> None:
    """Close descriptors that `uid` passed; those whose close(2) may wait one after the other in a thread of that uid.

    The last one of a TCP socket may wait for its peer (SO_LINGER, socket(7)), that of a Unix socket for what was sent
    over it, and every one of a file on somebody's own file system for the program that serves it (fuse(4)).
    """
    for descriptor in descriptors:
        if _may_wait(descriptor):
            with _lock:
                _waiting.setdefault(uid, deque()).append(descriptor)
            _begin(uid)
            continue
        with contextlib.suppress(OSError):  # closed all the same, close(2)
            os.close(descriptor)


def crowded(uid: int) -> bool:
    """Whether so many descriptors of `uid` wait to be closed that no more should be taken."""
    if not _waiting or len(_waiting.get(uid, ())) < MOST:
        return False
    _begin(uid)  # there may have been no thread for it until now
    return True


def _may_wait(descriptor: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:  # EACCES: a file system that only its owner may enter
        return True


def _begin(uid: int) -> None:
    """Have a thread close what waits, if none does."""
    with _lock:
        if uid in _closing or uid not in _waiting:
            return
        _closing.add(uid)
    try:
        Thread(target=_close_all, args=(uid,), name="discarding", daemon=True).start()
    except RuntimeError:  # there may be no more threads: they wait for the next one of this uid
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
    """Have a socket not wait; whoever passed it may undo that meanwhile, and keep this thread."""
    passed = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptor)
    try:
        passed.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    finally:
        passed.detach()
