"""Descriptors that a peer passes, and the socket that receives them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import time
from pathlib import Path

import pytest

from circleosd import discarding
from circleosd.config import ServerSettings
from circleosd.errors import Limit
from circleosd.passing import PIECE, Descriptors, PassingSocket
from circleosd.policy import Peer
from tests.lingering import lingering
from tests.unit.serving import Patient, received, served
from tests.waiting import SECONDS, wait_until


def test_a_piece_stays_below_what_malloc_maps() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs, PassingSocket(ours) as passing:
        theirs.sendall(bytes(2 * PIECE))
        assert len(passing.recv(4 * PIECE)) == PIECE
    assert PIECE < 128 * 1024  # M_MMAP_THRESHOLD of mallopt(3)


@pytest.mark.parametrize("received", [False, True], ids=["unread", "received"])
@pytest.mark.parametrize("passed", [1, 5])
def test_a_descriptor_whose_closing_waits_holds_up_nobody(received: bool, passed: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.ExitStack() as stack:
        passing = stack.enter_context(PassingSocket(ours))
        with theirs:
            slow = [stack.enter_context(lingering(60)) for _ in range(passed)]
            socket.send_fds(theirs, [b"x"], [sock.fileno() for sock in slow])
            for sock in slow:
                sock.close()
            began = time.monotonic()
            if received:
                assert passing.recv(1) == b"x"
            passing.close()
            assert time.monotonic() - began < 30


@pytest.mark.parametrize("room", [0, 1])
def test_a_descriptor_that_finds_no_room_among_the_open_files_is_not_said_to_be_missing(room: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    bounds = resource.getrlimit(resource.RLIMIT_NOFILE)
    wait_until(lambda: not discarding._waiting)  # or what other tests passed would make room
    with theirs, PassingSocket(ours) as passing:
        socket.send_fds(theirs, [b"x"], [theirs.fileno()] * 2)
        opened: list[int] = []
        try:
            highest = max(int(name) for name in os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 3, bounds[1]))
            with contextlib.suppress(OSError):
                while True:
                    opened.append(os.dup(theirs.fileno()))
            for _ in range(room):
                os.close(opened.pop())
            assert passing.recv(1) == b"x"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, bounds)
            for descriptor in opened:
                os.close(descriptor)
        for _ in range(room):
            os.close(passing.descriptors.take())
        with pytest.raises(Limit, match="too many open files here"):
            passing.descriptors.take()


def test_a_descriptor_that_was_passed_is_not_handed_on_to_programs() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs, PassingSocket(ours) as passing:
        socket.send_fds(theirs, [b"x"], [theirs.fileno()])
        assert passing.recv(1) == b"x"
        descriptor = passing.descriptors.take()
        try:
            assert not os.get_inheritable(descriptor)
        finally:
            os.close(descriptor)


def test_descriptors_that_nobody_took_are_closed_with_their_connection(tmp_path: Path) -> None:
    async def run() -> None:
        theirs, passed = os.pipe()
        os.set_blocking(theirs, False)
        try:
            async with served(Patient(), str(tmp_path / "s")) as (peer, _):
                socket.send_fds(peer, [b"now\n"], [passed])
                os.close(passed)
                assert await asyncio.get_running_loop().sock_recv(peer, PIECE) == b"reply\n"
            assert os.read(theirs, 1) == b""
        finally:
            os.close(theirs)

    asyncio.run(asyncio.wait_for(run(), SECONDS))


class Taking(Patient):
    """Takes a descriptor for the request `take` and refuses every other, once it is let go."""

    name = "taking"

    async def dispatch(self, line: bytes, peer: Peer, files: Descriptors) -> bytes:
        await self.go.wait()
        if line != b"take":
            return b"refused\n"
        descriptor = files.take()
        try:
            return os.read(descriptor, 10) + b"\n"
        finally:
            os.close(descriptor)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_request_does_not_get_the_descriptor_of_one_before_it(tmp_path: Path, at_once: bool) -> None:
    for name in ("first", "second"):
        (tmp_path / name).write_text(name)

    async def run() -> None:
        async with served(service := Taking(), str(tmp_path / "s")) as (peer, _):
            peer.setblocking(True)
            if not at_once:
                service.go.set()
            expected = [b"refused\n", b"second\n"]
            for line, name, reply in zip((b"other\n", b"take\n"), ("first", "second"), expected, strict=True):
                with (tmp_path / name).open() as file:
                    socket.send_fds(peer, [line], [file.fileno()])
                if not at_once:
                    assert await asyncio.to_thread(peer.recv, PIECE) == reply
            if at_once:
                service.go.set()
                told = b""
                while len(told) < len(b"".join(expected)):
                    told += await asyncio.to_thread(peer.recv, PIECE)
                assert told == b"".join(expected)

    asyncio.run(asyncio.wait_for(run(), SECONDS))


@pytest.mark.parametrize("late", [False, True])
def test_descriptors_of_a_refused_peer_are_closed_though_it_stays(tmp_path: Path, late: bool) -> None:
    async def run() -> None:
        theirs, passed = os.pipe()
        os.set_blocking(theirs, False)
        settings = ServerSettings(idle_connection=0.1, read_timeout=0.1)
        try:
            async with served(service := Patient(), str(tmp_path / "s"), settings) as (peer, _):
                if late:
                    assert b'"timeout"' in await received(peer)
                socket.send_fds(peer, [b"x"], [passed])
                os.close(passed)
                if not late:
                    assert b'"timeout"' in await received(peer)
                while True:
                    with contextlib.suppress(BlockingIOError):
                        assert os.read(theirs, 1) == b""
                        break
                    await asyncio.sleep(0.001)
                assert service.connections() == 2
        finally:
            os.close(theirs)

    asyncio.run(asyncio.wait_for(run(), SECONDS))
