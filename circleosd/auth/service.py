"""The actions of auth-service."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Sequence

from circleosd.api.auth import Create, Identity, ListUsers, Login, LoginUser, Logout, User, Verify, WhoAmI
from circleosd.auth import store
from circleosd.auth.passwords import Passwords
from circleosd.database import Database, Transaction
from circleosd.errors import Conflict, Denied, Exists
from circleosd.policy import Caller, Peer, Role, higher, role_of_uid
from circleosd.service import Act

NO_SESSION = "the session is unknown or has expired; log in again"


class AuthService:
    """Users, logins and sessions. `services` are the uids that may ask about others' tokens: the other services'."""

    def __init__(
        self, database: Database, passwords: Passwords, *, session_lifetime: float, services: frozenset[int]
    ) -> None:
        self._database = database
        self._passwords = passwords
        self._lifetime = session_lifetime
        self._own_uid = os.getuid()
        self._services = services | {0, self._own_uid}

    async def identify(self, peer: Peer, token: str | None) -> Caller:
        """The caller behind a connection to this service. Raises `Denied` for a token that names no session."""
        role = role_of_uid(peer.uid, self._own_uid)
        if token is not None:
            # Another service sends its own caller's token along; `verify` then compares the uids.
            session = await self._session(token, None if peer.uid in self._services else peer.uid)
            return Caller(peer, higher(role, Role(session.role)), session.user, session.id)
        if role is None and (user := await self._database.read(lambda db: store.user_by_uid(db, peer.uid))):
            return Caller(peer, Role(user["role"]), user["name"])
        return Caller(peer, role)

    async def _session(self, token: str, uid: int | None) -> store.Session:
        """The session in force that `token` names and `uid` opened (None: whoever). Raises `Denied`."""
        session = await self._database.read(lambda db: store.session_of(db, token, time.time()))
        if session is None:
            raise Denied(NO_SESSION)
        if uid is not None and session.uid != uid:
            raise Denied(f"the session was opened by another uid than {uid}")
        return session

    async def create(self, request: Create, act: Act) -> User:
        """Handler of `create`."""
        hashed = await self._passwords.hash(request.password)

        def work(tx: Transaction) -> User:
            user = store.insert_user(tx, request.name, hashed, request.role, request.uid, time.time())
            act.commit(tx, after={"role": user["role"], "uid": user["uid"]})
            return user

        def taken(db: sqlite3.Connection) -> str:
            name = db.execute("SELECT 1 FROM users WHERE name = ?", (request.name,)).fetchone()
            return f"the user {request.name}" if name else f"a user with the uid {request.uid}"

        try:
            return await self._database.write(work)
        except sqlite3.IntegrityError:
            raise Exists(f"there already is {await self._database.read(taken)}") from None

    async def login(self, request: LoginUser, act: Act) -> Login:
        """Handler of `login`."""
        stored = await self._database.read(lambda db: store.password_hash(db, request.name))
        if not await self._passwords.verify(stored, request.password) or stored is None:
            raise Denied(f"the name or the password is wrong, for {request.name}")
        rehashed = await self._passwords.hash(request.password) if self._passwords.outdated(stored) else None

        def work(tx: Transaction) -> Login:
            if rehashed is not None:
                store.set_password(tx, request.name, rehashed)
            opened = store.open_session(tx, request.name, act.caller.peer.uid, time.time(), self._lifetime)
            if opened is None:
                raise Conflict(f"the user {request.name} has been deleted in the meantime")
            token, session = opened
            act.commit(tx, after={"session": session.id, "expires": session.expires})
            return Login(user=session.user, role=session.role, token=token, expires=session.expires)

        return await self._database.write(work)

    async def verify(self, request: Verify, act: Act) -> Identity:
        """Handler of `verify`."""
        peer = act.caller.peer
        uid = peer.uid if request.uid is None else request.uid
        if uid != peer.uid and peer.uid not in self._services:
            raise Denied("only CircleOSD's own services may ask about another uid")
        if act.token is not None:
            session = await self._session(act.token, uid)
            return _identity(uid, session.user, session.role, session)
        user = await self._database.read(lambda db: store.user_by_uid(db, uid))
        return _identity(uid, user["name"] if user else None, user["role"] if user else None)

    async def whoami(self, request: WhoAmI, act: Act) -> Identity:
        """Handler of `whoami`."""
        caller = act.caller
        session = await self._session(act.token, None) if act.token is not None else None
        return _identity(caller.peer.uid, caller.user, caller.role, session)

    async def logout(self, request: Logout, act: Act) -> None:
        """Handler of `logout`."""
        session = act.caller.session
        if session is None:
            raise Conflict("there is no session to end: no token was sent")

        def work(tx: Transaction) -> None:
            store.close_session(tx, session)
            act.commit(tx, before={"session": session})

        act.object = act.caller.user
        await self._database.write(work)

    async def list(self, request: ListUsers, act: Act) -> Sequence[User]:
        """Handler of `list`."""
        return await self._database.read(store.users)


def _identity(uid: int, user: str | None, role: str | None, session: store.Session | None = None) -> Identity:
    return Identity(
        user=user,
        role=role,
        uid=uid,
        session=session.id if session else None,
        expires=session.expires if session else None,
        grants=[],
    )
