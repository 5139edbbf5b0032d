"""The store of plugins is whole after the manager was killed, wherever that was."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import NewHost
from tests.integration.crashing_manager import STEPS
from tests.integration.embedded_host import EmbeddedHost
from tests.integration.made import caller, write

pytestmark = pytest.mark.timeout(300)  # dozens of starts of a manager and of workers in each test

UNIT = """
[Unit]
Requires=circleosd-plugins.socket
[Service]
Type=notify
ExecStart={python} {program} {armed}
Restart=on-failure
RestartSec=50ms
StateDirectory=circleosd/plugins
CacheDirectory=circleosd/plugins
"""
PROGRAM = Path(__file__).parent / "crashing_manager.py"
LOADING = ["stage", "probe", "keep", "put", "put_record", "committed", "adopt", "sweep", "unlink"]
UNLOADING = ["delete", "committed", "remove", "forget", "sweep", "unlink"]


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
        return str(self.host.data("plugin-manager", "invoke", id="moved", func=function, payload=payload))

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
            "version": plugin["version"], "digest": plugin["digest"], "granted": sorted(granted, reverse=True),
        }  # fmt: skip
        self.call("call", json.dumps({"call": "kv.set", "args": {"key": "k", "value": "v"}}))
        return str(plugin["version"])

    def wait_until_dead(self) -> None:
        self.host.wait_for(lambda: not self.armed.exists())


@pytest.fixture
def store(new_host: NewHost, tmp_path: Path) -> Store:
    return Store(new_host({}), tmp_path)


def test_a_manager_killed_at_any_step_of_a_load_leaves_all_of_it_or_nothing(store: Store) -> None:
    outcomes = set()
    for step in LOADING:
        for when in ("before", "after"):
            store.host.pid("plugin-manager")
            store.armed.write_text(f"{step} {when}")
            assert not store.load(1), f"{step} {when} was not reached"
            store.wait_until_dead()
            version = store.check()
            outcomes.add(version)
            committed = (*LOADING[LOADING.index("committed") :],)
            assert version == ("1" if step in committed else None), f"{step} {when}"
            assert store.load(1)
            assert store.check() == "1"
            assert store.unload()
            assert store.check() is None
    assert outcomes == {None, "1"}


def test_a_manager_killed_at_any_step_of_an_upgrade_has_the_old_or_the_new_version(store: Store) -> None:
    assert store.load(1)
    assert store.check() == "1"
    old, new = 1, 2
    for step in LOADING:
        for when in ("before", "after"):
            store.armed.write_text(f"{step} {when}")
            assert not store.load(new), f"{step} {when} was not reached"
            store.wait_until_dead()
            committed = (*LOADING[LOADING.index("committed") :],)
            assert store.check() == str(new if step in committed else old), f"{step} {when}"
            assert store.load(new)
            assert store.check() == str(new)
            old, new = new, old


def test_a_manager_killed_at_any_step_of_an_unload_has_all_of_it_or_nothing(store: Store) -> None:
    for step in UNLOADING:
        for when in ("before", "after"):
            assert store.load(1)
            assert store.check() == "1"
            store.armed.write_text(f"{step} {when}")
            assert not store.unload(), f"{step} {when} was not reached"
            store.wait_until_dead()
            assert store.check() == ("1" if step == "delete" else None), f"{step} {when}"
    assert store.load(1)
    assert store.call("call", json.dumps({"call": "kv.get", "args": {"key": "k"}})) == "null"


def test_a_manager_killed_at_any_moment_has_a_whole_plugin(store: Store) -> None:
    assert store.load(1)
    chance = random.Random(4)  # the same moments in every run
    for number in range(12):
        pid = store.host.pid("plugin-manager")
        loading = threading.Thread(target=store.load, args=(2 - number % 2,))
        loading.start()
        time.sleep(chance.uniform(0.0, 0.25))
        os.kill(pid, signal.SIGKILL)
        loading.join()
        assert store.check() in ("1", "2")


def test_every_step_is_tried() -> None:
    assert {*LOADING, *UNLOADING} == set(STEPS)
