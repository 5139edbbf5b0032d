"""Requests from one service to another, without blocking the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator
from typing import Any

from circleosd import wire
from circleosd.errors import Limit, Timeout, Unavailable
from circleosd.paths import address

MAX_REPLY = 16 * 1024 * 1024
QUEUE_FULL = 0.01  # seconds until a listener with a full queue is tried again


async def ask(path: str, request: dict[str, Any], *, timeout: float) -> Any:
    """Send one request to the service at `path` and return its `data`.

    Raises the error in the reply, `Unavailable` if the service cannot be reached, `Timeout` after `timeout` seconds,
    `Limit` for a reply of more than `MAX_REPLY` bytes.
    """
    name = path.rpartition("/")[2].removesuffix(".sock")
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await _asked(path, request)
            try:
                line = await reader.readline()
            finally:
                writer.close()
    except TimeoutError as exc:
        raise Timeout(f"{name} did not answer within {timeout:g} s; see: circlectl system status") from exc
    except OSError as exc:
        raise _unreachable(name, path, exc) from exc
    except ValueError as exc:
        raise Limit(f"the answer of {name} has more than {MAX_REPLY} bytes") from exc
    if not line.endswith(b"\n"):  # it may have died while replying
        raise Unavailable(f"{name} closed the connection without {'the whole' if line else 'an'} answer")
    return wire.decode_reply(line, name).get("data")


async def follow(path: str, request: dict[str, Any]) -> AsyncGenerator[Any, None]:
    """Send a request whose reply is a stream; yield the `data` of each reply but the last.

    Raises the error in a reply, `Unavailable` if the service cannot be reached or goes away.
    """
    name = path.rpartition("/")[2].removesuffix(".sock")
    try:
        reader, writer = await _asked(path, request)
        try:
            while (line := await reader.readline()).endswith(b"\n"):
                reply = wire.decode_reply(line, name)
                if not reply.get("more"):
                    return
                yield reply.get("data")
        finally:
            writer.close()
    except OSError as exc:
        raise _unreachable(name, path, exc) from exc
    raise Unavailable(f"{name} ended the stream")


async def _asked(path: str, request: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which a request was sent. Raises OSError.

    A peer that refuses it early has already said why, so a broken pipe is ignored.
    """
    sock = await connect(path)
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            await asyncio.get_running_loop().sock_sendall(sock, wire.encode(request))
        return await asyncio.open_unix_connection(sock=sock, limit=MAX_REPLY)
    except BaseException:
        sock.close()
        raise


def _unreachable(name: str, path: str, error: OSError) -> Unavailable:
    """The caller used another service, whose log and state would not explain this error."""
    if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
        return Unavailable(f"{name} is not listening at {path}; see: circlectl system status")
    return Unavailable(f"cannot reach {name}: {error.strerror or error}")


async def connect(path: str) -> socket.socket:
    """A connected non-blocking socket. While the listener's queue is full, wait for a place in it.

    asyncio mistakes that state, EAGAIN in connect(2), for a connection in progress, and then fails. Raises OSError.
    """
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with address(path) as reached:
                sock.connect(reached)
            return sock
        except BlockingIOError:
            sock.close()
            await asyncio.sleep(QUEUE_FULL)
        except BaseException:
            sock.close()
            raise
