"""Hostile plugins through the manager, while a well-behaved one is called fifty times a second.

Whoever calls a hostile plugin gets an error with a reason; the well-behaved one has no failed call.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.core_text import core
from tests.integration.embedded_host import EmbeddedHost
from tests.integration.made import write
from tests.measuring import TRIES
from tests.native_source import native

RATE = 50
PACER = Path(__file__).parent / "pacer.py"
# The calls of an attack fail all the time, and are meant to reach the plugin.
SETTINGS = {"CIRCLEOSD_PLUGINS_BACK_OFF_AFTER": "100000", "CIRCLEOSD_PLUGINS_QUARANTINE_AFTER": "100000"}
NATIVE = {"plugin_type": "native", "limits": {"time": 0.3}}

F = '(func (export "f") (param i32) (result i64)'


class Attack(NamedTuple):
    """A hostile plugin: what makes it, and the errors that its callers may get, None for an answer.

    `says` is in one of the messages. `load_fails`: it is refused when it is loaded.
    """

    name: str
    make: Callable[[], bytes]
    errors: tuple[str | None, ...] = ("plugin-failed",)
    says: str = ""
    manifest: dict[str, Any] = {}  # noqa: RUF012  # never written to
    function: str = "f"
    payload: str = ""
    load_fails: bool = False


def wasm(body: str, *, imports: str = "") -> bytes:
    """A core module with one function."""
    return core(f"{F} {body})", imports=imports)


def c(body: str, before: str = "") -> bytes:
    """Native code with one handler."""
    return native(f"{before} HANDLER(f) {{ UNUSED; {body} return 0; }}", "f")


def said(attack: Attack, replies: list[dict[str, Any]]) -> bool:
    return any(attack.says in str(reply["message"]) for reply in replies)


class Paced:
    """A host with a well-behaved plugin and somebody who calls it all the time."""

    def __init__(self, host: EmbeddedHost, directory: Path) -> None:
        self.host = host
        self.directory = directory
        self.calls: list[dict[str, Any]] = []
        host.load(write(directory, "good", core()))
        path = host.runtime / "plugin-manager.sock"
        self.process = subprocess.Popen(
            [sys.executable, PACER, path, "good", "echo", str(RATE)], stdout=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.wait(RATE)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.calls.append(json.loads(line))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def load(self, attack: Attack) -> dict[str, Any]:
        artifact = attack.make()
        usual = NATIVE if artifact.startswith(b"\x7fELF") else {"limits": {"time": 2}}
        path = write(self.directory, attack.name, artifact, **usual | attack.manifest)
        request = {"action": "load", "path": str(path), "grant": "all", "trust": True}
        return self.host.call("plugin-manager", request, timeout=120)

    def run(self, attack: Attack) -> None:
        """Load the plugin and call it, and once more after it has failed."""
        self.judge(attack, self.attack(attack, calls=2))

    def wait(self, calls: int) -> None:
        """Until the well-behaved plugin has been called so many times more."""
        before = len(self.calls)
        self.host.wait_for(lambda: len(self.calls) >= before + calls)

    def attack(self, attack: Attack, *, beside: int = 0, calls: int = 1) -> list[dict[str, Any]]:
        """Load the plugin and call it so many times at least, and while the other one is; return the replies."""
        goal = len(self.calls) + beside
        loaded = self.load(attack)
        if not loaded["ok"]:
            assert attack.load_fails or "bad-request" in attack.errors, loaded
            return [loaded]
        assert not attack.load_fails, loaded
        replies: list[dict[str, Any]] = []
        try:
            while (
                (len(self.calls) < goal and self._reader.is_alive())
                or len(replies) < calls
                or (not said(attack, replies) and len(replies) < TRIES)  # a worker that stood still is ended by others
            ):
                replies.append(self.host.invoke(attack.name, attack.function, attack.payload))
        finally:
            self.host.unload(attack.name)
        return replies

    def judge(self, attack: Attack, replies: list[dict[str, Any]]) -> None:
        """Whether the replies were as they are to be, and the well-behaved plugin as well."""
        for reply in replies:
            assert re.search(r"[a-z]{3}", str(reply["message"])) or reply["ok"], reply
            assert reply.get("error") in attack.errors, reply
        assert said(attack, replies), replies[:3]
        assert self.failed() == []
        assert self._reader.is_alive(), "nobody calls the well-behaved plugin any more"

    def failed(self) -> list[str]:
        """The replies of the well-behaved plugin that were not as they are to be."""
        return [call["reply"] for call in self.calls if call["reply"] is not None]
