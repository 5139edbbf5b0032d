"""Hashing passwords with argon2id (RFC 9106), in a bounded number of threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from argon2 import PasswordHasher, Type
from argon2.exceptions import InvalidHashError, VerificationError

T = TypeVar("T")

# 19 MiB is OWASP's least memory for argon2id; eight passes bring one hash to about 100 ms on the machines we measured.
MEMORY = 19 * 1024  # KiB
PASSES = 8


class Passwords:
    """Hashes and verifies, `concurrency` at a time; what comes beyond waits, so memory stays bounded."""

    def __init__(self, concurrency: int) -> None:
        self._hasher = PasswordHasher(time_cost=PASSES, memory_cost=MEMORY, parallelism=1, type=Type.ID)
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="argon2")
        self._decoy: str | None = None

    async def hash(self, password: str) -> str:
        """The password's hash in PHC string format, parameters and salt included."""
        return await self._run(self._hasher.hash, password)

    async def verify(self, stored: str | None, password: str) -> bool:
        """Whether `password` has the hash `stored`. None, for an unknown user, takes as long and is never right."""
        if stored is None:
            if self._decoy is None:
                self._decoy = await self.hash("")
            stored, known = self._decoy, False
        else:
            known = True
        return await self._run(self._matches, stored, password) and known

    def outdated(self, stored: str) -> bool:
        """Whether `stored` was made with other parameters than are in use now."""
        return self._hasher.check_needs_rehash(stored)

    def _matches(self, stored: str, password: str) -> bool:
        try:
            return self._hasher.verify(stored, password)
        except (VerificationError, InvalidHashError):
            return False

    async def _run(self, work: Callable[..., T], *args: str) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)
