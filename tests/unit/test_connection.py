"""What a connection receives at once, and what it gives back."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from circleosd.config import ServerSettings
from circleosd.connection import PIECE, SMALL, Descriptors, PassingSocket
from circleosd.policy import Peer
from circleosd.server import Server


def test_a_piece_stays_below_what_malloc_maps() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs, PassingSocket(fileno=ours.detach()) as passing:
        passing.descriptors = Descriptors()
        theirs.sendall(bytes(2 * PIECE))
        assert len(passing.recv(4 * PIECE)) == PIECE
    assert PIECE < 128 * 1024  # M_MMAP_THRESHOLD of mallopt(3)


class Generous:
    """A service whose every reply is larger than what the kernel takes for a peer that does not read."""

    name = "generous"
    requests = 0
    connections: Callable[[], int] = staticmethod(lambda: 0)

    async def dispatch(self, line: bytes, peer: Peer, files: Descriptors) -> bytes:
        self.requests += 1
        return bytes(4 << 20)


class Silent:
    """A service manager that nobody looks at."""

    watchdog_interval: float | None = None

    def ready(self, status: str) -> None: ...

    def status(self, text: str) -> None: ...

    def alive(self) -> None: ...

    def stopping(self) -> None: ...


@pytest.mark.parametrize("behind", [b"", b"x" * SMALL, b"x" * SMALL + b"\nx\n"], ids=["nothing", "a part", "a line"])
def test_a_peer_that_goes_before_it_has_its_reply_leaves_nothing_booked(tmp_path: Path, behind: bytes) -> None:
    path = str(tmp_path / "s")

    async def run() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            server = Server(Generous(), listener, ServerSettings(), max_line=1 << 20, manager=Silent())
            serving = asyncio.create_task(server.run())
            _, writer = await asyncio.open_unix_connection(path)
            writer.write(b"x\n" + behind)
            while not server.booked:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)  # the reply waits for the peer now, and what is behind the request is read
            writer.transport.abort()
            while server.service.connections():
                await asyncio.sleep(0.001)
            server.stop()
            await serving
            assert server.booked == 0

    asyncio.run(asyncio.wait_for(run(), 20))
