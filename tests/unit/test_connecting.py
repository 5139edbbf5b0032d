"""Connecting to a listener whose queue is full."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from circleosd import client, upstream, wire


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
            waiting.join(10)
            assert answers == ["here"]
