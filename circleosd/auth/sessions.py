"""Valid sessions: which token belongs to one, and when each was last used, without writing every use to the disk."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time

from circleosd.auth import store
from circleosd.auth.store import Session
from circleosd.config import AuthSettings
from circleosd.database import Database, Transaction
from circleosd.errors import Denied, Unavailable

FLUSH = 60.0  # how many seconds a use may be held in memory only; at most a tenth of session_idle
MOST = 1000  # number of uses in memory that are written at once, to keep each write short

NO_SESSION = "the session is unknown, has expired or was revoked; log in again, or drop it: circlectl user logout"


class Sessions:
    """Looks up tokens. If a use is lost in a crash, its session may expire up to `FLUSH` seconds too early."""

    def __init__(self, database: Database, settings: AuthSettings) -> None:
        self._database = database
        self._idle = settings.session_idle
        self._most = settings.max_sessions
        self._every = min(FLUSH, settings.session_idle / 10)
        self._uses: dict[bytes, float] = {}
        self._written = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    def find(self, db: sqlite3.Connection | Transaction, token: str, uid: int) -> Session:
        """The session of `token` that was opened by `uid`. Raises `Denied`."""
        found = store.session(db, store.token_hash(token))
        if found is None or not self.in_force(found, time.time()):
            raise Denied(NO_SESSION)
        if found.uid != uid:
            raise Denied(f"the session was not opened by uid {uid}")
        return found

    def in_force(self, session: Session, now: float) -> bool:
        """Whether a session has not expired.

        A session opened while the clock was ahead would last too long; once the clock is set back, it no longer counts.
        """
        return session.created - self._idle <= now < self.expiry(session)

    def used(self, session: Session) -> float:
        """When a session was last used."""
        return max(session.used, self._uses.get(session.hash, 0.0))

    def expiry(self, session: Session) -> float:
        """When a session ends if it is not used again."""
        return min(session.expires, self.used(session) + self._idle)

    def make_room(self, tx: Transaction, user: str, now: float) -> None:
        """Make room for another session of `user`: end those that would be too many, the least recently used first.

        Those that are not in force come before them: if the clock was ahead, they seem to have been used last.
        """
        found = store.sessions(tx, user, -1)
        by_use = sorted(found, key=lambda item: (self.in_force(item, now), self.used(item)), reverse=True)
        for session in by_use[self._most - 1 :]:
            store.close_session(tx, session)

    def note(self, token: str) -> None:
        """Note that the session of `token`, which exists, has just been used."""
        self._uses[store.token_hash(token)] = time.time()
        due = time.monotonic() - self._written >= self._every or len(self._uses) >= MOST
        if due and self._task is None:
            self._task = asyncio.create_task(self._flush_soon())

    async def _flush_soon(self) -> None:
        try:
            with contextlib.suppress(Unavailable):  # logged by the database; they are written later
                await self.flush()
        finally:
            self._task = None

    async def flush(self) -> None:
        """Write the uses that are only in memory to the database."""
        self._written = time.monotonic()
        if uses := dict(self._uses):
            await self._database.write(lambda tx: store.note_uses(tx, uses))
            self._uses = {hashed: used for hashed, used in self._uses.items() if used != uses.get(hashed)}
