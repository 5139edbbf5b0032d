"""What is to come in time, on a machine that does nothing else."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import time

import pytest

from circleosd.paths import SERVICES
from tests.core_text import SPIN, core
from tests.integration.conftest import NewHost
from tests.integration.embedded_host import HASTY, EmbeddedHost, to_the_end
from tests.integration.people import ALICE, AUTH, PASSWORD, PLUGINS, REGISTRY, ask, create, login
from tests.measuring import once_it_holds
from tests.worker_driver import fails, start, still_works


@pytest.mark.usefixtures("other_users")
def test_what_ends_or_changes_sessions_counts_at_every_service_within_a_second(host: EmbeddedHost) -> None:
    sessions = {}
    for action in ("revoke", "disable", "passwd", "delete", "role"):
        create(host, f"by-{action}", role="none" if action == "role" else "viewer")
        sessions[action] = login(host, f"by-{action}", ALICE)

    def served(service: str, action: str) -> bool:
        reply = ask(host, ALICE, service, "list", token=sessions[action])
        assert reply["ok"] or reply["error"] == "denied", reply
        return bool(reply["ok"])

    for service, action in itertools.product((AUTH, REGISTRY, PLUGINS), sessions):
        assert served(service, action) == (action != "role")
    more = {"passwd": {"password": PASSWORD}, "role": {"role": "viewer"}}
    since = {}
    for action in sessions:
        host.data(AUTH, action, name=f"by-{action}", **more.get(action, {}))
        since[action] = time.monotonic()
        assert served(AUTH, action) == (action == "role"), "at once where it was done"
    for action, service in itertools.product(sessions, (REGISTRY, PLUGINS)):
        while (asked := time.monotonic()) and served(service, action) != (action == "role"):
            assert asked - since[action] <= 1.0, f"{service} has not heard of {action}"
            time.sleep(0.01)  # between looks


def test_half_a_line_and_nothing_are_timed_out_and_nobody_else_notices(new_host: NewHost) -> None:
    host = new_host(HASTY)
    for service in SERVICES:
        host.pid(service)

    def longest_wait_of_others() -> float:
        worst = 0.0
        with contextlib.ExitStack() as stack:
            half, silent = ([stack.enter_context(host.connect(name)) for name in SERVICES] for _ in range(2))
            for sock in half:
                sock.sendall(b'{"action":"he')
            begun = time.monotonic()
            while time.monotonic() - begun < 0.8:
                for name in SERVICES:
                    asked = time.monotonic()
                    assert host.data(name, "health")
                    worst = max(worst, time.monotonic() - asked)
            for sock in half:
                assert json.loads(to_the_end(sock))["error"] == "timeout"
            for sock in silent:
                assert "no request for 1 s" in json.loads(to_the_end(sock))["message"]
        return worst

    once_it_holds(longest_wait_of_others, lambda worst: worst < 0.5)


@pytest.mark.parametrize("instance", ["fresh", "shared"])
def test_an_infinite_loop_ends_at_its_time(instance: str) -> None:
    with start(core(SPIN), time=0.4, instance=instance) as worker:
        worker.ready()

        def took() -> float:
            began = time.monotonic()
            failed = fails(worker, "spin")
            took = time.monotonic() - began
            assert (failed.code, failed.message) == ("timeout", "took longer than 0.4 s")
            assert failed.backtrace[0].startswith("spin ")
            still_works(worker)
            assert took >= 0.3  # on a busy machine some ticks are of the call before
            return took

        for _ in range(2):
            once_it_holds(took, lambda took: took < 0.9)


FLOOD = """
import contextlib, socket, sys
def connected():
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(sys.argv[1])
    sock.setblocking(False)
    return sock
socks = [connected() for _ in range(500)]
print("connected", flush=True)
while True:
    for sock in socks:
        with contextlib.suppress(BlockingIOError):
            sock.send(b'{"action":"fly"}\\n' * 100)
        with contextlib.suppress(BlockingIOError):
            sock.recv(65536)
"""


def test_a_new_client_is_answered_while_five_hundred_others_never_stop_asking(host: EmbeddedHost) -> None:
    host.pid("auth-service")
    with subprocess.Popen(
        [sys.executable, "-c", FLOOD, host.runtime / "auth-service.sock"], stdout=subprocess.PIPE
    ) as flood:
        assert flood.stdout is not None
        flood.stdout.readline()

        def took() -> float:
            begun = time.monotonic()
            for _ in range(3):
                assert host.call("auth-service", {"action": "health"})["ok"]
            return time.monotonic() - begun

        try:
            once_it_holds(took, lambda took: took < 6)
        finally:
            flood.kill()
