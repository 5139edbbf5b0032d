"""Clients that send garbage, half a line, too much or nothing: an answer for them, nothing for the others."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import termios
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from circleosd.paths import SERVICES
from tests.door import acting_as
from tests.integration.conftest import NewHost
from tests.integration.embedded_host import HASTY, EmbeddedHost, read_reply, to_the_end
from tests.integration.people import ALICE, BOB, STRANGER, ask
from tests.lingering import lingering
from tests.waiting import SECONDS


def resident(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("service", SERVICES)
def test_a_malformed_line_gets_an_error_and_the_connection_stays(host: EmbeddedHost, service: str) -> None:
    with host.connect(service) as sock:
        for line in (b"garbage", b"", b"{}", b"[]", b"\xff\xfe\xfd", b'{"action":"fly"}', b'{"action":"health","x":1}'):
            sock.sendall(line + b"\n")
            assert read_reply(sock)["error"] in ("bad-request", "unknown-action")
        sock.sendall(b'{"action":"health","tag":"t"}\n')
        reply = read_reply(sock)
        assert reply["ok"]
        assert reply["tag"] == "t"


@pytest.mark.parametrize("service", SERVICES)
def test_a_tag_of_any_depth_gets_an_answer(host: EmbeddedHost, service: str) -> None:
    with host.connect(service, 5) as sock:
        for depth in (1, 90, *range(960, 1010)):  # around 1000 Python can read what it then cannot write
            sock.sendall(b'{"action":"fly","tag":' + b"[" * depth + b"]" * depth + b"}\n")
            assert read_reply(sock)["error"] == ("bad-request" if depth > 90 else "unknown-action")


@pytest.mark.parametrize("service", SERVICES)
def test_pipelined_requests_are_answered_in_order(host: EmbeddedHost, service: str) -> None:
    with host.connect(service) as sock, sock.makefile("rb") as replies:
        sender = threading.Thread(
            target=sock.sendall, args=(b"".join(b'{"action":"health","tag":%d}\n' % n for n in range(2000)),)
        )
        sender.start()
        assert [json.loads(replies.readline())["tag"] for _ in range(2000)] == list(range(2000))
        sender.join()


@pytest.mark.parametrize("service", SERVICES)
def test_a_hundred_clients_at_once_are_all_answered(host: EmbeddedHost, service: str) -> None:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(host.connect(service)) for _ in range(100)]
        for sock in socks:
            sock.sendall(b'{"action":"health"}\n{"action":"list"}\n')
        for sock in socks:
            with sock.makefile("rb") as replies:
                assert [json.loads(replies.readline())["ok"] for _ in range(2)] == [True, True]


@pytest.mark.parametrize("service", SERVICES)
def test_a_line_of_a_gibibyte_is_refused_without_being_kept(host: EmbeddedHost, service: str) -> None:
    pid = host.pid(service)
    before = resident(pid)
    block = b"x" * (1 << 20)
    with host.connect(service) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(1024):
                sock.sendall(block)
            sock.sendall(b"\n")
        reply = json.loads(to_the_end(sock))
    assert reply["error"] == "limit"
    assert "a line may have at most" in reply["message"]
    assert resident(pid) - before < 24 << 20
    assert host.pid(service) == pid


def test_a_line_sent_byte_by_byte_must_be_complete_in_time(new_host: NewHost) -> None:
    host = new_host(HASTY)
    with host.connect("auth-service") as sock, contextlib.suppress(BrokenPipeError):
        begun = time.monotonic()
        while time.monotonic() - begun < 10:
            sock.sendall(b" ")
            sock.settimeout(0.05)
            try:
                data = sock.recv(4096)
            except TimeoutError:
                continue
            assert json.loads(data)["error"] == "timeout"
            return
    pytest.fail("a sender of one byte at a time was never cut off")


def test_who_does_not_read_is_cut_off_and_holds_up_nobody(new_host: NewHost) -> None:
    host = new_host(HASTY)
    pid = host.pid("auth-service")
    before = resident(pid)
    with host.connect("auth-service") as deaf:
        deaf.settimeout(0.2)
        with contextlib.suppress(TimeoutError, BrokenPipeError, ConnectionResetError):
            for _ in range(2000):
                deaf.sendall(b'{"action":"health"}\n' * 500)
        assert host.data("auth-service", "health")["pid"] == pid
        deaf.settimeout(SECONDS)
        answered = to_the_end(deaf)
    assert len(answered) < 8 << 20
    assert resident(pid) - before < 16 << 20


def test_a_line_without_its_end_gets_an_error(host: EmbeddedHost) -> None:
    with host.connect("auth-service") as sock:
        sock.sendall(b'{"action":"health"}\n{"action":"health"}')
        sock.shutdown(socket.SHUT_WR)
        first, second = (json.loads(line) for line in to_the_end(sock).splitlines())
    assert first["ok"]
    assert "the line is incomplete" in second["message"]


@pytest.mark.usefixtures("other_users")
def test_all_connections_that_people_may_have_are_no_more_than_set_and_leave_room_for_root(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_SERVER_MAX_CONNECTIONS": "4", "CIRCLEOSD_SERVER_MAX_CONNECTIONS_PER_UID": "2"})
    host.open_to_everybody()
    with contextlib.ExitStack() as stack:
        for uid in (ALICE, ALICE, BOB, BOB):
            with acting_as(uid):
                sock = stack.enter_context(host.connect("auth-service"))
            sock.sendall(b'{"action":"health"}\n')
            assert read_reply(sock)["error"] == "denied"  # but served
        with acting_as(STRANGER):
            refused = stack.enter_context(host.connect("auth-service"))
        reply = json.loads(to_the_end(refused))
        assert (reply["error"], "at most 4 connections" in reply["message"]) == ("limit", True)
        assert host.call("auth-service", {"action": "health"})["ok"]
    host.wait_for(lambda: ask(host, STRANGER, "auth-service", "health")["error"] == "denied")


def test_the_connections_of_a_uid_are_no_more_than_set(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_SERVER_MAX_CONNECTIONS_PER_UID": "2"})
    with host.connect("auth-service") as one, host.connect("auth-service") as two:
        for sock in (one, two):
            sock.sendall(b'{"action":"health"}\n')
            assert read_reply(sock)["ok"]
        with host.connect("auth-service") as three:
            assert "connections at once for uid" in json.loads(to_the_end(three))["message"]


def test_unfinished_lines_of_all_connections_share_a_bound(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_SERVER_MAX_BUFFERED": str(4 << 20), "CIRCLEOSD_PLUGINS_MAX_LINE": str(2 << 20)})
    part = b'{"action":"invoke","payload":"' + b"x" * (1 << 20)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(host.connect("plugin-manager")) for _ in range(8)]
        for sock in socks:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(part)
        host.wait_for(lambda: len(select.select(socks, [], [], 0)[0]) >= 3)
        assert host.call("plugin-manager", {"action": "health"})["ok"]
        refused = select.select(socks, [], [], 0)[0]
        assert all(b"too much data" in sock.recv(4096) for sock in refused)
        assert len(refused) <= 6


def test_replies_that_nobody_reads_share_the_bound(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_SERVER_MAX_BUFFERED": str(1 << 20)})
    script = host.directory / "wordy.sh"
    script.write_text("for line in $(seq 200); do printf '%04000d\\n' $line; done; exec sleep 1000")
    host.add_service("wordy", f"[Service]\nType=exec\nExecStart=/bin/sh {script}\n")
    host.ok("service", "start", "wordy")
    host.wait_for(lambda: host.logged("wordy")[-1:] == ["200".zfill(4000)])
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(host.connect("service-registry")) for _ in range(6)]
        for sock in socks:
            sock.sendall(b'{"action":"logs","name":"wordy","lines":200}\n')
        host.wait_for(lambda: len(select.select(socks, [], [], 0)[0]) == len(socks))  # each is answered
        replies = [read_reply(sock) for sock in socks]
        kept = [len(reply["data"]) for reply in replies if reply["ok"]]
        assert kept == [200] * len(kept)
        assert 1 <= len(kept) <= 2
        assert all("cannot be kept" in reply["message"] for reply in replies if not reply["ok"])
        socks[0].sendall(b'{"action":"logs","name":"wordy","lines":200}\n')
        assert read_reply(socks[0])["ok"], "who reads is served"


def test_who_has_sent_all_and_reads_nothing_is_cut_off(new_host: NewHost) -> None:
    host = new_host(HASTY)
    line = json.dumps({"action": "nope", "tag": "t" * 1000}).encode() + b"\n"
    with contextlib.ExitStack() as stack:
        numbers = range(100, 400, 10)  # so that of some what is left fits into the buffers on the way
        socks = [stack.enter_context(host.connect("auth-service")) for _ in numbers]

        def send(sock: socket.socket, number: int) -> None:
            with contextlib.suppress(OSError):  # of some it is not taken any more
                sock.sendall(line * number)
                sock.shutdown(socket.SHUT_WR)

        with ThreadPoolExecutor(len(numbers)) as threads:
            assert [*threads.map(send, socks, numbers)] == [None] * len(numbers)
        host.wait_for(lambda: host.data("auth-service", "health")["connections"] == 1)


def test_descriptors_that_nobody_asked_for_are_closed(host: EmbeddedHost) -> None:
    pid = host.pid("auth-service")
    count = len([*Path(f"/proc/{pid}/fd").iterdir()])
    with Path("/dev/null").open() as null, host.connect("auth-service") as sock:
        for _ in range(20):
            socket.send_fds(sock, [b'{"action":"health"}\n'], [null.fileno()] * 4)
            read_reply_or_end(sock)
    host.wait_for(lambda: len([*Path(f"/proc/{pid}/fd").iterdir()]) <= count)


@pytest.mark.parametrize("messages", [1, 5], ids=["in one message", "one after the other"])
def test_a_request_with_more_descriptors_than_may_wait_is_refused(host: EmbeddedHost, messages: int) -> None:
    with Path("/dev/null").open() as null, host.connect("auth-service") as sock:
        for piece in [b"{"] * (messages - 1) + [b'"action":"health"}\n']:
            socket.send_fds(sock, [piece], [null.fileno()] * (5 // messages))
        reply = read_reply(sock)
        assert reply["error"] == "limit", reply
        assert "at most 4 descriptors" in reply["message"]


@pytest.mark.parametrize("busy", [False, True], ids=["after a refusal", "during a stream"])
def test_descriptors_do_not_pile_up_on_a_connection(host: EmbeddedHost, busy: bool) -> None:
    pid = host.pid("auth-service")
    count = len([*Path(f"/proc/{pid}/fd").iterdir()])
    with Path("/dev/null").open() as null, host.connect("auth-service") as sock:
        if busy:
            sock.sendall(b'{"action":"follow"}\n')
        for _ in range(500):
            socket.send_fds(sock, [b"x"], [null.fileno()] * 4)
        host.wait_for(lambda: unread(sock) == 0)
        assert len([*Path(f"/proc/{pid}/fd").iterdir()]) <= count + 10


@pytest.mark.parametrize("line", [b"{", b'{"action":"verify","path":"a","files":["path"]}\n'], ids=["half", "whole"])
@pytest.mark.parametrize("service", SERVICES)
def test_a_descriptor_whose_closing_waits_holds_up_nobody(host: EmbeddedHost, service: str, line: bytes) -> None:
    pid = host.pid(service)
    with lingering(30) as slow:
        os.kill(pid, signal.SIGSTOP)  # so that what is passed is closed here first
        try:
            with host.connect(service) as sock:
                socket.send_fds(sock, [line], [slow.fileno()])
                slow.close()
        finally:
            os.kill(pid, signal.SIGCONT)
        host.wait_for(lambda: host.data(service, "health")["connections"] == 1)
        assert host.pid(service) == pid, "its watchdog has ended it"


def test_a_descriptor_whose_closing_waits_keeps_no_reason_from_others(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_AUTH_SESSION_IDLE": "never"})
    with lingering(300) as slow, host.connect("auth-service") as sock:
        socket.send_fds(sock, [b"{"], [slow.fileno()])
        slow.close()
        for _ in range(2):
            assert host.call("auth-service", {"action": "health"})["error"] == "unavailable"


def unread(sock: socket.socket) -> int:
    """Bytes that the peer has not taken from its socket yet (unix(7), SIOCOUTQ)."""
    return struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]  # type: ignore[no-any-return]


def read_reply_or_end(sock: socket.socket) -> None:
    """Read a reply, if the connection still stands."""
    with contextlib.suppress(AssertionError, OSError):
        read_reply(sock)


@pytest.fixture(autouse=True)
def _others_are_served_afterwards(host: EmbeddedHost) -> Iterator[None]:
    yield
    for service in SERVICES:
        assert host.call(service, {"action": "health"})["ok"]


def test_a_service_without_descriptors_neither_spins_nor_floods_the_log(new_host: NewHost) -> None:
    host = new_host({})
    pid = host.pid("auth-service")
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    begun = time.monotonic()
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, hard))
    with host.connect("auth-service") as first:
        host.wait_for(lambda: "cannot accept a connection" in host.log)
        before = processor_ticks(pid)
        first.settimeout(2)
        with pytest.raises(TimeoutError):
            first.recv(1)
        assert processor_ticks(pid) - before < 50  # hundredths of a second, in two
        assert host.log.count("cannot accept a connection") <= 2 + time.monotonic() - begun
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        first.settimeout(SECONDS)
        first.sendall(b'{"action":"health"}\n')
        assert read_reply(first)["data"]["pid"] == pid


@pytest.mark.parametrize("service", SERVICES)
def test_a_request_that_finds_no_descriptor_left_is_told_so(new_host: NewHost, service: str) -> None:
    host = new_host({})
    with host.connect(service) as sock:
        sock.sendall(b'{"action":"health"}\n')
        pid = read_reply(sock)["data"]["pid"]
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, hard))
        sock.sendall(b'{"action":"health"}\n')
        reply = read_reply(sock)
        assert (reply["error"], reply["message"]) == ("limit", "Too many open files in this service; try again later")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        sock.sendall(b'{"action":"health"}\n')
        assert read_reply(sock)["ok"]


def test_a_connection_for_which_there_is_no_descriptor_is_told_so_and_closed(new_host: NewHost) -> None:
    host = new_host({})
    with contextlib.ExitStack() as stack:
        pid = host.pid("auth-service")
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        most = max(map(int, os.listdir(f"/proc/{pid}/fd"))) + 5
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, hard))
        told: list[bytes] = []
        while len(told) < 3 or b'"limit"' not in told[-3]:
            assert len(told) < most + 3
            sock = stack.enter_context(host.connect("auth-service"))
            sock.sendall(b'{"action":"absent"}\n')
            reply = sock.recv(1000)
            told.append(reply + to_the_end(sock) if b'"limit"' in reply else reply)
        assert told[0].startswith(b'{"ok":false,"message":"auth-service has no action')
        refused = {(reply["error"], reply["message"]) for reply in map(json.loads, told[-3:])}
        assert refused == {("limit", "Too many open files in this service; try again later")}
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    host.wait_for(lambda: host.call("auth-service", {"action": "health"})["ok"])
    assert host.pid("auth-service") == pid


def processor_ticks(pid: int) -> int:
    """What a process has used of the CPU, in hundredths of a second (proc(5), utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
