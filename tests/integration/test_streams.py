"""Streams: watch and logs --follow, over real sockets, and what becomes of them when somebody goes away."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time

import pytest

from circleosd.paths import SERVICES
from tests.integration.conftest import NewHost
from tests.integration.embedded_host import BIN, EmbeddedHost, read_reply
from tests.waiting import SECONDS

TALKER = "[Service]\nType=exec\nExecStart=/bin/sh -c 'while sleep 0.1; do echo tick; done'\n"
QUIET = "[Service]\nType=exec\nExecStart=/bin/sh -c 'echo one; echo two; exec sleep 600'\n"


@pytest.fixture
def talking(new_host: NewHost) -> EmbeddedHost:
    host = new_host({"CIRCLEOSD_SERVER_IDLE_EXIT": "0.5"})
    host.add_service("talker", TALKER)
    return host


def test_watch_tells_the_state_and_then_every_change(talking: EmbeddedHost) -> None:
    with talking.connect("service-registry") as sock, sock.makefile("rb") as replies:
        sock.sendall(b'{"action":"watch","name":"talker","tag":9}\n')
        first = json.loads(replies.readline())
        assert (first["more"], first["tag"], first["data"]["state"]) == (True, 9, "inactive")
        talking.ok("service", "start", "talker")
        states = [json.loads(replies.readline())["data"]["state"] for _ in range(2)]
        assert states == ["activating", "active"]
        os.kill(talking.data("service-registry", "status", name="talker")["pid"], signal.SIGKILL)
        assert json.loads(replies.readline())["data"]["state"] == "failed"


def test_watch_without_a_name_tells_of_all_in_the_order_of_the_list(talking: EmbeddedHost) -> None:
    for name in ("zulu", "alpha", "mike"):
        talking.add_service(name, TALKER)
    listed = [row["name"] for row in talking.data("service-registry", "list")]
    assert {*SERVICES, "talker", "zulu"} <= {*listed}
    with talking.connect("service-registry") as sock, sock.makefile("rb") as replies:
        sock.sendall(b'{"action":"watch"}\n')
        names = [json.loads(replies.readline())["data"]["name"] for _ in listed]
        assert names == listed
        talking.load("plugins/example.wasm")
        later = (json.loads(line)["data"]["name"] for line in replies)
        assert next(name for name in later if name not in names).startswith("plugin@example")


@pytest.mark.parametrize(
    "line",
    [
        "service watch auth-service",
        "service logs quiet --follow",
        "system history --follow --lines 1",
        "plugin events --follow",
    ],
)
def test_what_is_followed_ends_when_its_reader_does(new_host: NewHost, line: str) -> None:
    host = new_host({})
    host.add_service("quiet", QUIET)
    host.ok("service", "start", "quiet")
    follower = host.begin(*line.split())
    try:
        assert follower.stdout is not None
        if "events" not in line:
            follower.stdout.readline()
        follower.stdout.close()
        follower.stdout = None
        assert follower.wait(SECONDS) == 141
    finally:
        follower.kill()
        _, errors = follower.communicate()
    assert errors == ""


def test_logs_show_the_last_lines_and_follow_goes_on(talking: EmbeddedHost) -> None:
    talking.add_service("quiet", QUIET)
    talking.ok("service", "start", "quiet")
    talking.wait_for(lambda: "two" in talking.logged("quiet"))
    logs = [line.split()[-1] for line in talking.ok("service", "logs", "quiet").splitlines()]
    assert logs == ["one", "two"]
    assert talking.ok("service", "logs", "quiet", "--lines", "1").endswith(" two\n")
    assert "one" not in talking.ok("service", "logs", "quiet", "--since", str(time.time() + 60))
    talking.ok("service", "start", "talker")
    with talking.begin("service", "logs", "talker", "--follow", "--lines", "1") as follower:
        assert follower.stdout is not None
        seen = [follower.stdout.readline().split()[-1] for _ in range(4)]
        follower.send_signal(signal.SIGINT)
        assert follower.wait(SECONDS) == 130
    assert seen == ["tick"] * 4


def test_a_stream_whose_reader_is_gone_ends_and_the_service_becomes_idle(talking: EmbeddedHost) -> None:
    with talking.connect("service-registry") as sock, sock.makefile("rb") as replies:
        sock.sendall(b'{"action":"watch","name":"talker"}\n')
        pid = talking.pid("service-registry")
        assert replies.readline()
    talking.wait_for(lambda: pid not in talking.processes())


def test_a_stream_whose_reader_has_sent_much_before_it_went_ends_too(talking: EmbeddedHost) -> None:
    with talking.connect("service-registry") as sock:
        sock.sendall(b'{"action":"watch","name":"talker"}\n')
        assert read_reply(sock)["more"], "it has begun, and says nothing more: no write tells that nobody reads it"
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.send(b"\n" * 65536)
    pid = talking.pid("service-registry")
    talking.wait_for(lambda: pid not in talking.processes())


def test_a_stream_with_much_to_say_to_nobody_says_nothing_about_it_in_the_log(new_host: NewHost) -> None:
    host = new_host({})
    for number in range(60):
        host.call("auth-service", {"action": "delete", "name": f"u{number}"})
    for _ in range(20):
        with host.connect("auth-service") as sock:
            sock.sendall(b'{"action":"follow"}\n')
    host.wait_for(lambda: host.data("auth-service", "health")["connections"] == 1)
    assert "socket.send() raised" not in host.log


def test_a_stream_ends_when_the_service_is_told_to_stop(talking: EmbeddedHost) -> None:
    with talking.connect("service-registry") as sock, sock.makefile("rb") as replies:
        sock.sendall(b'{"action":"watch","name":"talker"}\n')
        assert replies.readline()
        begun = time.monotonic()
        os.kill(talking.pid("service-registry"), signal.SIGTERM)
        assert replies.readline() == b""
        assert time.monotonic() - begun < 15  # a request would get 20


def test_who_watches_is_told_that_the_service_has_ended(talking: EmbeddedHost) -> None:
    watcher = subprocess.Popen(
        [BIN / "circlectl", "service", "watch", "talker"], env=talking.environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert watcher.stdout is not None
    assert "inactive" in watcher.stdout.readline()
    os.kill(talking.pid("service-registry"), signal.SIGTERM)
    _, said = watcher.communicate(timeout=SECONDS)
    assert watcher.returncode == 12
    assert said.startswith("circlectl: service-registry ended the stream [unavailable]; see the log: "), said


def test_nobody_follows_what_is_not_cataloged(talking: EmbeddedHost) -> None:
    for action in ("watch", "logs"):
        assert talking.call("service-registry", {"action": action, "name": "sshd"})["error"] == "not-found"
    for wrong in ({"lines": -1}, {"lines": 10_001}, {"since": "yesterday"}, {"follow": "yes"}):
        reply = talking.call("service-registry", {"action": "logs", "name": "talker", **wrong})
        assert reply["error"] == "bad-request"


def test_who_watches_as_often_as_the_registry_allows_keeps_nobody_from_asking_it(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_SERVER_MAX_CONNECTIONS_PER_UID": "600"})
    with contextlib.ExitStack() as stack:
        watching = [stack.enter_context(host.connect("service-registry")) for _ in range(550)]
        for sock in watching:
            sock.sendall(b'{"action":"watch","name":"auth-service"}\n')
        for sock in watching:
            assert read_reply(sock)["ok"]
        assert host.data("service-registry", "list")
