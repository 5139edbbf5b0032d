"""Descriptors whose closing takes as long as somebody likes."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from circleosd import discarding
from circleosd.passing import Descriptors, PassingSocket
from tests.waiting import wait_until

STALLING, OTHER = 4242, 4243  # uids


def slow() -> int:
    """A descriptor whose closing is not for the event loop."""
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours.detach()


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def threads() -> int:
    return sum(thread.name == "discarding" for thread in threading.enumerate())


@pytest.fixture
def stalled(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Descriptors whose closing waits until the end of the test, as on a file system whose program does not answer."""
    stalling, end, close = set[int](), threading.Event(), discarding._close

    def closing(descriptor: int) -> None:
        if descriptor in stalling:
            end.wait()
        close(descriptor)

    monkeypatch.setattr(discarding, "_close", closing)
    yield stalling
    end.set()
    wait_until(lambda: not discarding._waiting)


def test_one_thread_waits_for_those_of_one_uid_and_keeps_no_others_open(stalled: set[int]) -> None:
    stalled.update(slow() for _ in range(20))
    for descriptor in stalled:
        discarding.discard([descriptor], STALLING)
    assert threads() == 1
    other = slow()
    discarding.discard([other], OTHER)
    wait_until(lambda: not is_open(other))
    wait_until(lambda: threads() == 1)


@pytest.mark.parametrize("next_one", ["passed", "refused"])
def test_nobody_waits_for_them_where_there_may_be_no_more_threads(
    next_one: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(discarding, "MOST", 1)
    left = slow()
    with monkeypatch.context() as threadless:
        threadless.setattr(threading.Thread, "start", none)
        discarding.discard([left], STALLING)
    assert is_open(left)
    if next_one == "passed":
        discarding.discard([slow()], STALLING)
    else:
        assert discarding.crowded(STALLING)
    wait_until(lambda: not is_open(left))
    wait_until(lambda: not discarding._waiting)


def test_of_who_has_too_many_nothing_more_is_read_until_they_are_closed(
    stalled: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discarding, "MOST", 2)
    ours, theirs = socket.socketpair()
    with theirs, PassingSocket(ours) as passing:
        passing.descriptors = Descriptors(STALLING)
        theirs.sendall(b"xy")
        stalled.add(first := slow())
        discarding.discard([first], STALLING)
        assert passing.recv(1) == b"x"
        discarding.discard([slow()], STALLING)
        with pytest.raises(OSError, match="too many descriptors are waiting to be closed"):
            passing.recv(1)
        assert not discarding.crowded(OTHER)
