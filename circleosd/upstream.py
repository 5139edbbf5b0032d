"""Requests from one service to another, without blocking the event loop; above all, who a caller is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncGenerator
from typing import Any

from circleosd import wire
from circleosd.errors import CircleError, Denied, Limit, Timeout, Unavailable
from circleosd.fair import Fair
from circleosd.paths import address
from circleosd.policy import Caller, Grant, Peer, Role, higher, role_of_uid

MAX_REPLY = 16 * 1024 * 1024
CACHED = 1.0  # seconds for which a verified identity is cached; a revocation takes effect everywhere within this time
MAX_CACHED = 4096
# Concurrent questions to auth-service. They all come from this service's uid, whose connections it limits
# (server.max_connections_per_uid): a client that sends many tokens must not keep others from being identified.
ASKED_AT_ONCE = 16
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
    return wire.decode_reply(line).get("data")


async def follow(path: str, request: dict[str, Any]) -> AsyncGenerator[Any, None]:
    """Send a request whose reply is a stream; yield the `data` of each reply but the last.

    Raises the error in a reply, `Unavailable` if the service cannot be reached or goes away.
    """
    name = path.rpartition("/")[2].removesuffix(".sock")
    try:
        reader, writer = await _asked(path, request)
        try:
            while (line := await reader.readline()).endswith(b"\n"):
                reply = wire.decode_reply(line)
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


class Identities:
    """Turns a peer and its token into a caller by asking auth-service, at most once a second for each.

    `trusted` gives the uids of other CircleOSD services the grants that they need for their work. They, and this
    service's own uid, may state on behalf of which plugin they act.
    """

    def __init__(self, auth: str, *, timeout: float, trusted: dict[int, tuple[Grant, ...]] | None = None) -> None:
        self._auth = auth
        self._timeout = timeout
        self._asking = Fair(ASKED_AT_ONCE)
        self._own_uid = os.getuid()
        self._trusted = trusted or {}
        self._known: dict[tuple[int, bytes], tuple[float, asyncio.Task[Any]]] = {}

    async def identify(self, peer: Peer, token: str | None) -> Caller:
        """The caller of a connection. Raises `Denied` for a token without a valid session."""
        role, grants = role_of_uid(peer.uid, self._own_uid), self._trusted.get(peer.uid, ())
        vouches = token is None and (peer.uid == self._own_uid or bool(grants))
        caller = Caller(peer, role, grants=grants, privileged=role is not None, vouches=vouches)
        if token is None and (role or grants):
            return caller
        try:
            identity = await self._verified(peer, token)
        except Unavailable as exc:
            who = f"find out who uid {peer.uid} is" if token is None else "verify the session"
            raise Unavailable(f"cannot {who}: {exc}") from exc
        return caller._replace(
            role=higher(role, Role(identity["role"]) if identity["role"] else None),
            user=identity["user"],
            session=identity["session"],
            grants=(*caller.grants, *identity["grants"]),
        )

    async def _verified(self, peer: Peer, token: str | None) -> Any:
        """auth-service's answer, at most `CACHED` seconds old; concurrent callers wait for the same answer."""
        import hashlib  # see chain.linked

        key = (peer.uid, hashlib.sha256((token or "").encode()).digest())
        now = time.monotonic()
        since, asked = self._known.get(key, (0.0, None))
        if asked is None or now - since >= CACHED:
            if len(self._known) >= MAX_CACHED:
                self._known.clear()
            asked = asyncio.create_task(self._verify(peer, token))
            self._known[key] = (now, asked)
        answer = await asyncio.shield(asked)
        if isinstance(answer, CircleError):
            if not isinstance(answer, Denied) and self._known.get(key, (0.0, None))[1] is asked:
                del self._known[key]  # the next request may succeed
            raise type(answer)(str(answer))
        return answer

    async def _verify(self, peer: Peer, token: str | None) -> Any:
        """The answer or the error: the task of a caller that has gone must not hold an exception."""
        request: dict[str, Any] = {"action": "verify", "uid": peer.uid}
        if token is not None:
            request["presented"] = token
        try:
            async with asyncio.timeout(self._timeout), self._asking.turn(peer.uid):
                identity = await ask(self._auth, request, timeout=self._timeout)
                return {**identity, "grants": [Grant(**rule) for rule in identity["grants"]]}
        except TimeoutError:
            return Timeout(f"auth-service did not answer within {self._timeout:g} s; see: circlectl system status")
        except CircleError as error:
            return error
