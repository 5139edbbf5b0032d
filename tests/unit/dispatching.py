"""Requests to services without sockets: bytes in, bytes out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from circleosd.api import auth as accounts
from circleosd.api import registry as contracts
from circleosd.api.common import Event
from circleosd.auth.callers import Callers
from circleosd.auth.service import AuthService
from circleosd.auth.sessions import Sessions
from circleosd.config import AuthSettings
from circleosd.database import Database
from circleosd.ledger import Ledger
from circleosd.policy import Peer
from circleosd.registry.catalog import OWN, Catalog, Entry
from circleosd.registry.service import RegistryService
from circleosd.service import Service
from tests.unit.fakes import ROOT, NoFiles, Units, identify


class _Dispatched:
    """A service without sockets: `ask` takes a request and returns its reply."""

    service: Service
    ledger: Ledger
    database: Database

    def ask(self, request: bytes | dict[str, Any], peer: Peer = ROOT) -> dict[str, Any]:
        line = request if isinstance(request, bytes) else json.dumps(request).encode()
        reply = asyncio.run(reply_to(self.service, line, peer))
        assert reply.endswith(b"\n")
        result: dict[str, Any] = json.loads(reply)
        return result

    def history(self) -> list[tuple[str, str, str | None]]:
        rows = self.ask({"action": "history"})["data"]
        return [(row["phase"], row["action"], row["object"]) for row in rows]


class Registry(_Dispatched):
    """The registry of a few services."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.units = Units(nginx="active")
        self.mirrored: list[Event] = []
        entries = {entry.name: entry for entry in OWN}
        entries |= {"nginx": Entry("nginx", "nginx.service"), "ghost": Entry("ghost", "ghost.service")}
        entries["readonly"] = Entry("readonly", "nginx.service", verbs=["restart"])
        self.ledger = Ledger(database, contracts.SERVICE, self.mirrored.append)
        self.service = Service(
            contracts.SERVICE,
            contracts.GROUP,
            contracts.CONTRACTS,
            RegistryService(lambda: Catalog(entries, ()), self.units),
            identify=identify,
            ledger=self.ledger,
            request_timeout=60,
        )


class Accounts(_Dispatched):
    """auth-service, whose hashes cost little; `services` are the uids of the others."""

    def __init__(self, database: Database, services: frozenset[int] = frozenset(), login_tries: int = 5) -> None:
        self.database = database
        settings = AuthSettings(hash_memory=64, hash_passes=1, login_tries=login_tries)
        sessions = Sessions(database, settings)
        callers = Callers(database, sessions, services)
        self.users = AuthService(database, settings, sessions, callers)
        self.ledger = Ledger(database, accounts.SERVICE, lambda event: None)
        self.service = Service(
            accounts.SERVICE,
            accounts.GROUP,
            accounts.CONTRACTS,
            self.users,
            identify=callers.identify,
            ledger=self.ledger,
            request_timeout=60,
        )


async def reply_to(service: Service, line: bytes, peer: Peer) -> bytes:
    """The one line that a request is answered with."""
    reply = await service.dispatch(line, peer, NoFiles())
    assert not isinstance(reply, AsyncGenerator)
    return reply
