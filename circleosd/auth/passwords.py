"""Passwords: which ones are accepted, and hashing them with argon2id (RFC 9106) in a limited number of threads."""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import os
import threading
import unicodedata
from collections.abc import Callable
from functools import cache, cached_property
from typing import TYPE_CHECKING, TypeVar

from circleosd.config import AuthSettings
from circleosd.errors import BadRequest, Unavailable
from circleosd.fair import Fair
from circleosd.places import Places
from circleosd.threads import Threads

if TYPE_CHECKING:
    from argon2 import PasswordHasher

T = TypeVar("T")

COMMON = f"{os.path.dirname(__file__)}/common_passwords.txt"
NICE = 10
MOST_AT_ONCE = 64  # passwords of one uid being hashed or waiting; the queue (auth.login_queue) is longer


class Passwords:
    """Hashes and verifies, `settings.hashing` passwords at a time; the number of waiting ones is limited too.

    `uid` is whose password it is; None may use any number of places.
    """

    def __init__(self, settings: AuthSettings) -> None:
        self._settings = settings
        self._threads = Threads(settings.hashing, "argon2", _give_way)
        self._places = Places("passwords", settings.hashing + settings.login_queue, MOST_AT_ONCE, "auth.login_queue")
        self._turns = Fair(settings.hashing)
        self._decoy = _decoy(settings)

    async def hash(self, password: str, uid: int | None) -> str:
        """The password's hash in PHC string format, parameters and salt included. Raises `Limit`, `Unavailable`."""
        return await self._run(uid, lambda text: self._hasher.hash(text), normal(password))

    async def verify(self, stored: str | None, password: str, uid: int | None) -> bool:
        """Whether `password` has the hash `stored`. None, for an unknown user, takes equally long and is never right.

        Raises `Limit`, `Unavailable`.
        """
        right = await self._run(uid, self._matches, stored or self._decoy, normal(password))
        return right and stored is not None

    def outdated(self, stored: str) -> bool:
        """Whether `stored` was made with parameters other than the current ones."""
        return self._hasher.check_needs_rehash(stored)

    @cached_property
    def _hasher(self) -> PasswordHasher:
        """argon2 is imported for the first password: most starts of the service only have to verify a session."""
        from argon2 import PasswordHasher, Type

        settings = self._settings
        return PasswordHasher(
            time_cost=settings.hash_passes, memory_cost=settings.hash_memory, parallelism=1, type=Type.ID
        )

    def _matches(self, stored: str, password: str) -> bool:
        from argon2.exceptions import InvalidHashError, VerifyMismatchError

        try:
            return self._hasher.verify(stored, password)
        except (VerifyMismatchError, InvalidHashError, UnicodeEncodeError):  # the last: what is stored is not ASCII
            return False

    async def _run(self, uid: int | None, work: Callable[..., T], *args: str) -> T:
        with self._places.held(uid):
            async with self._turns.turn(uid):
                return await asyncio.get_running_loop().run_in_executor(self._threads, _explained, work, *args)


def _explained(work: Callable[..., T], *args: str) -> T:
    """Do `work` with a password. Raises `Unavailable` if argon2 fails, for example for lack of memory."""
    from argon2.exceptions import Argon2Error

    try:
        return work(*args)
    except Argon2Error as exc:
        raise Unavailable(f"cannot check the password: {exc}") from exc


def _give_way() -> None:
    """Lower this thread's priority: verifying a token goes before hashing a password."""
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)  # on Linux the thread's own, setpriority(2)


def _decoy(settings: AuthSettings) -> str:
    """A hash with the current parameters that no password has; making it is free."""
    salt, digest = (binascii.b2a_base64(os.urandom(size), newline=False).rstrip(b"=").decode() for size in (16, 32))
    return f"$argon2id$v=19$m={settings.hash_memory},t={settings.hash_passes},p=1${salt}${digest}"


def normal(password: str) -> str:
    """The password as it is hashed, independent of how a keyboard composes its letters (NFKC, SP 800-63B)."""
    return unicodedata.normalize("NFKC", password)


@cache
def common() -> frozenset[str]:
    """The passwords that everybody tries first, in lower case."""
    with open(COMMON, encoding="utf-8") as file:
        lines = file.read().splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def check(password: str, name: str) -> None:
    """Refuse passwords that are guessed first. Raises `BadRequest`, which does not quote the password."""
    plain = normal(password).casefold()
    core = _core(plain)
    if plain in common() or core in common():
        raise BadRequest("the password is too common; choose another")
    few = len(set(plain)) < 4 or (not core and len(plain) < 16)
    if few or (core and core in (_core(name.casefold()), "circleosd")):
        raise BadRequest("the password is too easy to guess: the user's name, a few digits or one letter repeated")


def _core(text: str) -> str:
    """`text` without the digits and signs that people put around a word."""
    return text.strip("0123456789!?.-_ ")
