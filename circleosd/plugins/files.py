"""The files of a request: passed as descriptors, or opened here by name.

The service opens a named file with its own rights, so only for callers who have the same rights: root and its own user.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Container, Iterator

from circleosd.api.contract import Mark, parameters, quoted
from circleosd.api.plugins import Load, Verify
from circleosd.discarding import discard
from circleosd.errors import BadRequest, NotFound, shortage
from circleosd.handlers import Files
from circleosd.policy import Caller, Peer


class Given:
    """The files of one request of `peer`. Names are relative to the working directory of that process."""

    def __init__(self, passed: dict[str, int], peer: Peer) -> None:
        self._passed = passed
        self._uid = peer.uid
        self._directory = f"/proc/{peer.pid}/cwd"
        self._closed = False
        self._closing = threading.Lock()

    def open(self, field: str, name: str) -> int:
        """A descriptor of a parameter's file; the caller closes it. Raises `NotFound`, `BadRequest`, `Limit`."""
        with self._closing:
            if self._closed:  # the request was abandoned, but this thread continues
                raise BadRequest(f"the request for {quoted(name)} has ended")
            if field in self._passed:
                return os.dup(self._passed[field])
        return _open(field, name, self._directory)

    def close(self) -> None:
        """Close the passed descriptors. From now on, nothing can be opened."""
        with self._closing:
            self._closed = True
            discard(self._passed.values(), self._uid)

    def read(self, field: str, name: str, most: int) -> bytes:
        """The content of a small file. Raises `NotFound`, `BadRequest` for one of more than `most` bytes."""
        descriptor = self.open(field, name)
        try:
            return _read(descriptor, name, most)
        finally:
            os.close(descriptor)

    def beside(self, field: str, name: str, most: int) -> bytes | None:
        """The same for an optional file, which is not looked for if other files were passed."""
        if field not in self._passed and (self._passed or not os.path.lexists(os.path.join(self._directory, name))):
            return None
        return self.read(field, name, most)


@contextlib.contextmanager
def given(request: Load | Verify, passed: Files, caller: Caller) -> Iterator[Given]:
    """Take the passed descriptors, which belong to the parameters in `files`, and close them in the end.

    Raises `BadRequest` for a file that is not a regular one, or that `caller` should have passed but did not.
    """
    taken: dict[str, int] = {}
    files = Given(taken, caller.peer)
    try:
        for name in request.files:
            descriptor = passed.take()
            if name in taken:
                discard([descriptor], caller.peer.uid)
                raise BadRequest(f"files names {name} twice")
            taken[name] = descriptor
            path = getattr(request, name)
            _require_file(descriptor, name, path if isinstance(path, str) else "")
        if not caller.privileged:
            _require_passed(request, taken)
        yield files
    finally:
        files.close()


def _require_passed(request: Load | Verify, taken: Container[str]) -> None:
    for item in parameters(type(request)):
        if Mark.FILE in item.marks and isinstance(getattr(request, item.name), str) and item.name not in taken:
            raise BadRequest(f"{item.name} names a file that this service does not open for you: pass its descriptor")


def _open(field: str, path: str, directory: str) -> int:
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its writer.
        fd = os.open(os.path.join(directory, path), os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(f"no such file: {path}") from None
    except (OSError, ValueError) as exc:
        why = f"cannot open {quoted(path)}: {getattr(exc, 'strerror', None) or exc}"
        if isinstance(exc, PermissionError):  # as for /proc/PID/cwd of another user's process, proc(5)
            why += "; this service opens it with its own rights, so pass its descriptor"
        raise shortage(exc) or BadRequest(why) from exc
    try:
        _require_file(fd, field, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _require_file(fd: int, field: str, path: str) -> None:
    """Raises `BadRequest` unless it is a regular file with contents: a pipe or a file in proc(5) may never end."""
    try:
        found = os.fstat(fd)
    except OSError as exc:  # possible on a user's own file system, fuse(8)
        raise BadRequest(f"cannot read {field} {quoted(path)}: {exc.strerror}") from exc
    if not stat.S_ISREG(found.st_mode):
        raise BadRequest(f"cannot read {field} {quoted(path)}: it is not a regular file")
    if not found.st_size:
        raise BadRequest(f"cannot read {field} {quoted(path)}: it is empty")


def _read(fd: int, what: str, most: int) -> bytes:
    content = b""
    try:
        while len(content) <= most and (chunk := os.pread(fd, most + 1, len(content))):
            content += chunk
    except OSError as exc:
        raise BadRequest(f"cannot read {what}: {exc.strerror}") from exc
    if len(content) > most:
        raise BadRequest(f"{what} is larger than {most} bytes")
    return content
