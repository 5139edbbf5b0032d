"""A TCP socket whose last close(2) waits for its peer, which takes nothing (SO_LINGER, socket(7))."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator


@contextlib.contextmanager
def lingering(seconds: int) -> Iterator[socket.socket]:
    """One that waits for so long; whoever closes it last has to, so it must be passed on before it is closed."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as sock,
        listener.accept()[0],
    ):
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.send(bytes(65536))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
        yield sock
