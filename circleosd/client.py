"""One blocking call to a service. Imports nothing heavy, because every `circlectl` command imports this module."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from circleosd import wire
from circleosd.errors import Timeout, Unavailable

CHUNK = 256 * 1024
UNMAPPED = 65534  # the gid shown for groups that a user namespace does not map (user_namespaces(7))
CONNECT = 60.0  # seconds to connect and until the request is read, if replies may take any time


class NotListening(Unavailable):
    """Nobody listens on the service's socket."""


def call(
    path: str,
    request: dict[str, Any],
    *,
    files: Sequence[int] = (),
    timeout: float | None = None,
    stream: bool = False,
    said: Callable[[str], None] = lambda message: None,
) -> Iterator[Any]:
    """Send `request` to the service at `path`; yield the `data` of each reply (only one unless it is a stream).

    `files` are descriptors to pass along. `timeout` is how many seconds a reply may take (None: no limit once the
    request was read, since the service itself limits the time). `stream` says that the reply is a stream. `said` is
    called with the message that a reply may carry. Raises the error in the reply, `NotListening` if nobody listens,
    `Unavailable` if the service cannot be reached otherwise or goes away, `Internal` if it sends what is not a reply,
    `Timeout`.
    """
    name = path.rpartition("/")[2].removesuffix(".sock")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            # Blocking, with a timeout: otherwise a full queue would be an error at once (EAGAIN, connect(2)).
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(timeout or CONNECT) + 1, 0))
            sock.connect(path)
            sock.settimeout(timeout or CONNECT)
            _send(sock, wire.encode(request), files)
            if timeout is None:
                _wait_for_a_reader(sock)
            yield from _replies(sock, name, said, streaming=stream)
    except (TimeoutError, BlockingIOError) as exc:
        raise Timeout(f"no reply from {name} in time; see: circlectl system status") from exc
    except (FileNotFoundError, ConnectionRefusedError) as exc:
        raise NotListening(f"{name} is not listening at {path}") from exc
    except PermissionError as exc:
        raise Unavailable(_refusal(path)) from exc
    except OSError as exc:
        raise Unavailable(f"cannot talk to {name}: {exc.strerror or exc}") from exc


def _send(sock: socket.socket, line: bytes, files: Sequence[int]) -> None:
    """Send the line. A peer that refuses it early has already said why, so ignore a broken pipe and read the reply."""
    try:
        if files:
            line = line[socket.send_fds(sock, [line], files) :]
        sock.sendall(line)
    except (BrokenPipeError, ConnectionResetError):
        return


def _wait_for_a_reader(sock: socket.socket) -> None:
    """Wait for a reply, or until the request was read.

    Raises TimeoutError if nobody reads it, as when systemd listens for a service that cannot run.
    """
    try:
        sock.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        import fcntl
        import termios

        if any(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4))):  # what the peer has not read yet, also before accept(2)
            raise
    sock.settimeout(None)


def _refusal(path: str) -> str:
    """Why the kernel does not let this process connect, and what to do."""
    import grp
    import stat

    try:
        found = os.stat(path)
        if found.st_gid == UNMAPPED:
            why = "this user namespace (PrivateUsers=, systemd.exec(5)) does not show which"
            return f"may not connect to {path}: only the members of its group may, and {why}"
        group = grp.getgrgid(found.st_gid).gr_name if found.st_mode & stat.S_IWGRP else None
    except (OSError, KeyError):  # in a directory of another user, or of a group without a name
        group = None
    if group is None:
        return f"cannot connect to {path}: only its owner may; choose another CircleOSD with --scope"
    return (
        f"cannot connect to {path}: only members of the group {group} may; "
        f"as root: usermod --append --groups {group} USER, who then has to log in again; "
        "or use your own CircleOSD: --scope user"
    )


def _replies(sock: socket.socket, name: str, said: Callable[[str], None], *, streaming: bool) -> Iterator[Any]:
    buffer = wire.LineBuffer(1 << 30)  # the service is trusted; its own limits are far below
    while True:
        while (line := buffer.next_line()) is None:
            data = sock.recv(CHUNK)
            if not data and streaming:
                raise Unavailable(f"{name} ended the stream")
            if not data:
                raise ConnectionResetError("it closed the connection without a reply")
            buffer.feed(data)
        reply = wire.decode_reply(line, name)
        if message := reply.get("message"):
            said(str(message))
        yield reply.get("data")
        if not (streaming := bool(reply.get("more"))):
            return
