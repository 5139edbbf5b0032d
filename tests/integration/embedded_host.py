"""CircleOSD in the embedded mode, in a directory of its own, as real processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from circleosd.config import AuthSettings
from tests import PROJECT
from tests.waiting import SECONDS

BIN = Path(sys.executable).parent
CHEAP = {"CIRCLEOSD_AUTH_HASH_MEMORY": "64", "CIRCLEOSD_AUTH_HASH_PASSES": "1"}  # passwords; what a test's host has
COSTLY = {  # passwords, as built in
    "CIRCLEOSD_AUTH_HASH_MEMORY": str(AuthSettings.hash_memory),
    "CIRCLEOSD_AUTH_HASH_PASSES": str(AuthSettings.hash_passes),
}
SLEEPER = "[Service]\nType=exec\nExecStart=/bin/sleep infinity\n"
HASTY = {
    "CIRCLEOSD_SERVER_READ_TIMEOUT": "0.5",
    "CIRCLEOSD_SERVER_WRITE_TIMEOUT": "0.5",
    "CIRCLEOSD_SERVER_IDLE_CONNECTION": "1",
}


class EmbeddedHost:
    """A supervisor with its services. `settings` are CIRCLEOSD_ variables, `wrapper` is a command that starts it."""

    def __init__(self, settings: Mapping[str, str] | None = None, wrapper: Sequence[str] = ()) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="cosd-"))  # short: a socket's path has 107 bytes
        self.runtime = self.directory / "run"
        self.units = self.directory / "units"
        self.catalog = self.directory / "config" / "services.d"
        self.units.mkdir()
        self.catalog.mkdir(parents=True)
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory),
            "LANG": "C.UTF-8",
            "XDG_STATE_HOME": str(self.directory / "home"),
            "CIRCLEOSD_RUNTIME_DIR": str(self.runtime),
            "CIRCLEOSD_CONFIG_DIR": str(self.directory / "config"),
            "CIRCLEOSD_UNIT_PATH": str(self.units),
            **(settings or {}),
        }
        self.log_path = self.directory / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.wrapper = wrapper

    def start(self) -> None:
        """Start the supervisor and wait until its sockets listen."""
        self.log_path.touch()
        said = self.log.count("listening below")
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.wrapper, BIN / "circleosd", "up", "--dir", self.directory],
                env=self.environment,
                stdout=log,
                stderr=log,
            )
        self.wait_for(lambda: self.log.count("listening below") > said)

    def open_to_everybody(self) -> None:
        """Let processes of other uids connect, as a system installation lets the members of its group."""
        for directory in (self.directory, self.runtime):
            directory.chmod(0o755)
        for path in self.runtime.glob("*.sock"):
            path.chmod(0o666)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the supervisor; return its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(SECONDS)
        self.process = None
        return status

    @property
    def log(self) -> str:
        """What supervisor and services have said."""
        return self.log_path.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], object], seconds: float = SECONDS) -> None:
        """Wait until `condition` holds; fail with the log if it does not in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"it did not happen in {seconds} s; the log:\n{self.log}"
            assert self.process is None or self.process.poll() is None, f"the supervisor ended; the log:\n{self.log}"
            time.sleep(0.02)  # between looks at a condition

    def ctl(
        self, *arguments: str, stdin: str = "", env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run circlectl."""
        return subprocess.run(
            [BIN / "circlectl", *arguments],
            input=stdin,
            env={**self.environment, **(env or {})},
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def begin(self, *arguments: str, stdout: int | IO[bytes] = subprocess.PIPE) -> subprocess.Popen[str]:
        """Start a circlectl that goes on until SIGINT."""
        return subprocess.Popen(
            [BIN / "circlectl", *arguments],
            env=self.environment,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background job ignores SIGINT, and so would this.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def ok(self, *arguments: str, stdin: str = "") -> str:
        """Run circlectl, which must succeed; return what it printed."""
        done = self.ctl(*arguments, stdin=stdin)
        assert done.returncode == 0, f"{arguments}: {done.returncode} {done.stderr}\n{self.log}"
        return done.stdout

    def connect(self, service: str, timeout: float = SECONDS) -> socket.socket:
        """A raw connection to a service."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout)
        sock.connect(str(self.runtime / f"{service}.sock"))
        return sock

    def call(self, service: str, request: Mapping[str, Any] | bytes, timeout: float = SECONDS) -> dict[str, Any]:
        """Send one line, return the reply line as an object."""
        line = request if isinstance(request, bytes) else json.dumps(request).encode() + b"\n"
        with self.connect(service, timeout) as sock:
            sock.sendall(line)
            return read_reply(sock)

    def data(self, service: str, action: str, **parameters: Any) -> Any:
        """The data of a request that must succeed."""
        reply = self.call(service, {"action": action, **parameters})
        assert reply["ok"], reply
        return reply["data"]

    def load(self, path: Path | str, **more: Any) -> dict[str, Any]:
        """Load a plugin, as `circlectl plugin load` does but by a request alone; relative paths are the project's."""
        loaded: dict[str, Any] = self.data("plugin-manager", "load", path=str(PROJECT / path), **more)
        return loaded

    def unload(self, plugin: str) -> None:
        """Unload a plugin, as `circlectl plugin unload` does."""
        self.data("plugin-manager", "unload", id=plugin)

    def invoke(self, plugin: str, function: str, payload: str = "", timeout: float = SECONDS) -> dict[str, Any]:
        """The reply to a call of a plugin."""
        request = {"action": "invoke", "id": plugin, "func": function, "payload": payload}
        return self.call("plugin-manager", request, timeout)

    def database(self, service: str) -> Path:
        """The database of `auth`, `registry` or `plugins`."""
        return self.directory / "state/circleosd" / service / f"{service}.db"

    def logged(self, name: str) -> list[str]:
        """What a cataloged service has printed, by lines."""
        return [row["text"] for row in self.data("service-registry", "logs", name=name)]

    def pid(self, service: str) -> int:
        """The process of a service, started if need be."""
        return int(self.data(service, "health")["pid"])

    def add_service(self, name: str, unit: str = SLEEPER) -> None:
        """Catalog a service with a unit file of the text `unit`; without it, one that runs until it is stopped."""
        (self.units / f"{name}.service").write_text(unit)
        (self.catalog / f"{name}.toml").write_text(f'[[service]]\nname = "{name}"\nunit = "{name}.service"\n')

    def processes(self) -> list[int]:
        """Processes that belong to this host: those with its runtime directory in their environment."""
        mark = f"CIRCLEOSD_RUNTIME_DIR={self.runtime}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:
                continue  # ended meanwhile, or not ours
        return found


def read_reply(sock: socket.socket) -> dict[str, Any]:
    """Read one reply line."""
    data = b""
    while not data.endswith(b"\n"):
        chunk = sock.recv(1 << 20)
        assert chunk, f"the connection ended after {data[:200]!r}"
        data += chunk
    reply: dict[str, Any] = json.loads(data)
    return reply


def to_the_end(sock: socket.socket) -> bytes:
    """Everything until the peer closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(1 << 20):
            data += chunk
    return data
