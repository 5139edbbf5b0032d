"""A file system without room: what cannot be kept is refused as that, everything else goes on, and room mends it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from circleosd.paths import SERVICES
from tests import PROJECT
from tests.core_text import core
from tests.integration.conftest import running
from tests.integration.embedded_host import EmbeddedHost
from tests.integration.made import write
from tests.integration.people import PASSWORD, create

TRAP = '(func (export "trap") (param i32) (result i64) (unreachable))'
EXAMPLE = "plugins/example.wasm"
# The state is in a small file system that only this host sees.
MOUNT = 'mkdir "$4/state" && mount -t tmpfs -o size=3m,mode=700 state "$4/state" && exec "$@"'
SMALL = ("unshare", "--mount", "sh", "-c", MOUNT, "sh")


class SmallHost:
    """A host whose state can fill its file system."""

    def __init__(self, host: EmbeddedHost) -> None:
        assert host.process is not None
        self.host = host
        self.state = Path(f"/proc/{host.process.pid}/root{host.directory}/state")
        self._filling = self.state / "filling"

    def fill(self) -> None:
        with self._filling.open("wb", buffering=0) as filling, contextlib.suppress(OSError):
            while filling.write(bytes(512)):
                pass

    def make_room(self) -> None:
        self._filling.unlink()

    def refusal(self, service: str, action: str, **parameters: Any) -> str:
        """What a service that cannot keep what was asked for says."""
        reply = self.host.call(service, {"action": action, **parameters})
        assert reply["error"] == "unavailable", reply
        return str(reply["message"])

    def users(self) -> list[str]:
        return [user["name"] for user in self.host.data("auth-service", "list")]

    def invoke(self) -> Any:
        return self.host.invoke("example", "crc32", "hello")["data"]


@pytest.fixture
def small() -> Iterator[SmallHost]:
    if os.geteuid() != 0:
        pytest.skip("needs root: it mounts a file system")
    for host in running({"CIRCLEOSD_PLUGINS_QUARANTINE_AFTER": "1"}, SMALL):
        yield SmallHost(host)


def test_without_room_nothing_is_lost_and_what_needs_none_goes_on(small: SmallHost) -> None:
    create(small.host, "alice")
    small.host.load(EXAMPLE)
    small.fill()
    full = "database or disk is full"
    for _ in range(2):
        assert full in small.refusal("auth-service", "create", name="bob", password=PASSWORD)
        assert full in small.refusal("auth-service", "login", name="alice", password=PASSWORD)
        assert full in small.refusal("service-registry", "restart", name="auth-service")
        assert full in small.refusal("plugin-manager", "unload", id="example")
        assert small.refusal("plugin-manager", "load", path=str(PROJECT / EXAMPLE))
        assert small.users() == ["alice"]
        assert small.invoke() == "3610a686"
    said = small.host.ctl("plugin", "unload", "example").stderr
    log = "see the log: journalctl --unit 'circleosd-*', or the output of circleosd up"
    assert said == f"circlectl: cannot use plugins.db: {full} [unavailable]; {log}\n"
    for service in SERVICES:
        for number in (signal.SIGTERM, signal.SIGKILL):
            pid = small.host.pid(service)
            os.kill(pid, number)
            small.host.wait_for(lambda: pid not in small.host.processes())  # noqa: B023  # called at once
    assert small.users() == ["alice"]
    assert small.invoke() == "3610a686"
    small.make_room()
    create(small.host, "bob")
    assert small.users() == ["alice", "bob"]
    small.host.unload("example")
    for service in SERVICES:
        assert small.host.data(service, "audit")["problems"] == []


def test_a_service_that_cannot_start_without_room_says_so_and_starts_with_room(small: SmallHost) -> None:
    create(small.host, "alice")
    pid = small.host.pid("auth-service")
    os.kill(pid, signal.SIGTERM)
    small.host.wait_for(lambda: pid not in small.host.processes())
    small.fill()
    assert "no space is left on its disk" in small.refusal("auth-service", "list")
    small.make_room()
    small.host.wait_for(lambda: small.host.call("auth-service", {"action": "list"})["ok"])
    assert small.users() == ["alice"]


def test_how_a_plugin_did_is_written_down_when_there_is_room_again(small: SmallHost) -> None:
    small.host.load(EXAMPLE)
    small.fill()
    small.invoke()
    small.host.wait_for(lambda: "cannot use plugins.db" in small.host.log)
    small.make_room()
    os.kill(small.host.pid("plugin-manager"), signal.SIGTERM)
    small.host.wait_for(lambda: small.host.data("plugin-manager", "show", id="example")["worker"] == "none")
    assert small.host.data("plugin-manager", "show", id="example")["calls"] == 1


def test_a_failing_plugin_is_held_back_until_its_quarantine_can_be_kept(small: SmallHost, tmp_path: Path) -> None:
    def trap() -> dict[str, Any]:
        return small.host.invoke("weak", "trap")

    small.host.load(write(tmp_path, "weak", core(TRAP)))
    small.fill()
    assert "unreachable" in trap()["message"]
    small.host.wait_for(lambda: "held back" in trap()["message"])
    small.host.wait_for(lambda: "cannot quarantine weak" in small.host.log)  # which comes by a pipe
    assert small.host.data("plugin-manager", "show", id="weak")["state"] != "quarantined"
    small.make_room()
    small.host.wait_for(lambda: trap()["error"] == "conflict")
    assert small.host.data("plugin-manager", "show", id="weak")["state"] == "quarantined"


def test_an_artifact_that_does_not_fit_is_refused_as_that(small: SmallHost, tmp_path: Path) -> None:
    large = tmp_path / "large.wasm"
    large.write_bytes(bytes(4 << 20))
    assert small.refusal("plugin-manager", "load", path=str(large)).endswith("No space left on device")
    small.host.load(EXAMPLE)
