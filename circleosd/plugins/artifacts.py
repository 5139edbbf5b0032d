"""The artifacts of plugins: files in a directory, by digest. Which of them are needed is in SQLite (store.py)."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from circleosd.errors import BadRequest, Limit, Unavailable, shortage

log = logging.getLogger(__name__)

CHUNK = 1024 * 1024


class Staged(NamedTuple):
    """An artifact copied into the store's directory, not yet under its final name."""

    path: Path
    digest: str
    size: int
    head: bytes


class Artifacts:
    """A directory of files named by their sha256."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def stage(self, source: int, most: int) -> Staged:
        """Copy the file of the descriptor `source` from its start, whatever its current position.

        Raises `Limit` if it is larger than `most` bytes, `BadRequest` if it cannot be read, `Unavailable` if the copy
        cannot be written.
        """
        import tempfile  # with it comes OpenSSL, see chain.linked

        with self._writing():
            fd, name = tempfile.mkstemp(prefix=".staged-", dir=self._directory)
            try:
                with os.fdopen(fd, "wb") as out:
                    # A worker, running as another user, opens the file again through its descriptor (dlopen(3)). The
                    # directory keeps everybody else away.
                    os.fchmod(fd, 0o444)
                    copied = _copy(source, out, most)
                    out.flush()
                    os.fsync(out.fileno())
            except BaseException:
                os.unlink(name)
                raise
        return Staged(Path(name), *copied)

    def keep(self, staged: Staged) -> None:
        """Give a staged artifact its final name, durably. Raises `Unavailable`."""
        with self._writing():
            os.replace(staged.path, self._directory / staged.digest)
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise Unavailable(f"cannot store the artifact in {self._directory}: {exc.strerror or exc}") from exc

    def discard(self, staged: Staged) -> None:
        """Remove a staged artifact, unless it was kept. If that fails, the next `sweep` removes it."""
        _remove(staged.path)

    def open(self, digest: str) -> int:
        """A descriptor of the artifact, or of a staged one by its file name, for reading.

        Raises `Unavailable` if it is missing, `Limit` if no more files can be opened.
        """
        try:
            fd = os.open(self._directory / digest, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as exc:
            raise shortage(exc) or Unavailable(
                f"cannot read the artifact {digest} in {self._directory}: {exc.strerror or exc}; load the plugin again"
            ) from exc
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise Unavailable(f"cannot read the artifact {digest} in {self._directory}: it is not a regular file")
        return fd

    def sweep(self, used: set[str]) -> None:
        """Remove artifacts that no row names, and those staged when a manager died, as far as that is possible."""
        try:
            found = [path for path in self._directory.iterdir() if path.name not in used]
        except OSError as exc:
            log.warning("cannot look for unused artifacts: %s", exc)
            return
        for path in found:
            _remove(path)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        log.warning("cannot remove an unused artifact: %s", exc)


def _copy(source: int, out: BinaryIO, most: int) -> tuple[str, int, bytes]:
    """Copy a file; return its sha256, its size and its first bytes. Raises `Limit`, `BadRequest`."""
    import hashlib  # see chain.linked

    digest, size, head = hashlib.sha256(), 0, b""
    while chunk := _read(source, size):
        head = head or chunk[:16]
        size += len(chunk)
        if size > most:
            raise Limit(f"the artifact is larger than {most} bytes (plugins.max_artifact)")
        digest.update(chunk)
        out.write(chunk)
    return digest.hexdigest(), size, head


def _read(source: int, offset: int) -> bytes:
    try:
        return os.pread(source, CHUNK, offset)
    except OSError as exc:
        raise BadRequest(f"cannot read the artifact: {exc.strerror or exc}") from exc
