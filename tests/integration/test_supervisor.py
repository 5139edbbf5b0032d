"""Whom the supervisor of the embedded mode listens to, and whom it lets in."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from circleosd.embedded.process import BURST, Process
from circleosd.embedded.supervisor import Supervisor
from circleosd.registry.units import UnitState
from tests.integration.conftest import NewHost, running
from tests.integration.embedded_host import EmbeddedHost, read_reply
from tests.integration.people import ALICE, ask
from tests.waiting import SECONDS, ended, until

LIVELY = """
import os, socket, time
manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
manager.connect(os.environ["NOTIFY_SOCKET"])
manager.send(b"READY=1")
while True:
    time.sleep(0.3)  # a tenth of WatchdogSec=
    manager.send(b"WATCHDOG=1")
"""


def test_nobody_else_gets_at_what_ones_own_circleosd_has(new_host: NewHost) -> None:
    host = new_host({})
    host.load("plugins/example.wasm")
    host.data("auth-service", "list")
    places = [host.runtime, host.directory / "state", host.directory / "cache"]
    found = [path for place in places for path in (place, *place.rglob("*"))]
    assert {path.name for path in found} >= {"supervisor.sock", "notify.sock", "auth.db", "plugins.db", "example.sock"}
    for path in found:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode) and path.parent.stat().st_mode & 0o777 == 0o700:
            continue
        assert mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.usefixtures("other_users")
@pytest.mark.parametrize(
    ("action", "parameters"),
    [
        ("job", {"verb": "start", "unit": "wanted.service"}),
        ("matching", {"pattern": "*"}),
        ("states", {"units": ["wanted.service"], "follow": False}),
        ("logs", {"units": ["wanted.service"], "follow": True}),
    ],
)
def test_the_supervisor_answers_nobody_else(host: EmbeddedHost, action: str, parameters: dict[str, Any]) -> None:
    host.add_service("wanted")
    reply = ask(host, ALICE, "supervisor", action, **parameters)
    assert (reply["ok"], reply["error"]) == (False, "denied")
    assert host.data("service-registry", "status", name="wanted")["state"] == "inactive"


def test_a_service_is_ready_when_its_own_process_says_so(host: EmbeddedHost) -> None:
    host.add_service("pending", "[Service]\nType=notify\nExecStart=/bin/sleep 100\n")
    with host.connect("service-registry") as starting:
        starting.sendall(b'{"action":"start","name":"pending"}\n')
        host.wait_for(lambda: host.data("service-registry", "status", name="pending")["pid"])
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.sendto(b"READY=1", str(host.runtime / "notify.sock"))
        assert host.data("service-registry", "status", name="pending")["state"] == "activating"
        host.data("service-registry", "stop", name="pending")


def test_a_service_is_not_given_up_for_what_a_stopped_supervisor_did_not_hear(host: EmbeddedHost) -> None:
    script = host.directory / "lively.py"
    script.write_text(LIVELY)
    run = f"[Service]\nType=notify\nWatchdogSec=3\nExecStart={sys.executable} {script}\n"
    host.add_service("lively", run)
    host.data("service-registry", "start", name="lively")
    pid = host.data("service-registry", "status", name="lively")["pid"]
    assert host.process
    host.process.send_signal(signal.SIGSTOP)  # Ctrl-Z
    time.sleep(5)  # beyond the deadline, which only the clock brings about
    host.process.send_signal(signal.SIGCONT)
    assert host.data("service-registry", "status", name="lively")["pid"] == pid
    os.kill(pid, signal.SIGSTOP)
    host.wait_for(lambda: host.data("service-registry", "status", name="lively")["result"] == "watchdog")


def test_what_a_service_leaves_behind_ends_with_it(host: EmbeddedHost) -> None:
    host.add_service("parent", "[Service]\nExecStart=/bin/sh -c 'sleep 1000 & echo child $!'\n")
    host.data("service-registry", "start", name="parent")
    host.wait_for(lambda: host.data("service-registry", "status", name="parent")["state"] == "inactive")
    lines = [line["text"] for line in host.data("service-registry", "logs", name="parent")]
    child = next(int(text.split()[1]) for text in lines if text.startswith("child "))
    host.wait_for(lambda: ended(child))


@pytest.mark.parametrize(
    ("lines", "state", "result"),
    [
        ("ExecStart=-/bin/sh -c 'exit 3'", "inactive", "success"),
        ("Restart=always\nRestartPreventExitStatus=SIGKILL\nExecStart=/bin/sh -c 'kill -9 $$$$'", "failed", "signal"),
        ("SuccessExitStatus=TEMPFAIL\nExecStart=/bin/sh -c 'exit 75'", "failed", "resources"),
    ],
)
def test_an_end_of_a_service_is_what_its_file_says(host: EmbeddedHost, lines: str, state: str, result: str) -> None:
    host.add_service("ending", f"[Service]\nRestartSec=600\n{lines}\n")
    host.call("service-registry", {"action": "start", "name": "ending"})
    host.wait_for(lambda: host.data("service-registry", "status", name="ending")["state"] == state)
    assert host.data("service-registry", "status", name="ending")["result"] == result


def test_a_start_does_not_wait_for_the_restart_that_is_due(host: EmbeddedHost) -> None:
    mark = host.directory / "may-run"
    run = f"[Service]\nRestart=on-failure\nRestartSec=600\nExecStart=/bin/sh -c 'test -e {mark} && exec sleep 1000'\n"
    host.add_service("retried", run)
    host.call("service-registry", {"action": "start", "name": "retried"})
    host.wait_for(lambda: host.data("service-registry", "status", name="retried")["sub"] == "auto-restart")
    mark.touch()
    assert host.data("service-registry", "start", name="retried")["state"] == "active"
    host.data("service-registry", "stop", name="retried")


def test_a_plugin_of_the_longest_name_is_loaded_and_upgraded_below_the_longest_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    longest = 107 - len("/cosd-12345678/run/service-registry.sock")  # unix(7); plugins' sockets are further down
    with tempfile.TemporaryDirectory() as short:
        place = Path(short, "x" * (longest - len(short) - 1))
        place.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        for host in running({}):
            for version in ("1", "2"):
                manifest = {"name": "n" * 48, "version": version}
                assert host.load("plugins/example.wasm", manifest=manifest)["version"] == version
                assert host.ok("plugin", "invoke", "n" * 48, "upper", "a").strip() == "A"
            assert [path.stem for path in (host.runtime / "plugins").iterdir()] == ["n" * 48]


def test_a_start_waits_for_the_end_of_a_stop(host: EmbeddedHost) -> None:
    mark, script = host.directory / "may-end", host.directory / "slow"
    script.write_text(
        f"trap 'until [ -e {mark} ]; do sleep 0.1; done; exit' TERM; echo up; while :; do sleep 0.1; done\n"
    )
    host.add_service("slow", f"[Service]\nTimeoutStopSec=60\nExecStart=/bin/sh {script}\n")
    host.data("service-registry", "start", name="slow")
    host.wait_for(lambda: "up" in host.logged("slow"))
    with host.connect("service-registry") as stopping, host.connect("service-registry") as starting:
        stopping.sendall(b'{"action":"stop","name":"slow"}\n')
        host.wait_for(lambda: host.data("service-registry", "status", name="slow")["state"] == "deactivating")
        starting.sendall(b'{"action":"start","name":"slow"}\n')
        host.wait_for(lambda: len(host.data("service-registry", "history", object="slow", action_name="start")) == 3)
        mark.touch()
        assert read_reply(stopping)["ok"]
        assert read_reply(starting)["data"]["state"] == "active"
    assert host.data("service-registry", "status", name="slow")["state"] == "active"
    host.data("service-registry", "stop", name="slow")


@pytest.mark.parametrize("verb", ["restart", "start"])
def test_what_waits_to_start_as_everything_is_stopped_does_not_start_any_more(tmp_path: Path, verb: str) -> None:
    mark, script = tmp_path / "may-end", tmp_path / "slow"
    waiting = f"until [ -e {mark} ]; do sleep 0.1; done"
    script.write_text(f"trap '{waiting}; exit 0' TERM; echo up; while :; do sleep 0.1; done\n")
    unit = f"[Service]\nTimeoutStopSec=60\nExecStart=/bin/sh {script}\n"
    (tmp_path / "slow.service").write_text(unit)

    async def stopped() -> tuple[str, str]:
        supervisor = Supervisor({}, [tmp_path])
        await supervisor.job("start", "slow.service")
        await until(lambda: supervisor.lines("slow.service"))
        jobs = [asyncio.create_task(supervisor.job(job, "slow.service")) for job in ("stop", verb)]
        await until(lambda: supervisor.state("slow.service").active == "deactivating")
        stopping = asyncio.create_task(supervisor.stop())
        await asyncio.sleep(0)
        mark.touch()
        await stopping
        return await jobs[-1], supervisor.state("slow.service").active

    assert asyncio.run(asyncio.wait_for(stopped(), SECONDS)) == ("canceled", "inactive")


@pytest.mark.parametrize(
    ("lines", "how"),
    [
        ("Type=notify\nTimeoutStartSec=100ms\nExecStart=/bin/sleep 600", ("timeout", None, "SIGKILL")),
        ("ExecStart=/bin/sh -c 'setsid sleep 600 & echo $!; exit 3'", ("exit-code", 3, None)),
    ],
    ids=["killed", "its output still open"],
)
def test_a_service_that_is_stopped_as_it_ends_has_failed_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, how: tuple[str, int | None, str | None]
) -> None:
    (tmp_path / "ending.service").write_text(f"[Service]\n{lines}\n")
    kill, killed = Process.signal, asyncio.Event()

    def noted(process: Process, number: int) -> None:
        kill(process, number)
        killed.set()

    async def stopped() -> UnitState:
        supervisor, before = Supervisor({}, [tmp_path]), len(asyncio.all_tasks())
        starting = asyncio.create_task(supervisor.job("start", "ending.service"))
        await killed.wait()
        await supervisor.job("stop", "ending.service")
        await starting
        await until(lambda: len(asyncio.all_tasks()) == before)
        for line in supervisor.lines("ending.service"):
            os.kill(int(line.text), signal.SIGKILL)
        return supervisor.state("ending.service")

    monkeypatch.setattr(Process, "signal", noted)
    state = asyncio.run(asyncio.wait_for(stopped(), SECONDS))
    assert (state.active, state.pid) == ("failed", None)
    assert (state.result, state.exit_status, state.signal) == how


def test_a_service_that_is_stopped_while_its_restart_is_due_has_not_failed(host: EmbeddedHost) -> None:
    host.add_service("retried", "[Service]\nRestart=on-failure\nRestartSec=600\nExecStart=/bin/false\n")
    host.call("service-registry", {"action": "start", "name": "retried"})
    host.wait_for(lambda: host.data("service-registry", "status", name="retried")["sub"] == "auto-restart")
    assert host.data("service-registry", "stop", name="retried")["state"] == "inactive"


def test_what_a_service_says_beyond_all_measure_is_left_out(host: EmbeddedHost) -> None:
    host.add_service(
        "loud", f"[Service]\nExecStart=/bin/sh -c 'head -c {BURST + 100_000} /dev/zero; echo; echo over'\n"
    )
    host.data("service-registry", "start", name="loud")
    host.wait_for(lambda: host.data("service-registry", "status", name="loud")["state"] == "inactive")
    assert host.logged("loud")[-1].startswith(f"wrote more than {BURST} bytes within 30 s")


def test_a_catalog_of_thousands_is_listed_and_watched(host: EmbeddedHost) -> None:
    names = [f"many-{number}" for number in range(3000)]
    file = host.catalog / "many.toml"
    file.write_text("".join(f'[[service]]\nname = "{name}"\nunit = "one-of-{name}.service"\n' for name in names))
    try:
        assert {*names} <= {item["name"] for item in host.data("service-registry", "list")}
        with host.connect("service-registry") as sock, sock.makefile() as replies:
            sock.sendall(b'{"action":"watch"}\n')
            for _ in names:
                assert json.loads(replies.readline())["more"]
    finally:
        file.unlink()


def test_a_worker_that_cannot_be_started_is_no_failure_of_its_plugin(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_PLUGINS_IDLE_WORKER": "0.1"})
    host.load("plugins/example.wasm")
    host.wait_for(lambda: host.data("service-registry", "status", name="plugin@example")["state"] == "inactive")
    unit = host.units / "circleosd-plugin@.service"
    unit.write_text("[Service]\nExecStart=/absent\n")
    reply = host.invoke("example", "upper", "a")
    assert (reply["error"], reply["message"]) == (
        "unavailable",
        "the worker of example cannot be started; see: circlectl service logs plugin@example",
    )
    assert "No such file or directory: '/absent'" in host.ok("service", "logs", "plugin@example")
    unit.unlink()
    host.wait_for(lambda: host.invoke("example", "upper", "a")["data"] == "A")  # who comes at once is sent away, too
    assert host.data("plugin-manager", "show", id="example")["failures"] == 0


def test_a_plugin_is_not_blamed_for_a_socket_that_cannot_be_started(host: EmbeddedHost) -> None:
    host.load("plugins/example.wasm")
    host.ok("service", "stop", "plugin@example.socket")
    host.wait_for(lambda: host.data("plugin-manager", "show", id="example")["worker"] == "none")
    in_the_way = host.runtime / "plugins" / "example.sock"
    in_the_way.mkdir()
    for _ in range(4):
        reply = host.invoke("example", "upper", "a")
        assert reply["error"] == "unavailable"
        assert reply["message"].startswith("cannot start the worker of example: cannot start plugin@example.socket")
        assert "Is a directory" in reply["message"]
    in_the_way.rmdir()
    assert host.invoke("example", "upper", "a")["data"] == "A"
    assert host.data("plugin-manager", "show", id="example")["failures"] == 0
