"""Who a caller is, according to the users and sessions here; the other services ask for this (identities.py)."""

from __future__ import annotations

import os
import sqlite3

from circleosd.auth import store
from circleosd.auth.sessions import Sessions
from circleosd.auth.store import Session
from circleosd.database import Database, Transaction
from circleosd.handlers import Act
from circleosd.policy import Caller, Peer, higher, role_of_uid


class Callers:
    """Looks callers up. `services` are the uids of the services, which are known without a user."""

    def __init__(self, database: Database, sessions: Sessions, services: frozenset[int]) -> None:
        self._database = database
        self._sessions = sessions
        self._own_uid = os.getuid()
        self._services = services

    def is_ours(self, uid: int) -> bool:
        """Whether a uid is CircleOSD's own."""
        return uid == self._own_uid or uid in self._services

    async def identify(self, peer: Peer, token: str | None) -> Caller:
        """The caller of a connection to this service. Raises `Denied` for a token without a valid session."""
        caller = self._by_uid(peer)
        if token is None and (caller.privileged or peer.uid in self._services):
            return caller
        return (await self.looked_up(caller, token))[0]

    async def looked_up(self, caller: Caller, token: str | None) -> tuple[Caller, Session | None]:
        """A caller, by the token or, without one, by the uid, and the session of the token, which is thereby used.

        Raises `Denied`.
        """
        found = await self._database.read(lambda db: self._known(db, caller, token))
        if token is not None:
            self._sessions.note(token)
        return found

    def renew(self, tx: Transaction, act: Act) -> None:
        """Look the caller of an act up again. Raises `Denied` if the caller may not do this any more.

        An act may have waited since it was admitted, mostly for the hash of a password; a user who was disabled or
        deleted in the meantime must not change anything.
        """
        caller = self._by_uid(act.caller.peer)
        if not caller.privileged:
            act.go_on_as(self._known(tx, caller, act.token)[0])

    def _by_uid(self, peer: Peer) -> Caller:
        """The caller according to the peer's uid alone."""
        role = role_of_uid(peer.uid, self._own_uid)
        return Caller(peer, role, privileged=role is not None)

    def _known(
        self, db: sqlite3.Connection | Transaction, caller: Caller, token: str | None
    ) -> tuple[Caller, Session | None]:
        """As `looked_up`, within a transaction."""
        if token is None:
            account = store.account_of_uid(db, caller.peer.uid)
            if account is None:
                return caller, None
            return caller._replace(role=account.role, user=account.name, grants=store.grants(db, account.name)), None
        session = self._sessions.find(db, token, caller.peer.uid)
        role, grants = higher(caller.role, session.role), store.grants(db, session.user)
        return caller._replace(role=role, user=session.user, session=session.id, grants=grants), session
