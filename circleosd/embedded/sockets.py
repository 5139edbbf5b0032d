"""Unix sockets that we own, and waiting for events of the kernel."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from circleosd.paths import address


@contextlib.contextmanager
def bound(name: str, kind: socket.SocketKind, mode: int = 0o600) -> Iterator[socket.socket]:
    """A Unix socket at the path `name` during the block. A file that somebody else put there is kept."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, kind) as sock:
        with address(name) as reached:
            sock.bind(reached)
        path.chmod(mode)  # until now the umask has kept everybody out
        ours = path.lstat()
        try:
            yield sock
        finally:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.lstat(), ours):
                    path.unlink()


def listens(name: str) -> bool:
    """Whether somebody listens at the path `name`. This starts a service that systemd starts on a connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)  # as many connections as the limit may be waiting to be accepted (unix(7), EAGAIN)
        try:
            sock.connect(name)
        except BlockingIOError:
            return True
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True


async def readable(fd: int) -> None:
    """Wait until there is data to read, a connection to accept, or a process has ended (pidfd_open(2))."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
