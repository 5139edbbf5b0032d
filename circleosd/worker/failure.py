"""Failures of plugin code: the one exception that is used throughout the worker, and checks for UTF-8."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar

from circleosd.worker.frames import Buffer, Code, Failed
from circleosd.worker.limits import NO_MEMORY

# A plugin's own error message may be as long as a reply; people need not see all of it.
MAX_MESSAGE = 64 << 10

T = TypeVar("T")


class PluginFailure(Exception):
    """A load, a call or an instance failed, for a reason that the caller should see."""

    def __init__(self, code: Code, message: str, backtrace: list[str] | None = None, *, reported: bool = False) -> None:
        super().__init__(message)
        self.code: Code = code
        self.message = message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + " …"
        self.backtrace = backtrace or []
        self.restarted = False
        self.reported = reported

    def as_failed(self) -> Failed:
        """The body of the FAILED frame for it."""
        return Failed(self.code, self.message, self.backtrace, self.restarted, self.reported)


def contained(function: Callable[..., T], otherwise: Callable[[], T]) -> Callable[..., T]:
    """`function` as a callback for foreign code, which must not raise.

    An exception is a bug in the worker: it is written to the journal, and `otherwise` is returned. Running out of
    memory ends the worker: the plugin might otherwise assume that something was done.
    """

    def callback(*arguments: object) -> T:
        try:
            return function(*arguments)
        except MemoryError:
            os._exit(NO_MEMORY)
        except BaseException:  # noqa: BLE001  there is no caller to raise to
            sys.excepthook(*sys.exc_info())
            return otherwise()

    return callback


def require_text(reply: bytes | bytearray) -> None:
    """Raises `PluginFailure` (`plugin-failed`) for a plugin's reply that is not UTF-8."""
    if reply.isascii():
        return
    try:
        str(reply, "utf-8")
    except UnicodeDecodeError as exc:
        raise PluginFailure(
            "plugin-failed", f"gave a reply that is not UTF-8: {exc.reason} at byte {exc.start}"
        ) from exc


def require_payload(payload: Buffer) -> None:
    """Raises `PluginFailure` (`bad-request`) for a payload that is not UTF-8: plugins may rely on it."""
    try:
        str(payload, "utf-8")
    except UnicodeDecodeError as exc:
        raise PluginFailure("bad-request", f"the payload is not UTF-8: {exc.reason} at byte {exc.start}") from exc
