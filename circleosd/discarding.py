"""Closing descriptors that others have passed: that may take as long as they like, and nobody waits for it."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from collections.abc import Iterable
from threading import Thread

_NO_LINGER = struct.pack("ii", 0, 0)


def discard(descriptors: Iterable[int]) -> None:
    """Close descriptors; those whose close(2) may wait in a thread of their own.

    The last one of a TCP socket may wait for its peer (SO_LINGER, socket(7)), and every one of a file on somebody's own
    file system for the program that serves it (fuse(4)).
    """
    slow = []
    for descriptor in descriptors:
        if _may_wait(descriptor):
            slow.append(descriptor)
            continue
        with contextlib.suppress(OSError):  # closed all the same, close(2)
            os.close(descriptor)
    if slow:
        try:
            Thread(target=_close, args=(slow,), name="discarding", daemon=True).start()
        except RuntimeError:  # there may be no more threads
            _close(slow)


def _may_wait(descriptor: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:  # EACCES: a file system that only its owner may enter
        return True


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
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
