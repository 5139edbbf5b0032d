"""The session that `circlectl user login` opened: a token in a file that only its owner can read."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from circleosd.config import state_home


def _path(runtime: Path) -> Path:
    """One file for each instance of CircleOSD: a token of one means nothing to another."""
    return (
        state_home(os.environ)
        / "circleosd"
        / "sessions"
        / f"{str(runtime.absolute()).strip('/').replace('/', '-')}.json"
    )


def load(runtime: Path) -> str | None:
    """The token to send along, if there is one that has not expired."""
    try:
        session = json.loads(_path(runtime).read_text(encoding="utf-8"))
        return str(session["token"]) if session["expires"] > time.time() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(runtime: Path, login: dict[str, Any]) -> None:
    """Keep what a login replied."""
    path = _path(runtime)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent)  # mkstemp(3): mode 0600
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        json.dump({"user": login["user"], "token": login["token"], "expires": login["expires"]}, file)
    os.replace(name, path)


def forget(runtime: Path) -> None:
    """Remove the token."""
    with contextlib.suppress(FileNotFoundError):
        _path(runtime).unlink()
