"""The cache of compilations: a directory of limited size that only the manager writes to.

The name of a file covers what it depends on (circleosd/worker/cachekey.py). Its contents are native code that Wasmtime
runs as it is, so a file is complete or missing, even after a power failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import stat
from pathlib import Path

log = logging.getLogger(__name__)

_NEW = ".new-"


class Incoming:
    """A compilation while it arrives. If it cannot be written to the disk, the only cost is time at the next start."""

    def __init__(self, directory: Path, key: str) -> None:
        self._directory = directory
        self._key = key
        self._file: int | None = None
        self._name = ""
        self.complete = False

    def write(self, data: memoryview) -> None:
        """Add a piece."""
        try:
            if not self._name:
                import tempfile  # with it comes OpenSSL, see chain.linked

                self._file, self._name = tempfile.mkstemp(prefix=_NEW, dir=self._directory)
                os.fchmod(self._file, 0o444)  # a worker, running as another user, maps it through its descriptor
            if self._file is not None and os.write(self._file, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as exc:
            log.warning("cannot cache a compilation: %s", exc)
            self.discard()

    def finish(self) -> None:
        """That was the last piece."""
        self.complete = self._file is not None

    async def keep(self) -> None:
        """Give the complete compilation its final name, durably. Cancelling only means not waiting for that."""
        assert self._file is not None
        loop, path = asyncio.get_running_loop(), self._directory / self._key
        kept = loop.run_in_executor(None, _keep, self._file, self._name, path)
        self._file = None  # from now on it belongs to a thread, which may not be free yet
        await asyncio.shield(kept)

    def discard(self) -> None:
        """Discard the data; after `keep`, there is nothing to discard."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
            with contextlib.suppress(OSError):  # the next start removes leftovers
                os.unlink(self._name)


def _keep(file: int, name: str, path: Path) -> None:
    try:
        os.fsync(file)
        os.replace(name, path)
    except OSError as exc:
        log.warning("cannot cache a compilation: %s", exc)
        with contextlib.suppress(OSError):
            os.unlink(name)
    finally:
        os.close(file)


class Compiled:
    """The cache in `directory`, of at most `most` bytes."""

    def __init__(self, directory: Path, most: int) -> None:
        self._directory = directory
        self._most = most
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def open(self, key: str) -> int | None:
        """A descriptor of a compilation, for reading; None if there is no usable one."""
        path = self._directory / key
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as exc:
            log.warning("cannot use a cached compilation: %s", exc)
            return None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            log.warning("cannot use a cached compilation: %s is not a regular file", path)
            os.close(descriptor)
            return None
        with contextlib.suppress(OSError):
            os.utime(descriptor)  # used now: the least recently used are removed first
        return descriptor

    def incoming(self, key: str) -> Incoming:
        """Where a new compilation goes."""
        return Incoming(self._directory, key)

    def sweep(self, *, starting: bool = False) -> None:
        """Remove the least recently used until the rest is within the limit; when `starting`, unfinished files too."""
        found = []
        try:
            paths = [*self._directory.iterdir()]
        except OSError as exc:
            log.warning("cannot limit the cache of compilations: %s", exc)
            return
        for path in paths:
            with contextlib.suppress(OSError):
                if path.name.startswith(_NEW):
                    if starting:
                        path.unlink(missing_ok=True)
                    continue
                status = path.lstat()
                if stat.S_ISREG(status.st_mode):
                    found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        removed = 0
        for _, size, path in sorted(found):
            if total <= self._most:
                break
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            total -= size
            removed += 1
        if removed and self._most:
            log.info(
                "removed %d cached compilations, to be redone if their plugins are called again: "
                "the cache may have %d bytes (plugins.cache)", removed, self._most,
            )  # fmt: skip
