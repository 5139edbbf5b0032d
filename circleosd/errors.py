"""Every error that is sent over the wire: its stable code, and the exit status of `circlectl`.

The codes are a closed set, and clients may rely on them. The message is one sentence for people and may change.
"""

from __future__ import annotations

import errno
import os
from typing import ClassVar


class CircleError(Exception):
    """A failure with a stable code. `str(error)` is the sentence for the caller."""

    code: ClassVar[str]
    exit_status: ClassVar[int]


class Internal(CircleError):
    """A defect in CircleOSD; the details are in the service's log, never in the reply."""

    code = "internal"
    exit_status = 1


class BadRequest(CircleError):
    """The request is not of the form that its contract declares."""

    code = "bad-request"
    exit_status = 2


class UnknownAction(CircleError):
    """The service has no such action."""

    code = "unknown-action"
    exit_status = 3


class Denied(CircleError):
    """The caller may not do this."""

    code = "denied"
    exit_status = 4


class NotFound(CircleError):
    """The named object does not exist."""

    code = "not-found"
    exit_status = 5


class Exists(CircleError):
    """The name is taken."""

    code = "exists"
    exit_status = 6


class Conflict(CircleError):
    """The object's present state does not allow this."""

    code = "conflict"
    exit_status = 7


class Limit(CircleError):
    """A documented bound was reached."""

    code = "limit"
    exit_status = 8


class Timeout(CircleError):
    """The time allowed for this ran out."""

    code = "timeout"
    exit_status = 9


class PluginFailed(CircleError):
    """The plugin trapped, crashed or reported an error of its own."""

    code = "plugin-failed"
    exit_status = 10


class UnitFailed(CircleError):
    """systemd carried the job out, and the unit failed."""

    code = "unit-failed"
    exit_status = 11


class Unavailable(CircleError):
    """A service, or what it depends on, cannot be reached."""

    code = "unavailable"
    exit_status = 12


BY_CODE: dict[str, type[CircleError]] = {
    error.code: error
    for error in (
        Internal, BadRequest, UnknownAction, Denied, NotFound, Exists, Conflict, Limit, Timeout, PluginFailed,
        UnitFailed, Unavailable,
    )
}  # fmt: skip


def from_code(code: str, message: str) -> CircleError:
    """The error of a reply. An unknown code, from a newer peer, becomes `Internal`, with the code in the message."""
    if error := BY_CODE.get(code):
        return error(message)
    return Internal(f"{message} ({code})")


_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# How dlerror(3) ends for a module's library: the first for want of memory, too.
_NOT_LOADED = ("failed to map segment from shared object", *map(os.strerror, _SHORT))


def shortage(exc: BaseException) -> Limit | None:
    """The resource that the machine lacks according to an exception; None for any other exception."""
    match exc:
        case MemoryError():
            what = "no memory is left"
        case RuntimeError(args=("can't start new thread",)):  # it has no type of its own
            what = "no more threads can be started"
        case OSError(errno=number) if number in _SHORT:
            what = exc.strerror or str(exc)
        case ImportError(msg=str(text)) if text.endswith(_NOT_LOADED):
            what = text
        case _:
            return None
    return Limit(f"{what} in this service; try again later")


def unreadable(path: str | os.PathLike[str], why: OSError | str) -> str:
    """Why the file at `path` cannot be read, and what to do if its mode is the reason (root could read it anyway).

    `why` is the error, or a program's message in the words of strerror(3).
    """
    if isinstance(why, OSError):
        why = why.strerror or str(why)
    return f"{why}; see: chmod a+rX {os.path.dirname(path)} {path}" if why == os.strerror(errno.EACCES) else why
