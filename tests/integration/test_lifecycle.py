"""Processes come and go: on demand, when idle, after SIGKILL; nothing acknowledged is lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.integration.conftest import NewHost
from tests.integration.embedded_host import BIN, PROJECT, EmbeddedHost, read_reply

SERVICES = ["auth-service", "service-registry", "plugin-manager"]
TICKER = "[Service]\nType=exec\nExecStart=/bin/sh -c 'echo up; while sleep 1; do :; done'\n"


def children(host: EmbeddedHost) -> list[int]:
    """Processes of the host without the supervisor."""
    assert host.process is not None
    return [pid for pid in host.processes() if pid != host.process.pid]


def test_nothing_runs_before_the_first_connection_and_after_the_last(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_SERVER_IDLE_EXIT": "0.3", "CIRCLEOSD_PLUGINS_IDLE_WORKER": "0.2"})
    assert children(host) == []
    host.ok("plugin", "load", "plugins/example.wasm")
    assert host.ok("plugin", "invoke", "example", "upper", "abc") == "ABC\n"
    assert len(children(host)) >= 2
    host.wait_for(lambda: children(host) == [])
    assert host.ok("plugin", "invoke", "example", "upper", "abc") == "ABC\n"


def test_idle_exits_lose_no_request(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_SERVER_IDLE_EXIT": "0.06"})
    pids, failures = set[int](), list[str]()

    def client(pause: float) -> None:
        for _ in range(25):
            reply = host.call("auth-service", {"action": "health"})
            if not reply["ok"]:
                failures.append(str(reply))
            else:
                pids.add(reply["data"]["pid"])
            time.sleep(pause)  # about the idle limit, so that requests meet exits

    clients = [threading.Thread(target=client, args=(pause,)) for pause in (0.08, 0.11)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert failures == []
    assert len(pids) > 3, "the service did not exit in between, so this shows nothing"


@pytest.mark.parametrize("service", SERVICES)
def test_after_sigkill_in_the_middle_of_work_the_next_request_is_answered(host: EmbeddedHost, service: str) -> None:
    for _ in range(3):
        pid = host.pid(service)
        with host.connect(service) as sock:
            sock.sendall(b'{"action":"health"}\n' * 200)
            read_some = sock.recv(100)
            assert read_some
            os.kill(pid, signal.SIGKILL)
        assert host.pid(service) != pid


def test_what_was_acknowledged_before_a_sigkill_is_there_after_it(host: EmbeddedHost) -> None:
    acknowledged: list[str] = []
    stop = threading.Event()

    def create(prefix: str) -> None:
        number = 0
        while not stop.is_set():
            name, number = f"{prefix}{number}", number + 1
            with contextlib.suppress(AssertionError, OSError):
                if host.call("auth-service", {"action": "create", "name": name, "password": "long enough"})["ok"]:
                    acknowledged.append(name)

    writers = [threading.Thread(target=create, args=(f"kill{n}_",)) for n in range(3)]
    for writer in writers:
        writer.start()
    for _ in range(4):
        goal = len(acknowledged) + 3
        host.wait_for(lambda: len(acknowledged) >= goal)  # noqa: B023  # called before the loop goes on
        os.kill(host.pid("auth-service"), signal.SIGKILL)
    stop.set()
    for writer in writers:
        writer.join()
    users = {user["name"] for user in host.data("auth-service", "list")}
    assert set(acknowledged) <= users
    created = {row["object"] for row in host.data("auth-service", "history", action_name="create", lines=10_000)}
    assert {name for name in users if name.startswith("kill")} == {name for name in created if name.startswith("kill")}


def test_plugins_are_there_after_the_manager_and_the_supervisor_restart(new_host: NewHost) -> None:
    host = new_host({})
    host.ok("plugin", "load", "plugins/example.wasm")
    os.kill(host.pid("plugin-manager"), signal.SIGKILL)
    assert host.ok("plugin", "invoke", "example", "crc32", "hello") == "3610a686\n"
    assert host.stop() == 0
    host.start()
    assert host.ok("plugin", "invoke", "example", "crc32", "hello") == "3610a686\n"


def test_a_dead_supervisor_takes_its_services_along_and_the_next_one_starts(new_host: NewHost) -> None:
    host = new_host({})
    host.add_service("ticker", TICKER)
    host.ok("service", "start", "ticker")
    for service in SERVICES:
        host.pid(service)
    assert host.process is not None
    host.stop(signal.SIGKILL)
    host.wait_for(lambda: host.processes() == [])
    host.start()
    assert "inactive" in host.ok("service", "list")


def test_a_second_supervisor_is_refused(host: EmbeddedHost) -> None:
    second = subprocess.run(
        [BIN / "circleosd", "up", "--dir", host.directory],
        env=host.environment, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert second.returncode == 7
    assert second.stderr == f"circleosd: CircleOSD already runs at {host.runtime}\n"
    assert host.pid("auth-service")


def test_any_cataloged_unit_is_started_stopped_and_restarted(host: EmbeddedHost) -> None:
    host.add_service("ticker", TICKER)
    listed = {row["name"]: row for row in json.loads(host.ok("service", "list", "--json"))}
    assert listed["ticker"]["state"] == "inactive"
    assert "active (running" in host.ok("service", "start", "ticker")
    first = json.loads(host.ok("service", "status", "ticker", "--json"))
    assert first["state"] == "active"
    assert Path(f"/proc/{first['pid']}").exists()
    assert "active (running" in host.ok("service", "start", "ticker")
    assert json.loads(host.ok("service", "status", "ticker", "--json"))["pid"] == first["pid"]
    host.ok("service", "restart", "ticker")
    second = json.loads(host.ok("service", "status", "ticker", "--json"))
    assert second["pid"] != first["pid"]
    assert "inactive (dead)" in host.ok("service", "stop", "ticker")
    assert not Path(f"/proc/{second['pid']}").exists()


@pytest.mark.parametrize(
    ("unit", "says"),
    [
        ("[Service]\nExecStart=/nonexistent/program\n", "no program /nonexistent/program"),
        ("[Service]\nType=forking\nExecStart=/bin/true\n", "the embedded mode runs Type="),
        (
            "[Service]\nType=notify\nExecStart=/bin/sh -c 'echo no license; exit 3'\n",
            "exit status 3; it said: no license",
        ),
        ("[Service]\nType=notify\nTimeoutStartSec=300ms\nExecStart=/bin/sleep 60\n", "the unit's is timeout"),
        ("[Service\n", "line 1 is neither"),
        ("[Service]\n", "one ExecStart="),
    ],
)
def test_a_unit_that_cannot_start_says_why(host: EmbeddedHost, unit: str, says: str) -> None:
    host.add_service("broken", unit)
    done = host.ctl("service", "start", "broken")
    assert done.returncode == 11, done
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_service_that_fails_is_started_again_later_each_time(host: EmbeddedHost) -> None:
    host.add_service(
        "crasher", "[Service]\nType=notify\nRestart=on-failure\nRestartSec=50ms\nExecStart=/bin/sh -c 'exit 1'\n"
    )
    assert host.ctl("service", "start", "crasher").returncode == 11
    host.wait_for(lambda: host.data("service-registry", "status", name="crasher")["restarts"] >= 3)
    assert "restart in 0.1 s" in host.log
    assert "restart in 0.4 s" in host.log
    host.ok("service", "stop", "crasher")
    restarts = host.data("service-registry", "status", name="crasher")["restarts"]
    host.data("service-registry", "list")
    assert host.data("service-registry", "status", name="crasher")["restarts"] == restarts


def test_a_service_that_gives_no_sign_of_life_is_ended_by_the_watchdog(host: EmbeddedHost) -> None:
    ready = "import os,socket,time;s=socket.socket(1,2);s.connect(os.environ['NOTIFY_SOCKET']);s.send(b'READY=1')"
    command = f'python3 -c "{ready};time.sleep(60)"'
    host.add_service("stuck", f"[Service]\nType=notify\nWatchdogSec=300ms\nExecStart={command}\n")
    host.ok("service", "start", "stuck")
    host.wait_for(lambda: host.data("service-registry", "status", name="stuck")["state"] == "failed")
    assert host.data("service-registry", "status", name="stuck")["result"] == "watchdog"


def test_a_frozen_daemon_is_replaced(new_host: NewHost) -> None:
    host = new_host({})
    unit = (PROJECT / "units/circleosd-auth.service").read_text()
    (host.units / "circleosd-auth.service").write_text(unit.replace("WatchdogSec=20s", "WatchdogSec=400ms"))
    pid = host.pid("auth-service")
    os.kill(pid, signal.SIGSTOP)
    assert host.pid("auth-service") != pid


def test_stopping_a_service_on_demand_says_that_its_socket_listens(host: EmbeddedHost) -> None:
    host.pid("auth-service")
    reply = host.call("service-registry", {"action": "stop", "name": "auth-service"})
    assert reply["data"]["state"] == "inactive"
    assert "circleosd-auth.socket still listens and starts it on demand" in reply["message"]
    assert host.pid("auth-service")


@pytest.mark.parametrize("service", SERVICES)
def test_a_daemon_stays_small_over_a_thousand_requests(host: EmbeddedHost, service: str) -> None:
    with host.connect(service) as sock:
        for _ in range(1000):
            sock.sendall(b'{"action":"list"}\n')
            assert read_reply(sock)["ok"]
    memory = host.data(service, "health")["memory"]
    assert memory <= 45 << 20, f"{service} holds {memory / (1 << 20):.1f} MiB"
