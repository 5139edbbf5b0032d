"""Errors on the bus, and what systemd's error replies mean for a caller. Imports no D-Bus library."""

from __future__ import annotations

from circleosd.errors import BadRequest, CircleError, Conflict, Denied, Limit, NotFound, Timeout, Unavailable

_DBUS = "org.freedesktop.DBus.Error."
_SYSTEMD = "org.freedesktop.systemd1."
NO_REPLY = f"{_DBUS}NoReply"  # the peer has gone: systemd, or polkit, whose error systemd passes on
_REFUSALS = (f"{_DBUS}AccessDenied", f"{_DBUS}InteractiveAuthorizationRequired")
# All other errors of systemd mean that the unit's state does not allow the request.
_MEANINGS: dict[str, type[CircleError]] = {
    f"{_SYSTEMD}NoSuchUnit": NotFound,
    f"{_SYSTEMD}LoadFailed": NotFound,
    f"{_DBUS}FileNotFound": NotFound,
    f"{_DBUS}InvalidArgs": BadRequest,
    f"{_DBUS}LimitsExceeded": Limit,
    f"{_DBUS}Timeout": Timeout,
    f"{_DBUS}TimedOut": Timeout,
}


class ErrorReply(Exception):
    """The reply to a call was an error: its name as in the D-Bus Specification, and a sentence."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{text} ({name})")
        self.name = name
        self.text = text

    @property
    def refusal(self) -> bool:
        """Whether polkit or the bus does not allow the call."""
        return self.name in _REFUSALS


class Lost(Exception):
    """The connection ended, or systemd or its peer left the bus, before the reply came."""


class Unheard(Exception):
    """The connection was lost, and the end of a job that systemd had accepted will not be reported any more."""


def explained(doing: str, error: ErrorReply) -> CircleError:
    """The error to raise when systemd replied `error` to the request `doing`, for example: start nginx.service."""
    said = error.text.rstrip(".")
    if error.refusal:
        return Denied(
            f"systemd refuses to {doing}: {said}; CircleOSD's polkit rule does not cover this; as root, see: "
            "journalctl --unit circleosd-polkit.service, which writes it from the catalog (on NixOS, the module does)"
        )
    kind = _MEANINGS.get(error.name)
    if kind is None:
        kind = Conflict if error.name.startswith((_SYSTEMD, "System.Error.")) else Unavailable
    return kind(f"cannot {doing}: systemd says: {said}")
