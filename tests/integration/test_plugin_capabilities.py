"""What plugins may ask of their host, who grants it, and what comes of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.core_text import LOG, core
from tests.door import acting_as
from tests.integration.conftest import NewHost
from tests.integration.embedded_host import EmbeddedHost, read_reply
from tests.integration.made import asking, caller, write
from tests.integration.people import ALICE, AUTH, BOB, PLUGINS, create, login
from tests.integration.people import ask as ask_as
from tests.native_source import native
from tests.waiting import SECONDS


def ask(host: EmbeddedHost, plugin: str, call: str, function: str = "call", **args: str) -> dict[str, Any]:
    """The reply to an invoke that makes a host call."""
    return host.invoke(plugin, function, json.dumps({"call": call, "args": args}))


def answer(host: EmbeddedHost, plugin: str, call: str, **args: str) -> Any:
    """The result of a host call that must succeed."""
    reply = ask(host, plugin, call, **args)
    assert reply["ok"], reply
    return json.loads(reply["data"])


def refusal(host: EmbeddedHost, plugin: str, call: str, **args: str) -> str:
    """Why a host call was refused."""
    reply = ask(host, plugin, call, **args)
    assert not reply["ok"], reply
    return str(reply["message"])


def loading_as(peer: int, host: EmbeddedHost, path: Path, **more: Any) -> socket.socket:
    """The connection of a process of the uid `peer` that has asked for a load and passed the artifact."""
    manifest = json.loads(path.with_suffix(".json").read_text())
    request = {"action": "load", "path": path.name, "files": ["path"], "manifest": manifest, **more}
    with acting_as(peer):
        sock = host.connect(PLUGINS)
    with path.open("rb") as file:
        socket.send_fds(sock, [json.dumps(request).encode() + b"\n"], [file.fileno()])
    return sock


def test_a_plugin_keeps_texts_over_the_end_of_the_manager(new_host: NewHost, tmp_path: Path) -> None:
    host = new_host({})
    host.load(write(tmp_path, "keeper", caller(), capabilities=["kv"]), grant="kv")
    assert answer(host, "keeper", "kv.get", key="a") is None
    answer(host, "keeper", "kv.set", key="a", value="ä\n1")
    os.kill(host.pid("plugin-manager"), signal.SIGKILL)
    assert answer(host, "keeper", "kv.get", key="a") == "ä\n1"
    answer(host, "keeper", "kv.set", key="ab", value="")
    answer(host, "keeper", "kv.set", key="b", value="")
    assert answer(host, "keeper", "kv.keys", prefix="a") == ["a", "ab"]
    assert answer(host, "keeper", "kv.delete", key="a") is True
    assert answer(host, "keeper", "kv.delete", key="a") is False
    assert answer(host, "keeper", "kv.keys", prefix="") == ["ab", "b"]


def test_plugins_do_not_see_what_others_keep_and_unloading_forgets_it(host: EmbeddedHost, tmp_path: Path) -> None:
    for name in ("one", "two"):
        host.load(write(tmp_path, name, caller(), capabilities=["kv"]), grant="kv")
    answer(host, "one", "kv.set", key="k", value="of one")
    assert answer(host, "two", "kv.keys", prefix="") == []
    host.unload("one")
    host.load(tmp_path / "one.wasm", grant="kv")
    assert answer(host, "one", "kv.get", key="k") is None
    for name in ("one", "two"):
        host.unload(name)


def test_what_a_plugin_keeps_is_held_to_its_limit(host: EmbeddedHost, tmp_path: Path) -> None:
    host.load(write(tmp_path, "full", caller(), capabilities=["kv"], limits={"storage": 100}), grant="kv")
    answer(host, "full", "kv.set", key="k", value="x" * 99)
    assert refusal(host, "full", "kv.set", key="l", value="").startswith("limit: ")
    assert refusal(host, "full", "kv.set", key="k", value="x" * 100).startswith("limit: ")
    answer(host, "full", "kv.set", key="k", value="x" * 50)
    answer(host, "full", "kv.set", key="l", value="x" * 48)
    answer(host, "full", "kv.delete", key="k")
    answer(host, "full", "kv.set", key="m", value="x" * 50)
    assert host.data("plugin-manager", "show", id="full")["stored"] == 100
    assert refusal(host, "full", "kv.set", key="n" * 600, value="").startswith("bad-request: ")
    host.unload("full")


def test_a_call_without_the_capability_names_it_and_a_grant_counts_at_once(host: EmbeddedHost, tmp_path: Path) -> None:
    path = write(tmp_path, "asker", caller(), capabilities=[{"name": "kv", "reason": "to remember"}])
    shown = host.ok("plugin", "load", str(path))
    assert "not granted: to remember" in shown
    assert "the capability kv" in refusal(host, "asker", "kv.get", key="a")
    assert "the capability clock" in refusal(host, "asker", "clock.now")
    assert "granted" in host.ok("plugin", "grant", "asker", "kv")
    assert answer(host, "asker", "kv.get", key="a") is None
    host.ok("plugin", "revoke", "asker", "kv")
    assert "the capability kv" in refusal(host, "asker", "kv.get", key="a")
    history = host.data("plugin-manager", "history", object="asker")
    assert [row["action"] for row in history] == ["load", "grant", "revoke"]
    assert history[1]["after"]["granted"] == ["kv"]
    host.unload("asker")


def test_a_revocation_is_effective_within_a_running_call(host: EmbeddedHost, tmp_path: Path) -> None:
    path = write(tmp_path, "busy", caller(), capabilities=["kv"], limits={"time": 60})
    host.load(path, grant="all")
    replies: list[dict[str, Any]] = []
    calling = threading.Thread(target=lambda: replies.append(ask(host, "busy", "kv.get", "until_refused", key="a")))
    calling.start()
    host.wait_for(lambda: host.data("plugin-manager", "show", id="busy")["waiting"] == 1)
    host.ok("plugin", "revoke", "busy", "kv")
    calling.join(SECONDS)
    assert "the capability kv" in replies[0]["message"]
    host.unload("busy")


def test_a_revocation_is_effective_within_a_call_of_the_version_before(host: EmbeddedHost, tmp_path: Path) -> None:
    asks: dict[str, Any] = {"capabilities": ["kv"], "limits": {"time": 60}}
    host.load(write(tmp_path, "busy", caller(), **asks), grant="all")
    upgraded = write(tmp_path, "busy", caller(), **asks | {"version": "2"})
    with ThreadPoolExecutor() as threads:
        call = threads.submit(ask, host, "busy", "kv.get", "until_refused", key="a")
        host.wait_for(lambda: host.data("plugin-manager", "show", id="busy")["waiting"] == 1)
        upgrade = threads.submit(host.ctl, "plugin", "load", str(upgraded))
        host.wait_for(lambda: host.data("plugin-manager", "show", id="busy")["version"] == "2")
        host.ok("plugin", "revoke", "busy", "kv")
        assert "the capability kv" in call.result()["message"]
        assert upgrade.result().returncode == 0
    assert "the capability kv" in refusal(host, "busy", "kv.get", key="a")
    host.unload("busy")


def test_a_call_that_waits_when_a_capability_is_revoked_begins_without_it(host: EmbeddedHost, tmp_path: Path) -> None:
    host.load(write(tmp_path, "queue", caller(), capabilities=["kv", "clock"], limits={"time": 20}), grant="all")

    def waiting() -> int:
        return int(host.data("plugin-manager", "show", id="queue")["waiting"])

    with ThreadPoolExecutor() as threads:
        first = threads.submit(ask, host, "queue", "kv.get", "until_refused", key="a")
        host.wait_for(lambda: waiting() == 1)
        second = threads.submit(ask, host, "queue", "clock.now")
        host.wait_for(lambda: waiting() == 2)
        host.ok("plugin", "revoke", "queue", "clock")
        host.ok("plugin", "revoke", "queue", "kv")
        assert "the capability kv" in first.result(SECONDS)["message"]
        assert "the capability clock" in second.result(SECONDS)["message"]
    host.unload("queue")


def test_only_what_a_plugin_asks_for_can_be_granted(host: EmbeddedHost, tmp_path: Path) -> None:
    path = write(tmp_path, "modest", caller(), capabilities=["clock"])
    refused = host.ctl("plugin", "load", str(path), "--grant", "kv")
    assert refused.returncode == 2
    assert "it asks for: clock" in refused.stderr
    host.load(path)
    refused = host.ctl("plugin", "grant", "modest", "kv")
    assert "it asks for: clock" in refused.stderr
    assert "available: log, kv" in host.ctl("plugin", "grant", "modest", "network").stderr
    host.unload("modest")


def test_a_revocation_that_would_take_nothing_away_is_refused(host: EmbeddedHost, tmp_path: Path) -> None:
    host.load(write(tmp_path, "broad", caller(), capabilities=["log", "services:restart:*"]), grant="all")
    for capability, says in (
        ("services:restart:web", "broad has services:restart:web through services:restart:*; revoke that instead"),
        ("log", "every plugin has log"),
    ):
        refused = host.ctl("plugin", "revoke", "broad", capability)
        assert refused.returncode == 7
        assert says in refused.stderr
    host.ok("plugin", "revoke", "broad", "services:restart:*")
    host.ok("plugin", "grant", "broad", "services:restart:web")
    host.ok("plugin", "revoke", "broad", "services:restart:web")
    assert "the capability services:restart:web" in refusal(host, "broad", "services.restart", name="web")
    host.unload("broad")


def test_an_upgrade_that_asks_for_more_is_refused_with_the_difference(host: EmbeddedHost, tmp_path: Path) -> None:
    path = write(tmp_path, "grower", caller(), capabilities=["clock"])
    host.load(path, grant="clock")
    wants = ["clock", {"name": "kv", "reason": "to remember"}]
    write(tmp_path, "grower", caller(), version="2", capabilities=wants)
    refused = host.ctl("plugin", "load", str(path))
    assert refused.returncode == 4
    assert "kv (to remember)" in refused.stderr
    assert "--grant kv" in refused.stderr
    assert "clock" not in refused.stderr
    assert host.data("plugin-manager", "show", id="grower")["version"] == "1"
    host.load(path, grant="kv")
    assert isinstance(answer(host, "grower", "clock.now"), int)
    assert answer(host, "grower", "kv.get", key="a") is None
    write(tmp_path, "grower", caller(), version="3", capabilities=["clock"])
    host.load(path)
    write(tmp_path, "grower", caller(), version="4", capabilities=wants)
    assert host.ctl("plugin", "load", str(path)).returncode == 4  # what was given up must be granted again
    host.unload("grower")


def test_an_upgrade_that_asks_for_less_has_it_as_before(host: EmbeddedHost, tmp_path: Path) -> None:
    path = write(tmp_path, "narrower", caller(), capabilities=["events:*"])
    host.load(path, grant="all")
    write(tmp_path, "narrower", caller(), version="2", capabilities=["events:deploy"])
    assert "not granted" not in host.ok("plugin", "load", str(path))
    assert answer(host, "narrower", "events.emit", topic="deploy", payload="") is None
    assert "events:other" in refusal(host, "narrower", "events.emit", topic="other", payload="")
    host.unload("narrower")


SLOW = """__attribute__((constructor)) void slow(void) { sleep(4); }"""


def test_what_is_decided_while_a_plugin_is_loaded_waits_for_nothing_and_counts(
    host: EmbeddedHost, tmp_path: Path
) -> None:
    asks: dict[str, Any] = {"plugin_type": "native", "capabilities": ["kv"], "limits": {"time": 20}}
    host.load(write(tmp_path, "slow", native(""), **asks), trust=True, grant="kv")
    host.load(write(tmp_path, "other", caller(), capabilities=["kv"]), grant="kv")
    upgraded = write(tmp_path, "slow", native(SLOW), **asks | {"version": "2"})
    with ThreadPoolExecutor() as threads:
        upgrade = threads.submit(host.ctl, "plugin", "load", str(upgraded), "--trust")
        host.wait_for(lambda: any(host.runtime.rglob("slow.staged.sock")))
        for plugin in ("other", "slow"):
            host.data("plugin-manager", "revoke", id=plugin, capability="kv")
        host.data("plugin-manager", "disable", id="slow")
        assert not upgrade.done()
        assert upgrade.result().returncode == 0
    shown = host.data("plugin-manager", "show", id="slow")
    assert (shown["version"], shown["state"]) == ("2", "disabled")
    assert [item["granted"] for item in shown["capabilities"]] == [False]
    for plugin in ("other", "slow"):
        host.unload(plugin)


def test_the_configuration_grants_for_hosts_without_an_administrator(new_host: NewHost, tmp_path: Path) -> None:
    host = new_host({})
    (host.directory / "config" / "config.toml").write_text(
        '[plugins.grants]\nheadless = ["kv", "services:restart:*"]\n'
    )
    path = write(tmp_path, "headless", caller(), capabilities=["kv", "clock"])
    host.load(path)
    assert answer(host, "headless", "kv.get", key="a") is None
    assert "the capability clock" in refusal(host, "headless", "clock.now")
    assert "the capability services:restart:x" in refusal(host, "headless", "services.restart", name="x")
    host.ok("plugin", "revoke", "headless", "kv")
    assert "the capability kv" in refusal(host, "headless", "kv.get", key="a")


def test_a_capability_that_there_is_not_cannot_be_configured(new_host: NewHost) -> None:
    host = new_host({})
    config = host.directory / "config" / "config.toml"
    config.write_text('[plugins.grants]\nheadless = ["all"]\n')
    reply = host.call("plugin-manager", {"action": "list"})
    assert reply["error"] == "unavailable"
    assert "plugin-manager cannot start: setting plugins.grants.headless: no capability 'all'" in reply["message"]
    config.write_text('[plugins.grants]\nheadless = ["kv"]\n')
    host.wait_for(lambda: host.call("plugin-manager", {"action": "list"})["ok"])


def test_the_configuration_and_the_clock_of_a_plugin(host: EmbeddedHost, tmp_path: Path) -> None:
    path = write(tmp_path, "told", caller(), capabilities=["config", "clock"], config={"url": "x", "a": "1"})
    host.load(path)
    assert "the capability config" in refusal(host, "told", "config.get", key="url")
    host.ok("plugin", "grant", "told", "config")
    host.ok("plugin", "grant", "told", "clock")
    assert answer(host, "told", "config.get", key="url") == "x"
    assert answer(host, "told", "config.get", key="none") is None
    assert answer(host, "told", "config.keys") == ["a", "url"]
    assert abs(answer(host, "told", "clock.now") / 1000 - time.time()) < 60
    assert answer(host, "told", "clock.monotonic") > 0
    host.unload("told")


def test_a_plugin_restarts_the_service_that_it_may_and_the_ledger_names_it(host: EmbeddedHost, tmp_path: Path) -> None:
    host.add_service("web")
    host.add_service("db")
    host.ok("service", "start", "web")
    asked = ["services:read", {"name": "services:restart:*", "reason": "heals"}]
    path = write(tmp_path, "healer", caller(), capabilities=asked)
    host.ok("plugin", "load", str(path), "--grant", "services:read", "--grant", "services:restart:web")
    before = answer(host, "healer", "services.status", name="web")
    assert before["state"] == "active"
    listed = answer(host, "healer", "services.list")
    assert {"web", "db"} <= {item["name"] for item in listed}
    assert all({*item} == {"name", "state", "description"} for item in (before, *listed))  # ABI.md
    pid = host.data("service-registry", "status", name="web")["pid"]
    assert answer(host, "healer", "services.restart", name="web") is None
    assert host.data("service-registry", "status", name="web")["pid"] != pid
    rows = host.data("service-registry", "history", object="web", action_name="restart")
    assert [row["phase"] for row in rows] == ["intent", "outcome"]
    assert [row["actor"]["plugin"] for row in rows] == ["healer", "healer"]
    assert rows[0]["actor"]["pid"] == host.pid("plugin-manager")
    assert "plugin healer" in host.ok("system", "history", "--object", "web")
    assert "the capability services:restart:db" in refusal(host, "healer", "services.restart", name="db")
    assert refusal(host, "healer", "services.status", name="nothing").startswith("not-found: ")
    (denied,) = host.data("plugin-manager", "history", failed=True, object="db")
    assert (denied["phase"], denied["action"]) == ("denied", "services.restart")
    assert denied["actor"]["plugin"] == "healer"
    assert denied["params"] == {"called_by": f"uid {os.getuid()}"}
    host.unload("healer")
    host.ok("service", "stop", "web")


def test_whose_call_made_a_plugin_restart_a_service_is_on_record(host: EmbeddedHost, tmp_path: Path) -> None:
    host.add_service("shop")
    create(host, "alice", role="operator")
    token = login(host, "alice", os.getuid())
    restart = '{"call":"services.restart","args":{"name":"shop"}}'
    on_event = asking("on_event", restart)
    asked = ["services:restart:shop", "events:down"]
    host.load(write(tmp_path, "healer", caller(on_event), capabilities=asked), grant="all")
    host.load(write(tmp_path, "source", caller(), capabilities=["events:down"]), grant="all")
    emit = '{"call":"events.emit","args":{"topic":"down","payload":""}}'
    for plugin, payload in (("healer", restart), ("source", emit)):
        host.data("plugin-manager", "invoke", id=plugin, func="call", payload=payload, token=token)

    def recorded() -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = host.data("service-registry", "history", object="shop", action_name="restart")
        return rows

    host.wait_for(lambda: len(recorded()) == 4)
    rows = recorded()
    assert [row["actor"]["plugin"] for row in rows] == ["healer"] * 4
    called_by = f"alice (uid {os.getuid()})"
    assert [row["params"]["called_by"] for row in rows] == [called_by] * 4
    assert host.ok("system", "history", "--object", "shop").count(f", called by {called_by}") == 2
    for name in ("healer", "source"):
        host.unload(name)
    host.ok("service", "stop", "shop")
    host.data("auth-service", "delete", name="alice")


def test_whose_call_had_a_worker_started_that_restarts_a_service_is_on_record(
    host: EmbeddedHost, tmp_path: Path
) -> None:
    host.add_service("hurried")
    restart = '{"call":"services.restart","args":{"name":"hurried"}}'
    asked = "services:restart:hurried"
    host.load(write(tmp_path, "hasty", caller(asking("_initialize", restart)), capabilities=[asked]), grant="all")
    host.data("plugin-manager", "grant", id="hasty", capability=asked)  # from now on it has another worker
    ask(host, "hasty", "kv.keys", prefix="")
    rows = host.data("service-registry", "history", object="hurried", action_name="restart")
    assert {row["params"].get("called_by") for row in rows} == {f"uid {os.getuid()}"}
    host.unload("hasty")
    host.ok("service", "stop", "hurried")


def test_a_plugin_that_may_restart_every_service_has_no_hold_on_workers(host: EmbeddedHost, tmp_path: Path) -> None:
    host.load(write(tmp_path, "victim", caller(), capabilities=["clock"]), grant="clock")
    host.load(write(tmp_path, "zealot", caller(), capabilities=["services:read", "services:restart:*"]), grant="all")
    answer(host, "victim", "clock.now")
    pid = host.data("service-registry", "status", name="plugin@victim")["pid"]
    for name in ("plugin@victim", "plugin@victim.socket", "plugin@ghost"):
        for call in ("services.restart", "services.status"):
            assert refusal(host, "zealot", call, name=name).startswith("not-found: ")
    assert not any(item["name"].startswith("plugin@") for item in answer(host, "zealot", "services.list"))
    assert host.ctl("service", "start", "plugin@ghost").returncode == 5
    answer(host, "victim", "clock.now")
    assert host.data("service-registry", "status", name="plugin@victim")["pid"] == pid
    assert "plugin@ghost" not in host.ok("service", "list")
    host.ok("service", "restart", "plugin@victim")
    assert host.data("service-registry", "status", name="plugin@victim")["pid"] != pid
    for plugin in ("victim", "zealot"):
        host.unload(plugin)


def test_a_plugin_does_not_restart_the_manager_that_waits_for_it(host: EmbeddedHost, tmp_path: Path) -> None:
    host.load(write(tmp_path, "zealot", caller(), capabilities=["services:restart:*"]), grant="all")
    pid = host.pid("plugin-manager")
    why = refusal(host, "zealot", "services.restart", name="plugin-manager")
    assert why == "conflict: a plugin cannot restart plugin-manager, which would wait for the call that requests it"
    assert host.pid("plugin-manager") == pid
    assert host.data("service-registry", "history", failed=True, object="plugin-manager")[-1]["error"] == "conflict"
    host.unload("zealot")


def test_a_name_that_no_service_can_have_is_told_so_however_long_it_is(host: EmbeddedHost, tmp_path: Path) -> None:
    host.load(write(tmp_path, "zealot", caller(), capabilities=["services:read", "services:restart:*"]), grant="all")
    for call in ("services.status", "services.restart"):
        for length in (129, 70_000):  # more than the registry takes as one line
            why = refusal(host, "zealot", call, name="x" * length)
            assert why.startswith("bad-request: name: 'xxx")
            assert "…' is not a service name: " in why
    host.unload("zealot")


def test_nothing_that_a_plugin_does_while_it_is_loaded_lasts(host: EmbeddedHost, tmp_path: Path) -> None:
    request = json.dumps({"call": "kv.set", "args": {"key": "early", "value": "x"}})
    early = asking("_initialize", request)
    host.load(write(tmp_path, "eager", caller(early), instance="shared", capabilities=["kv"]), grant="kv")
    assert answer(host, "eager", "kv.keys", prefix="") == []
    host.unload("eager")


def test_an_event_is_kept_followed_and_delivered(host: EmbeddedHost, tmp_path: Path) -> None:
    note = '{"call":"kv.set","args":{"key":"got","value":"an event"}}'
    on_event = asking("on_event", note)
    host.load(write(tmp_path, "source", caller(), capabilities=["events:deploy"]), grant="events:deploy")
    host.load(write(tmp_path, "drain", caller(on_event), capabilities=["kv", "events:*"]), grant="all")
    with host.connect("plugin-manager") as follower:
        follower.sendall(b'{"action":"events","follow":true,"lines":0}\n')
        host.data("plugin-manager", "health")
        answer(host, "source", "events.emit", topic="deploy", payload="v1")
        event = read_reply(follower)["data"]
    assert (event["plugin"], event["topic"], event["payload"]) == ("source", "deploy", "v1")
    assert "source  deploy: v1" in host.ok("plugin", "events", "--topic", "deploy")
    host.wait_for(lambda: answer(host, "drain", "kv.get", key="got") == "an event")
    assert "the capability events:other" in refusal(host, "source", "events.emit", topic="other", payload="")
    assert refusal(host, "drain", "events.emit", topic="*", payload="").startswith("bad-request: ")
    assert refusal(host, "source", "events.emit", topic="deploy", payload="x" * 20_000).startswith("limit: ")
    for name in ("source", "drain"):
        host.unload(name)


LOGS = """(func (export "on_event") (param $len i32) (result i64)
    (call $log (i32.const 1) (i32.const 1024) (local.get $len)) (i64.const 0))"""


def test_events_that_wait_are_not_delivered_after_a_revocation(host: EmbeddedHost, tmp_path: Path) -> None:
    host.load(write(tmp_path, "source", caller(), capabilities=["events:news"]), grant="all")
    listener = caller(LOGS, imports=LOG)
    path = write(tmp_path, "listener", listener, capabilities=["kv", "events:news"], limits={"time": 20})
    host.load(path, grant="all")
    with ThreadPoolExecutor(1) as threads:
        busy = threads.submit(ask, host, "listener", "kv.get", "until_refused", key="a")
        host.wait_for(lambda: host.data("plugin-manager", "show", id="listener")["waiting"] == 1)
        for number in range(3):
            answer(host, "source", "events.emit", topic="news", payload=f"secret {number}")
        for capability in ("events:news", "kv"):
            host.data("plugin-manager", "revoke", id="listener", capability=capability)
        assert "the capability kv" in busy.result()["message"]
    host.data("plugin-manager", "grant", id="listener", capability="events:news")
    answer(host, "source", "events.emit", topic="news", payload="public")
    host.wait_for(lambda: "public" in host.log)
    assert "secret" not in host.log
    for name in ("source", "listener"):
        host.unload(name)


def test_a_disabled_plugin_gets_no_events(host: EmbeddedHost, tmp_path: Path) -> None:
    host.load(write(tmp_path, "source", caller(), capabilities=["events:news"]), grant="all")
    host.load(write(tmp_path, "sleeper", core(LOGS, imports=LOG), capabilities=["events:news"]), grant="all")
    host.data("plugin-manager", "disable", id="sleeper")
    answer(host, "source", "events.emit", topic="news", payload="while disabled")
    host.data("plugin-manager", "enable", id="sleeper")
    answer(host, "source", "events.emit", topic="news", payload="while enabled")
    host.wait_for(lambda: "while enabled" in host.log)
    assert "while disabled" not in host.log
    for name in ("source", "sleeper"):
        host.unload(name)


def test_events_wait_while_their_plugin_is_held_back(new_host: NewHost, tmp_path: Path) -> None:
    host = new_host({"CIRCLEOSD_PLUGINS_BACK_OFF_AFTER": "1"})
    host.load(write(tmp_path, "source", caller(), capabilities=["events:news"]), grant="all")
    trap = '(func (export "on_event") (param i32) (result i64) (unreachable))'
    path = write(tmp_path, "weak", core(trap), capabilities=["events:news"])
    host.load(path, grant="all")
    began = time.monotonic()
    for _ in range(5):
        answer(host, "source", "events.emit", topic="news", payload="old")
    host.wait_for(lambda: host.data("plugin-manager", "show", id="weak")["failures"] >= 3)
    assert time.monotonic() - began >= 1.5  # half a second after the first failure, one after the second
    write(tmp_path, "weak", core(LOGS, imports=LOG), version="2", capabilities=["events:news"])
    host.load(path)
    answer(host, "source", "events.emit", topic="news", payload="new")  # while the others wait for the old version
    host.wait_for(lambda: '"new"' in host.log)
    assert host.data("plugin-manager", "show", id="weak")["failures"] == 0
    assert '"old"' not in host.log


def test_the_manager_does_not_exit_over_an_event_that_nobody_waits_for(new_host: NewHost, tmp_path: Path) -> None:
    host = new_host({"CIRCLEOSD_SERVER_IDLE_EXIT": "0.2"})
    host.load(write(tmp_path, "source", caller(), capabilities=["events:news"]), grant="all")
    listener = native("HANDLER(on_event) { sleep(1); host->log(1, payload, length); return 0; }", "on_event")
    path = write(tmp_path, "slow", listener, plugin_type="native", capabilities=["events:news"])
    host.load(path, trust=True, grant="all")
    for payload in ("first", "second"):
        answer(host, "source", "events.emit", topic="news", payload=payload)
    manager = host.pid("plugin-manager")
    host.wait_for(lambda: '"second"' in host.log)
    assert '"first"' in host.log
    host.wait_for(lambda: manager not in host.processes())


def test_events_that_follow_from_one_another_end(host: EmbeddedHost, tmp_path: Path) -> None:
    emit = '{"call":"events.emit","args":{"topic":"ball","payload":"to you"}}'
    bounce = asking("on_event", emit)
    for name in ("ping", "pong"):
        host.load(write(tmp_path, name, caller(bounce), capabilities=["events:ball"]), grant="all")
    answer(host, "ping", "events.emit", topic="ball", payload="first")
    host.wait_for(lambda: len(host.data("plugin-manager", "events", topic="ball")) >= 4)
    time.sleep(0.3)  # in which an endless exchange would go on
    assert [row["plugin"] for row in host.data("plugin-manager", "events", topic="ball")] == ["ping", "pong"] * 2
    for name in ("ping", "pong"):
        host.unload(name)


@pytest.mark.parametrize(
    "request_text",
    ['{"call":"kv.get","args":{}}', '{"call":"kv.get","args":{"key":1}}', '{"call":"rm","args":{}}', "[]", "x"],
)
def test_a_malformed_host_call_is_an_error_and_nothing_more(
    host: EmbeddedHost, tmp_path: Path, request_text: str
) -> None:
    host.load(write(tmp_path, "odd", caller(), capabilities=["kv"]), grant="kv")
    reply = host.invoke("odd", "call", request_text)
    assert not reply["ok"]
    assert answer(host, "odd", "kv.get", key="a") is None
    host.unload("odd")


def test_the_counter_of_the_examples_counts(new_host: NewHost) -> None:
    host = new_host({})
    host.load("plugins/examples/counter/counter.wasm")
    assert "the capability kv" in host.ctl("plugin", "invoke", "counter", "handle", "visits").stderr
    host.ok("plugin", "grant", "counter", "kv")
    assert [host.ok("plugin", "invoke", "counter", "handle", "visits") for _ in range(2)] == ["1\n", "2\n"]
    os.kill(host.pid("plugin-manager"), signal.SIGKILL)
    assert host.ok("plugin", "invoke", "counter", "handle", "visits") == "3\n"


@pytest.mark.usefixtures("other_users")
def test_nobody_grants_a_plugin_more_than_ones_own_rights(host: EmbeddedHost, tmp_path: Path) -> None:
    for name in ("web", "db"):
        host.add_service(name)
    create(host, "helper", role="operator")
    host.data(AUTH, "grant", name="helper", verb="plugin:grant", object="healer")
    create(host, "boss", role="admin")
    for name in ("helper", "boss"):
        host.data(AUTH, "grant", name=name, verb="service:restart", object="db", deny=True)
    helper, boss = login(host, "helper", ALICE), login(host, "boss", BOB)
    path = write(tmp_path, "healer", caller(), capabilities=["kv", "services:restart:*"])
    host.load(path)

    def grant(capability: str) -> dict[str, Any]:
        return ask_as(host, ALICE, PLUGINS, "grant", id="healer", capability=capability, token=helper)

    assert grant("kv")["ok"]
    assert grant("services:restart:web")["ok"]
    assert answer(host, "healer", "services.restart", name="web") is None
    for capability in ("services:restart:db", "services:restart:*"):
        refused = grant(capability)
        assert refused["error"] == "denied", refused
        assert "a right that you do not have yourself: service:restart on " in refused["message"]
    assert host.data(PLUGINS, "history", failed=True, object="healer")[-1]["actor"]["user"] == "helper"

    def load(**more: Any) -> dict[str, Any]:
        with loading_as(BOB, host, path, token=boss, **more) as sock:
            return read_reply(sock)

    assert load()["ok"]
    assert load(grant="services:restart:db")["error"] == "denied"
    host.data(PLUGINS, "grant", id="healer", capability="services:restart:db")
    assert load()["error"] == "denied"  # whoever chooses the code has what is granted to it
    host.unload("healer")


@pytest.mark.usefixtures("other_users")
def test_nobody_loads_what_is_granted_more_than_ones_own_rights_meanwhile(host: EmbeddedHost, tmp_path: Path) -> None:
    create(host, "bound", role="admin")
    host.data(AUTH, "grant", name="bound", verb="service:restart", object="db", deny=True)
    asks: dict[str, Any] = {"plugin_type": "native", "capabilities": ["services:restart:*"], "limits": {"time": 20}}
    host.load(write(tmp_path, "growing", native(""), **asks), trust=True)
    path, token = write(tmp_path, "growing", native(SLOW), **asks | {"version": "2"}), login(host, "bound", BOB)
    with loading_as(BOB, host, path, token=token, trust=True) as sock:
        host.wait_for(lambda: any(host.runtime.rglob("growing.staged.sock")))
        host.data(PLUGINS, "grant", id="growing", capability="services:restart:db")
        refused = read_reply(sock)
    assert refused["error"] == "denied", refused
    assert "a right that you do not have yourself: service:restart on db" in refused["message"]
    assert host.data(PLUGINS, "show", id="growing")["version"] == "1"
    assert not any(host.runtime.rglob("growing.staged.sock"))
    host.unload("growing")
