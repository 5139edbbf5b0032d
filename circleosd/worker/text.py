"""The one rule about payloads and replies: they are UTF-8."""

from __future__ import annotations

from circleosd.worker.failure import PluginFailure
from circleosd.worker.frames import Buffer


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
