"""The session opened by `circlectl user login`: a token in a file that only its owner can read."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from typing import Any

from circlectl.asking import MALFORMED, Asking
from circleosd.errors import BadRequest, Conflict, Denied
from circleosd.paths import state_home

MAX_SESSION = 4096  # bytes of a file; what `save` writes has a tenth of that


def login(ask: Asking, service: str, request: dict[str, Any]) -> Any:
    """Open a session and save it. If it cannot be saved, it is closed again: raises `BadRequest`."""
    data = ask.once(service, request)
    try:
        save(ask.runtime, data)
    except (OSError, BadRequest) as exc:
        ask.once(service, {"action": "logout", "token": data["token"]})
        if not isinstance(exc, OSError):
            raise BadRequest(f"cannot save the session: {exc}") from exc
        why = f"{exc.filename}: {exc.strerror}; set XDG_STATE_HOME to a writable directory"
        raise BadRequest(f"cannot save the session at {why}") from exc
    return data


def logout(ask: Asking, service: str, request: dict[str, Any]) -> None:
    """Close the session and forget it, even if it has already ended."""
    try:
        ask.once(service, request)
    except Denied:  # anyone may log out, so the token was refused: the session no longer exists
        pass
    except Conflict:  # no token was sent, because it had expired
        if _kept(ask.runtime) is None:
            raise
    forget(ask.runtime)


def _path(runtime: str) -> str:
    """One file per instance of CircleOSD: a token is valid for only one, and hosts may share a home directory."""
    name = f"{os.uname().nodename}{os.path.abspath(runtime)}".replace("/", "-")
    return f"{state_home(os.environ)}/circleosd/sessions/{name}.json"


def load(runtime: str) -> str | None:
    """The token to send along, if there is one that has not expired and is good for this uid."""
    kept = _kept(runtime)
    return kept[0] if kept and kept[1] > time.time() else None


def _kept(runtime: str) -> tuple[str, float] | None:
    """The saved token and its expiry, if it is valid for this uid. Never blocks, as opening a pipe would.

    Root with the HOME of another user who has a session acts as root: services refuse a token of another uid.
    """
    try:
        file = os.open(_path(runtime), os.O_RDONLY | os.O_NONBLOCK)
        try:
            session = json.loads(os.read(file, MAX_SESSION)) if stat.S_ISREG(os.fstat(file).st_mode) else {}
        finally:
            os.close(file)
        return (str(session["token"]), float(session["expires"])) if session["uid"] == os.getuid() else None
    except (OSError, BadRequest, *MALFORMED):  # there is no file, no valid session, or no home
        return None


def save(runtime: str, login: dict[str, Any]) -> None:
    """Save the reply to a login in a file that only its owner can read. Raises OSError."""
    from circlectl.replacing import replace

    path = _path(runtime)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    kept = {"user": login["user"], "token": login["token"], "expires": login["expires"], "uid": os.getuid()}
    replace(path, json.dumps(kept).encode(), 0o600)


def forget(runtime: str) -> None:
    """Remove the token."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_path(runtime))
