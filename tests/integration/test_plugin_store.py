"""The store of plugins is whole after the manager was killed, wherever that was."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.core_text import core
from tests.door import acting_as
from tests.integration.conftest import NewHost
from tests.integration.crashing_manager import STEPS
from tests.integration.embedded_host import EmbeddedHost, read_reply
from tests.integration.made import caller, write
from tests.integration.people import ALICE, ask, create, login
from tests.native_source import native

UNIT = """
[Unit]
Requires=circleosd-plugins.socket
[Service]
Type=notify
ExecStart={python} {program} {armed}
Restart=on-failure
RestartSec=10ms
StateDirectory=circleosd/plugins
CacheDirectory=circleosd/plugins
"""
PROGRAM = Path(__file__).parent / "crashing_manager.py"
LOADING = ["stage", "probe", "keep", "put", "put_record", "committed", "adopt", "sweep", "unlink"]
UNLOADING = ["delete", "committed", "remove", "forget", "sweep", "unlink"]


def moments(steps: list[str], *, of_committed: bool) -> list[tuple[str, str]]:
    """Before and after each of the steps that follow the COMMIT, or else of those that precede it."""
    committed = steps.index("committed")
    chosen = steps[committed:] if of_committed else steps[:committed]
    return list(itertools.product(chosen, ("before", "after")))


class Store:
    """A host whose manager dies at a step, and a plugin in two versions, each of which tells which one it is."""

    def __init__(self, host: EmbeddedHost, directory: Path) -> None:
        self.host = host
        self.armed = host.directory / "armed"
        self.directory = directory
        unit = UNIT.format(python=sys.executable, program=PROGRAM, armed=self.armed)
        (host.units / "circleosd-plugins.service").write_text(unit)

    def write(self, version: int) -> Path:
        body = f"""(data (i32.const 64) "{version}")
          (func (export "version") (param i32) (result i64) (i64.const 0x4000000001))"""
        wants = ["kv"] if version == 1 else ["kv", "clock"]
        return write(self.directory, "moved", caller(body), version=str(version), capabilities=wants)

    def load(self, version: int) -> bool:
        return self.ask({"action": "load", "path": str(self.write(version)), "grant": "all"})

    def unload(self) -> bool:
        return self.ask({"action": "unload", "id": "moved"})

    def ask(self, request: dict[str, Any]) -> bool:
        """Whether it was done; not, when the manager ended meanwhile."""
        with self.host.connect("plugin-manager") as sock:
            sock.sendall(json.dumps(request).encode() + b"\n")
            try:
                reply = sock.makefile().readline()
            except ConnectionResetError:
                return False
        assert not reply or json.loads(reply)["ok"], reply
        return bool(reply)

    def call(self, function: str, payload: str = "") -> str:
        return str(self.host.invoke("moved", function, payload)["data"])

    def check(self) -> str | None:
        """The version that is loaded, after looking whether everything of it is there and nothing else."""
        host = self.host
        plugins = host.data("plugin-manager", "list")
        store = host.directory / "state/circleosd/plugins/store"
        host.wait_for(lambda: {path.name for path in store.iterdir()} == {item["digest"] for item in plugins})
        names = {f"{item['id']}.sock" for item in plugins}
        host.wait_for(lambda: {path.name for path in (host.runtime / "plugins").glob("*.sock")} <= names)
        rows = host.data("plugin-manager", "history", object="moved")
        done = [row for row in rows if row["phase"] == "done"]
        if not plugins:
            assert not done or done[-1]["action"] == "unload"
            return None
        (plugin,) = plugins
        assert self.call("version") == plugin["version"]
        granted = {item["name"] for item in plugin["capabilities"] if item["granted"]}
        assert granted == ({"kv"} if plugin["version"] == "1" else {"kv", "clock"})
        assert done[-1]["action"] == "load"
        assert done[-1]["after"] == {
            "version": plugin["version"], "digest": plugin["digest"], "manifest_digest": plugin["manifest_digest"],
            "granted": sorted(granted, reverse=True),
        }  # fmt: skip
        return str(plugin["version"])

    def dies_at(self, step: str, when: str, ask: Callable[[], bool]) -> None:
        """The manager is killed at a step of what is asked, and nobody hears how that went."""
        self.armed.write_text(f"{step} {when}")
        assert not ask(), f"{step} {when} was not reached"
        self.host.wait_for(lambda: not self.armed.exists())

    def keep_something(self) -> None:
        self.call("call", json.dumps({"call": "kv.set", "args": {"key": "k", "value": "v"}}))

    def kept(self) -> str | None:
        kept: str | None = json.loads(self.call("call", json.dumps({"call": "kv.get", "args": {"key": "k"}})))
        return kept


@pytest.fixture
def store(new_host: NewHost, tmp_path: Path) -> Store:
    return Store(new_host({}), tmp_path)


def test_a_manager_killed_at_any_step_of_a_load_or_unload_leaves_all_of_it_or_nothing(store: Store) -> None:
    """A load or unload that was cut short is repeated by what the next round does up to its own step."""
    store.host.pid("plugin-manager")
    for step, when in moments(LOADING, of_committed=False):
        store.dies_at(step, when, lambda: store.load(1))
        assert store.check() is None, f"load: {step} {when}"
    loads, unloads = moments(LOADING, of_committed=True), moments(UNLOADING, of_committed=True)
    assert store.load(1)
    assert store.check() == "1"
    store.keep_something()
    for step, when in moments(UNLOADING, of_committed=False):
        store.dies_at(step, when, store.unload)
        assert store.check() == "1", f"unload: {step} {when}"
    plain = [None] * (len(unloads) - len(loads))
    for (step, when), load in zip(unloads, [*loads, *plain], strict=True):
        store.dies_at(step, when, store.unload)
        assert store.check() is None, f"unload: {step} {when}"
        if load:
            store.dies_at(*load, lambda: store.load(1))
            assert store.check() == "1", f"load: {load}"
        else:
            assert store.load(1)
        assert store.kept() is None
        store.keep_something()
    assert store.unload()
    assert store.check() is None


def test_a_manager_killed_at_any_step_of_an_upgrade_has_the_old_or_the_new_version(store: Store) -> None:
    assert store.load(1)
    store.keep_something()
    old, new = 1, 2
    for step, when in moments(LOADING, of_committed=False):
        store.dies_at(step, when, lambda: store.load(2))
        assert store.check() == "1", f"{step} {when}"
    for step, when in moments(LOADING, of_committed=True):
        store.dies_at(step, when, functools.partial(store.load, new))
        assert store.check() == str(new), f"{step} {when}"
        old, new = new, old
    assert store.load(new)
    assert store.check() == str(new)
    assert store.kept() == "v"


def test_a_manager_killed_at_any_moment_has_a_whole_plugin(store: Store) -> None:
    assert store.load(1)
    chance = random.Random(4)  # the same moments in every run
    for number in range(8):
        pid = store.host.pid("plugin-manager")
        loading = threading.Thread(target=store.load, args=(2 - number % 2,))
        loading.start()
        time.sleep(chance.uniform(0.0, 0.25))
        os.kill(pid, signal.SIGKILL)
        loading.join()
        assert store.check() in ("1", "2")


def test_a_plugin_whose_load_died_with_the_manager_is_loaded_at_once(new_host: NewHost, tmp_path: Path) -> None:
    host = new_host({})
    slow = native("__attribute__((constructor)) void slow(void) { sleep(4); }")
    path = write(tmp_path, "again", slow, plugin_type="native", limits={"time": 20})
    manager, registry = host.pid("plugin-manager"), host.pid("service-registry")
    with host.connect("plugin-manager") as sock:
        sock.sendall(json.dumps({"action": "load", "path": str(path), "trust": True}).encode() + b"\n")
        host.wait_for(lambda: any(host.runtime.rglob("again.sock")))
        host.wait_for(lambda: host.data("service-registry", "status", name="plugin@again")["pid"])
        os.kill(registry, signal.SIGSTOP)  # so that the next manager has not yet stopped the worker that is left
        os.kill(manager, signal.SIGKILL)
    host.wait_for(lambda: host.pid("plugin-manager") != manager)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(host.load, write(tmp_path, "again", core()))
        time.sleep(0.5)  # in which a load that waits for nothing gets to that worker
        os.kill(registry, signal.SIGCONT)
        loading.result()
    assert host.invoke("again", "echo", "x")["data"] == "x"


@pytest.mark.usefixtures("other_users")
def test_who_lost_the_right_while_a_plugin_is_loaded_loads_none_and_unloads_none(
    new_host: NewHost, tmp_path: Path
) -> None:
    host = new_host({})
    host.open_to_everybody()
    host.load(write(tmp_path, "there", core()))
    create(host, "adam", role="admin")
    path = write(tmp_path, "late", core())
    token = login(host, "adam", ALICE)
    request = {"action": "load", "path": str(path), "manifest": "m", "files": ["path", "manifest"], "token": token}
    registry = host.pid("service-registry")
    with acting_as(ALICE):
        sock, waiting = host.connect("plugin-manager"), host.connect("plugin-manager")
    with sock, waiting, path.open() as artifact, path.with_suffix(".json").open() as manifest:
        os.kill(registry, signal.SIGSTOP)  # so that nobody starts the worker
        line = json.dumps(request).encode() + b"\n"
        socket.send_fds(sock, [line], [artifact.fileno(), manifest.fileno()])
        host.wait_for(lambda: any((host.directory / "state").rglob(".staged-*")))
        waiting.sendall(json.dumps({"action": "unload", "id": "there", "token": token}).encode() + b"\n")
        host.data("plugin-manager", "health")  # answered after the other has been read
        host.data("auth-service", "revoke", name="adam")
        host.wait_for(lambda: not ask(host, ALICE, "plugin-manager", "list", token=token)["ok"])
        os.kill(registry, signal.SIGCONT)
        for reply in (read_reply(sock), read_reply(waiting)):
            assert reply["error"] == "denied", reply
    assert [plugin["id"] for plugin in host.data("plugin-manager", "list")] == ["there"]
    for plugin in ("late", "there"):
        row = host.data("plugin-manager", "history", object=plugin)[-1]
        assert (row["phase"], row["actor"]["user"]) == ("denied", "adam")


def test_an_unload_that_is_on_record_is_completed_whatever_its_time(new_host: NewHost, tmp_path: Path) -> None:
    host = new_host({"CIRCLEOSD_SERVER_REQUEST_TIMEOUT": "4"})
    path = write(tmp_path, "slow", caller(), capabilities=[{"name": "kv", "reason": "-"}])
    load = {"action": "load", "path": str(path), "grant": "kv"}
    host.wait_for(lambda: host.call("plugin-manager", load)["ok"])
    registry = host.pid("service-registry")
    os.kill(registry, signal.SIGSTOP)  # so that nobody stops the worker
    with host.connect("plugin-manager") as sock:
        sock.sendall(b'{"action":"unload","id":"slow"}\n')
        time.sleep(5.0)  # longer than the request may take
        os.kill(registry, signal.SIGCONT)
        reply = read_reply(sock)
    assert reply["ok"], reply
    assert not any(host.runtime.rglob("slow.sock"))


def test_every_step_is_tried() -> None:
    assert {*LOADING, *UNLOADING} == set(STEPS)
