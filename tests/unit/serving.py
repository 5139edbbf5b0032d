"""A server in the test's own process, services that answer as they are told, and peers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from circleosd.config import ServerSettings
from circleosd.connection import SMALL, Dispatcher
from circleosd.passing import PIECE, Descriptors
from circleosd.policy import Peer
from circleosd.server import Server
from tests.waiting import until


class Silent:
    """A service manager that nobody looks at."""

    watchdog_interval: float | None = None

    def ready(self, status: str) -> None: ...

    def status(self, text: str) -> None: ...

    def alive(self) -> None: ...

    def stopping(self) -> None: ...


class Patient:
    """A service that answers some requests only when it is told to `go` on. `streams` counts those that are open."""

    name = "patient"
    requests = 0
    connections: Callable[[], int] = staticmethod(lambda: 0)

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.streams = 0

    async def dispatch(self, line: bytes, peer: Peer, files: Descriptors) -> bytes | AsyncGenerator[bytes, None]:
        self.requests += 1
        if line != b"now":
            await self.go.wait()
        return self._stream() if line == b"stream" else b"reply\n"

    async def _stream(self) -> AsyncGenerator[bytes, None]:
        self.streams += 1
        try:
            await asyncio.Event().wait()
            yield b""
        finally:
            self.streams -= 1


def connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    sock.connect(path)
    return sock


async def ask(sock: socket.socket) -> bytes:
    """The reply to what is answered at once."""
    sock.send(b"now\n")
    return await asyncio.get_running_loop().sock_recv(sock, PIECE)


async def received(sock: socket.socket) -> bytes:
    """All that comes until the service closes."""
    data = b""
    while piece := await asyncio.get_running_loop().sock_recv(sock, PIECE):
        data += piece
    return data


@contextlib.asynccontextmanager
async def serving(
    service: Dispatcher,
    path: str,
    settings: ServerSettings | None = None,
    *,
    max_line: int = 1 << 20,
    manager: Silent | None = None,
) -> AsyncIterator[Server]:
    """A server of `service` at `path`."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(100)
        settings = settings or ServerSettings()
        server = Server(service, listener, settings, max_line=max_line, manager=manager or Silent())
        running = asyncio.create_task(server.run())
        yield server
        server.stop()
        await running


@contextlib.asynccontextmanager
async def served(
    service: Patient, path: str, settings: ServerSettings | None = None
) -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    """Two peers of a server of `service`, which takes short lines."""
    async with serving(service, path, settings, max_line=SMALL):
        with connected(path) as one, connected(path) as other:
            yield one, other
        await until(lambda: not service.connections())
