"""Unix sockets of one's own, and waiting for what the kernel has to say."""

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
    """A Unix socket at the path `name`, until the end of the block. What somebody else has put there is left then."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, kind) as sock:
        with address(name) as reached:
            sock.bind(reached)
        path.chmod(mode)  # the umask has kept everybody out until now
        ours = path.lstat()
        try:
            yield sock
        finally:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.lstat(), ours):
                    path.unlink()


def listens(name: str) -> bool:
    """Whether somebody listens at the path `name`. A service that systemd would start on a connection is started."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)  # connections may wait for being accepted up to the limit (unix(7), EAGAIN)
        try:
            sock.connect(name)
        except BlockingIOError:
            return True
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True


async def readable(fd: int) -> None:
    """Wait until there is something to read, a connection waits, or a process has ended (pidfd_open(2))."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
