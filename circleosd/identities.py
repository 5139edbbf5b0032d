"""Who a caller is: every service but auth-service asks auth-service."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from circleosd import upstream
from circleosd.errors import CircleError, Denied, Timeout, Unavailable
from circleosd.fair import Fair
from circleosd.policy import Caller, Grant, Peer, Role, higher, role_of_uid

CACHED = 1.0  # seconds for which a verified identity is cached; a revocation takes effect everywhere within this time
MAX_CACHED = 4096
# Concurrent questions to auth-service. They all come from this service's uid, whose connections it limits
# (server.max_connections_per_uid): a client that sends many tokens must not keep others from being identified.
ASKED_AT_ONCE = 16


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
                identity = await upstream.ask(self._auth, request, timeout=self._timeout)
                return {**identity, "grants": [Grant(**rule) for rule in identity["grants"]]}
        except TimeoutError:
            return Timeout(f"auth-service did not answer within {self._timeout:g} s; see: circlectl system status")
        except CircleError as error:
            return error
