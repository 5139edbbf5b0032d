"""A worker from its socket to a plugin that is ready: what it tells when the machine lets it go no further."""

from __future__ import annotations

import errno
import socket
import threading
from pathlib import Path

import pytest

from circleosd.worker import frames, main, session
from circleosd.worker.channel import Channel
from circleosd.worker.frames import Failed, Load

LOAD = Load("example", "wasm", limits=frames.Limits(concurrency=2))


def test_a_worker_that_cannot_be_confined_tells_who_waits_and_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise OSError(errno.EPERM, "cannot confine the worker: prctl failed")

    accepted: list[socket.socket] = []

    def channel(connection: socket.socket) -> Channel:
        accepted.append(connection)  # which lasts as long as the worker
        return Channel(connection)

    monkeypatch.setattr(main, "settle", refuse)
    monkeypatch.setattr(main, "Channel", channel)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as manager:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        monkeypatch.setattr(main, "passed_socket", lambda environment, pid: listener)
        manager.connect(str(tmp_path / "socket"))
        manager.sendall(frames.encode(frames.LOAD, 0, frames.load_body(LOAD)))
        assert main._main("example") == 0
        data = manager.recv(1 << 16)
        accepted.pop().close()
    _, kind, _ = frames.HEADER.unpack_from(data)
    why = "[Errno 1] cannot confine the worker: prctl failed"
    assert kind == frames.FAILED
    assert frames.parse_failed(data[frames.HEADER.size :]) == Failed(
        "unavailable", f"its worker cannot continue: {why}", []
    )
    assert capsys.readouterr().err == f"cannot serve the plugin example: {why}\n"


def test_a_worker_that_can_have_no_threads_for_its_calls_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(threading, "stack_size", lambda size: 0)
    with socket.socket(socket.AF_UNIX) as connection:
        parallel = session._Parallel(Channel(connection), LOAD)
        with pytest.raises(OSError, match="can't start new thread"):
            parallel.prepare()
