"""Host calls of a worker that was taken over: the manager believes none of its checks."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from circleosd.config import PluginSettings
from circleosd.database import Database
from circleosd.errors import Denied
from circleosd.plugins.cause import Cause
from circleosd.plugins.events import Events
from circleosd.plugins.host import Host
from circleosd.plugins.keyvalue import KeyValue
from circleosd.plugins.manifest import Capability, Manifest
from circleosd.plugins.plugin import Plugin
from circleosd.plugins.service import HOST_MIGRATIONS
from circleosd.plugins.store import Record
from circleosd.worker import frames
from circleosd.worker.host import CALLS

ASKED = ("kv", "config", "clock", "services:read", "services:restart:*", "events:*")


async def answered(directory: Path, call: str, args: dict[str, str], *, granted: bool) -> Any:
    """What a plugin that is being loaded is answered, and which attempts without a capability were told."""
    denied = []

    async def note(plugin: Plugin, call: str, name: str, error: Denied, cause: Cause) -> None:
        denied.append((plugin.name, call, name))

    def pass_on(plugin: Plugin, topic: str, payload: str, cause: Cause) -> None:
        raise AssertionError("there are no events")

    manifest = Manifest("p", capabilities=tuple(map(Capability, ASKED)))
    plugin = Plugin(manifest, "", Record(), dict.fromkeys(ASKED, granted), PluginSettings())
    kept = Database(directory / "kept.db", HOST_MIGRATIONS)
    host = Host(KeyValue(kept), Events(kept, pass_on), str(directory / "nobody"), note)
    body = await host.of(plugin)(call, args, Cause())
    kept.close()
    return frames.parse_host_reply(body), denied


@pytest.mark.parametrize(
    ("call", "args", "says"),
    [
        ("rm", {}, "bad-request: no host call 'rm'"),
        ("kv.get", {}, "bad-request: the arguments of kv.get are: key"),
        ("kv.get", {"key": "a", "plugin": "other"}, "bad-request: the arguments of kv.get are: key"),
        ("services.restart", {}, "bad-request: the arguments of services.restart are: name"),
        ("clock.now", {}, "bad-request: this host does not support clock.now"),
    ],
)
def test_a_call_that_no_worker_would_pass_on_is_refused(
    tmp_path: Path, call: str, args: dict[str, str], says: str
) -> None:
    assert asyncio.run(answered(tmp_path, call, args, granted=True)) == ((False, says), [])


@pytest.mark.parametrize("call", sorted(CALLS))
def test_no_call_is_answered_without_its_capability(tmp_path: Path, call: str) -> None:
    args = dict.fromkeys(CALLS[call].arguments, "x")
    (ok, why), denied = asyncio.run(answered(tmp_path, call, args, granted=False))
    assert not ok
    assert why.startswith("denied: this plugin has not been granted the capability ")
    assert denied == ([("p", call, "x")] if call == "services.restart" else [])


def test_a_fault_in_a_call_is_an_error_to_the_plugin_and_has_its_details_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*about: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(KeyValue, "get", broken)
    (ok, why), _ = asyncio.run(answered(tmp_path, "kv.get", {"key": "a"}, granted=True))
    assert (ok, why) == (False, "internal: an internal error; the host's log has the details")
    assert "RuntimeError: a bug" in caplog.text


@pytest.mark.parametrize("call", ["kv.set", "kv.delete", "services.restart", "events.emit"])
def test_nothing_lasts_that_is_asked_for_during_a_load(tmp_path: Path, call: str) -> None:
    args = dict.fromkeys(CALLS[call].arguments, "x")
    (ok, why), _ = asyncio.run(answered(tmp_path, call, args, granted=True))
    assert (ok, why) == (
        False, f"unavailable: cannot do {call} while the plugin is being loaded: it may not change anything yet",
    )  # fmt: skip
