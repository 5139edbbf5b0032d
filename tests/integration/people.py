"""People of a machine, whom tests let act on an embedded host."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from tests.door import answer
from tests.integration.embedded_host import EmbeddedHost

PASSWORD = "a long enough one"
STRANGER, ALICE, BOB = 61001, 61002, 61003
AUTH, REGISTRY, PLUGINS = "auth-service", "service-registry", "plugin-manager"


def ask(host: EmbeddedHost, peer: int, service: str, action: str, **parameters: Any) -> dict[str, Any]:
    """One request of a process of the uid `peer`."""
    return answer(str(host.runtime), (peer, service, {"action": action, **parameters}))


def ok(host: EmbeddedHost, peer: int, service: str, action: str, **parameters: Any) -> Any:
    reply = ask(host, peer, service, action, **parameters)
    assert reply["ok"], (action, parameters, reply)
    return reply["data"]


def create(host: EmbeddedHost, name: str, **more: Any) -> None:
    host.data(AUTH, "create", **{"name": name, "password": PASSWORD, **more})


def login(host: EmbeddedHost, name: str, uid: int, **more: Any) -> str:
    return str(ok(host, uid, AUTH, "login", name=name, password=PASSWORD, **more)["token"])


def log_circlectl_in(host: EmbeddedHost, name: str, *, password: str = PASSWORD, **more: Any) -> Path:
    """Create a user as whom circlectl acts from now on; return the file of the session."""
    create(host, name, password=password, **more)
    host.ok("user", "login", name, "--password-stdin", stdin=f"{password}\n")
    (session,) = (Path(host.environment["XDG_STATE_HOME"]) / "circleosd/sessions").iterdir()
    return session


def let_pass(host: EmbeddedHost, seconds: float) -> None:
    """Start the host anew, and have what the past made of sessions and failed logins be so much older."""
    host.stop()
    connection = sqlite3.connect(host.database("auth"))
    with connection:
        for column in ("created", "used", "expires"):
            connection.execute(f"UPDATE sessions SET {column} = {column} - ?", (seconds,))
        connection.execute("UPDATE failures SET last = last - ?", (seconds,))
    connection.close()
    host.start()
    host.open_to_everybody()
