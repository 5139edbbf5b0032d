"""Asking a service whose queue is full, or that dies over its answer."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from circlectl.asking import Asking
from circleosd import client, upstream, wire
from circleosd.errors import Limit, Timeout, Unavailable
from tests.waiting import SECONDS


def listener(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(0)
    return sock


def fill(path: Path) -> list[socket.socket]:
    """Connections until no more fit."""
    held = []
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        held.append(sock)
        try:
            sock.connect(str(path))
        except BlockingIOError:
            return held


def answer_all(sock: socket.socket, count: int) -> None:
    for _ in range(count):
        peer, _ = sock.accept()
        with peer:
            if peer.recv(4096):
                peer.sendall(wire.success("here"))


def test_a_caller_waits_for_a_place_in_a_full_queue(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with listener(path) as sock:
        asks: list[Callable[[], object]] = [
            lambda: asyncio.run(upstream.ask(str(path), {"action": "x"}, timeout=10)),
            lambda: next(client.call(str(path), {"action": "x"}, timeout=10)),
        ]
        for ask in asks:
            held = fill(path)
            answers: list[object] = []
            waiting = threading.Thread(target=lambda: answers.append(ask()))  # noqa: B023  # joined in this round
            waiting.start()
            time.sleep(0.1)  # it has met the full queue by then; were it slower, the test would still be right
            for one in held:
                one.close()
            answer_all(sock, len(held))
            waiting.join(SECONDS)
            assert answers == ["here"]


def test_a_caller_who_waits_in_vain_for_a_place_in_a_full_queue_is_told_of_the_time(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with listener(path):
        held = fill(path)
        with pytest.raises(Timeout):
            asyncio.run(upstream.ask(str(path), {"action": "x"}, timeout=0.01))
        with pytest.raises(Timeout):
            next(client.call(str(path), {"action": "x"}, timeout=0.01))
        for one in held:
            one.close()


def test_circlectl_waits_for_a_reply_as_long_as_the_service_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds: list[float | None] = []
    taken, received = threading.Event(), socket.socket.recv

    def answer() -> None:
        peer, _ = sock.accept()
        with peer:
            received(peer, 4096)
            taken.set()
            peer.sendall(wire.success("here"))

    def receive(self: socket.socket, size: int, flags: int = 0) -> bytes:
        if flags != socket.MSG_PEEK:
            return received(self, size, flags)
        assert taken.wait(SECONDS)
        raise TimeoutError

    monkeypatch.setattr(socket.socket, "settimeout", lambda self, seconds: bounds.append(seconds))
    monkeypatch.setattr(socket.socket, "recv", receive)
    with listener(tmp_path / "s.sock") as sock:
        service = threading.Thread(target=answer)
        service.start()
        assert Asking(str(tmp_path), None, ()).once("s", {"action": "x"}) == "here"
        service.join(SECONDS)
    assert bounds == [client.CONNECT, None]


@pytest.mark.timeout(60)
def test_circlectl_does_not_wait_for_ever_where_nobody_reads_what_it_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "CONNECT", 0.1)
    with listener(tmp_path / "s.sock"):
        ask = Asking(str(tmp_path), None, ())
        with pytest.raises(Timeout, match="no reply from s in time; see: circlectl system status"):
            ask.once("s", {"action": "x"})
    with listener(tmp_path / "t.sock"), pytest.raises(Timeout, match="no reply from t in time"):
        next(ask.stream("t", {"action": "x", "text": "long" * 1_000_000}))


def test_who_is_refused_before_the_request_was_sent_is_told_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "s.sock")

    async def connect(path: str) -> socket.socket:
        sock = await connecting(path)
        peer, _ = accepting.accept()
        with peer:
            peer.sendall(wire.failure(Limit("at most 1 connections at once")))
        return sock

    connecting = upstream.connect
    monkeypatch.setattr(upstream, "connect", connect)

    async def follow() -> None:
        async for _ in upstream.follow(path, {"action": "x"}):
            pass

    with listener(tmp_path / "s.sock") as accepting:
        for asking in (lambda: upstream.ask(path, {"action": "x"}, timeout=10), follow):
            with pytest.raises(Limit, match="at most 1 connections"):
                asyncio.run(asking())


@pytest.mark.parametrize(
    ("sent", "said"), [(b"", "without an answer"), (b'{"ok":true,"da', "without the whole answer")]
)
def test_an_answer_that_broke_off_is_none(tmp_path: Path, sent: bytes, said: str) -> None:
    path = str(tmp_path / "s.sock")

    async def follow() -> None:
        async for _ in upstream.follow(path, {"action": "x"}):
            pass

    def die(sock: socket.socket) -> None:
        peer, _ = sock.accept()
        with peer:
            peer.recv(4096)
            peer.sendall(sent)

    asks: list[tuple[Callable[[], object], str]] = [
        (lambda: asyncio.run(upstream.ask(path, {"action": "x"}, timeout=10)), said),
        (lambda: asyncio.run(follow()), "s ended the stream"),
        (lambda: list(client.call(path, {"action": "x"}, stream=True)), "s ended the stream"),
    ]
    with listener(Path(path)) as sock:
        for ask, message in asks:
            service = threading.Thread(target=die, args=[sock])
            service.start()
            with pytest.raises(Unavailable, match=message):
                ask()
            service.join(SECONDS)


def test_an_answer_that_is_too_long_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "MAX_REPLY", 1000)
    path = tmp_path / "s.sock"

    def answer() -> None:
        peer, _ = sock.accept()
        with peer:
            peer.recv(4096)
            peer.sendall(wire.success("x" * 3000))

    with listener(path) as sock:
        service = threading.Thread(target=answer)
        service.start()
        with pytest.raises(Limit, match="the answer of s has more than 1000 bytes"):
            asyncio.run(upstream.ask(str(path), {"action": "x"}, timeout=10))
        service.join(SECONDS)


def test_nobody_is_told_to_join_the_group_that_stands_for_those_of_other_user_namespaces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a unit with PrivateUsers=, where every group of the host is nogroup."""
    found = os.stat_result((0o140660, 0, 0, 0, 65534, 65534, 0, 0, 0, 0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path: found)
        said = client._refusal("/run/circleosd/auth-service.sock")
    assert "this user namespace" in said
    assert "usermod" not in said


def test_who_may_make_no_socket_is_told_so_and_not_that_something_may_be_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a unit with RestrictAddressFamilies=, or where no more files can be opened."""

    def no_socket(*_: object) -> NoReturn:
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))

    monkeypatch.setattr(socket, "socket", no_socket)
    with pytest.raises(Unavailable, match=r"^cannot talk to auth-service: Address family not supported by protocol$"):
        next(client.call("/run/circleosd/auth-service.sock", {"action": "whoami"}))
