"""Sessions in force: which token names one, and when each was last used, without a write to disk for every use."""

from __future__ import annotations

import asyncio
import logging
import time

from circleosd.auth import store
from circleosd.auth.store import Session
from circleosd.config import AuthSettings
from circleosd.database import Database
from circleosd.errors import CircleError, Denied
from circleosd.policy import Grant

log = logging.getLogger(__name__)

FLUSH = 60.0  # seconds that a use may be only in memory; a tenth of session_idle if that is shorter
MOST = 1000  # uses in memory that are written sooner, so that one write stays short

NO_SESSION = "the session is unknown, has expired or was revoked; log in again"


class Sessions:
    """Looks tokens up. A use that is lost in a crash lets its session expire up to `FLUSH` seconds too early."""

    def __init__(self, database: Database, settings: AuthSettings) -> None:
        self._database = database
        self._idle = settings.session_idle
        self._every = min(FLUSH, settings.session_idle / 10)
        self._uses: dict[bytes, float] = {}
        self._being_written: dict[bytes, float] = {}
        self._written = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    async def find(self, token: str, uid: int) -> tuple[Session, tuple[Grant, ...]]:
        """The session that `token` names and `uid` opened, and its user's rules. This is a use. Raises `Denied`."""
        hashed = store.token_hash(token)
        found = await self._database.read(
            lambda db: (session, store.grants(db, session.user)) if (session := store.session(db, hashed)) else None
        )
        now = time.time()
        if found is None or not self.in_force(found[0], now):
            raise Denied(NO_SESSION)
        if found[0].uid != uid:
            raise Denied(f"the session was opened by another uid than {uid}")
        self._note(hashed, now)
        return found

    def in_force(self, session: Session, now: float) -> bool:
        """Whether a session has not expired."""
        return now < self.expiry(session)

    def used(self, session: Session) -> float:
        """When a session was last used."""
        return max(session.used, self._uses.get(session.hash, 0.0), self._being_written.get(session.hash, 0.0))

    def expiry(self, session: Session) -> float:
        """When a session ends if it is not used any more."""
        return min(session.expires, self.used(session) + self._idle)

    def _note(self, hashed: bytes, now: float) -> None:
        self._uses[hashed] = now
        due = time.monotonic() - self._written >= self._every or len(self._uses) >= MOST
        if due and self._task is None:
            self._task = asyncio.create_task(self._flush_logged())

    async def _flush_logged(self) -> None:
        try:
            await self.flush()
        except CircleError as error:
            log.error("cannot keep when sessions were last used: %s", error)
        finally:
            self._task = None

    async def flush(self) -> None:
        """Write the uses that are only in memory."""
        self._written = time.monotonic()
        uses, self._uses = self._uses, {}
        if not uses:
            return
        self._being_written |= uses
        try:
            await self._database.write(lambda tx: store.note_uses(tx, uses))
        except BaseException:
            self._uses = uses | self._uses
            raise
        finally:
            self._being_written = {}
