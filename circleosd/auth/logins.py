"""Failed logins: what they count against, and how long the next one has to wait."""

from __future__ import annotations

import contextlib
import math
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence

from circleosd.auth import backoff, store
from circleosd.auth.backoff import Failures
from circleosd.auth.store import Account
from circleosd.config import AuthSettings
from circleosd.database import Transaction
from circleosd.errors import Limit
from circleosd.policy import Caller

Key = tuple[str, str]


class Logins:
    """Back-off for each user and each peer uid.

    The failures of a peer count against its uid, for all user names together. They also count against the user name,
    unless that user is bound to this uid or last logged in from it: so a stranger who fails on purpose locks nobody out
    at home. A success clears only the failures for that user name; otherwise anybody with an account could guess the
    passwords of others forever by logging in in between. Peers who are admin by their uid neither wait nor count.
    """

    def __init__(self, settings: AuthSettings) -> None:
        self._tries = settings.login_tries
        self._lockout = settings.login_lockout
        self._in_hand: Counter[Key] = Counter()

    def keys(self, name: str, caller: Caller, account: Account | None) -> list[Key]:
        """What an attempt counts against: the peer, the peer for this user name, and perhaps the user."""
        if caller.privileged:
            return []
        uid = caller.peer.uid
        at_home = account is not None and uid in (account.uid, account.last_uid)
        return [("peer", str(uid)), _part(uid, name), *([] if at_home else [("user", name.lower())])]

    def locked_until(self, connection: sqlite3.Connection, account: Account, now: float) -> float | None:
        """Until when logins as this user are refused, at home or elsewhere."""
        seconds = max(self._wait(store.failures(connection, *key), now) for key in _keys_of(account))
        return now + seconds if seconds else None

    def forgive(self, tx: Transaction, account: Account) -> None:
        """Forget all failures that keep this user from logging in, at home or elsewhere."""
        for kind, key in _keys_of(account):
            store.forget_failures(tx, kind, key)

    def _wait(self, failures: Failures, now: float) -> float:
        return backoff.wait(failures, now, tries=self._tries, lockout=self._lockout)

    @contextlib.contextmanager
    def attempt(self, keys: Sequence[Key], found: Sequence[Failures], now: float) -> Iterator[None]:
        """One attempt, while it is checked. `found`: the failures under each of `keys`. Raises `Limit`.

        After a failure, concurrent attempts count as failures too, so that their passwords need not be checked.
        """
        for key, failures in zip(keys, found, strict=True):
            count = backoff.in_force(failures, now, self._lockout)
            if seconds := self._wait(failures, now):
                raise _too_many(seconds)
            if count and self._in_hand[key] and count + self._in_hand[key] >= self._tries:
                raise Limit("too many logins at once after failed ones; try again in 1 s")
        self._in_hand.update(keys)
        try:
            yield
        finally:
            self._in_hand.subtract(keys)
            for key in keys:
                if not self._in_hand[key]:
                    del self._in_hand[key]

    def tell(self, tx: Transaction, keys: Sequence[Key], now: float, *, right: bool) -> None:
        """Call this before revealing whether a password was `right`: counts a failure. Raises `Limit`.

        Concurrent attempts have counted by now, and nothing is revealed to a caller who would have to wait: many
        attempts at once give no more guesses than the same number one after another.
        """
        found = [store.failures(tx, *key) for key in keys]
        if seconds := max(self._wait(failures, now) for failures in found):
            raise _too_many(seconds)
        if not right:
            for (kind, key), failures in zip(keys, found, strict=True):
                count = backoff.in_force(failures, now, self._lockout)
                store.set_failures(tx, kind, key, Failures(count + 1, now))

    def succeeded(self, tx: Transaction, keys: Sequence[Key], now: float) -> None:
        """Forget the failures for this user name."""
        if not keys:
            return
        peer, part = keys[:2]
        failures = store.failures(tx, *peer)
        rest = failures.number - backoff.in_force(store.failures(tx, *part), now, self._lockout)
        for kind, key in keys:
            store.forget_failures(tx, kind, key)
        if rest > 0:
            store.set_failures(tx, *peer, failures._replace(number=rest))


def _part(uid: int, name: str) -> Key:
    """The key for those failures of a peer that were logins as this user."""
    return "part", f"{uid} {name.lower()}"


def _keys_of(account: Account) -> list[Key]:
    """The keys under which failed logins as this user may have been counted."""
    name, uids = account.name.lower(), [uid for uid in {account.uid, account.last_uid} if uid is not None]
    return [("user", name), *(("peer", str(uid)) for uid in uids), *(_part(uid, name) for uid in uids)]


def _too_many(seconds: float) -> Limit:
    return Limit(f"too many failed logins; try again in {math.ceil(seconds)} s")
