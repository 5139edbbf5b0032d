"""A service that cannot start."""

from __future__ import annotations

import builtins
import errno
import socket
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

from circleosd import __main__ as program
from circleosd import threads
from circleosd.errors import Unavailable
from circleosd.refusal import refuse
from circleosd.systemd import journal
from tests.unit.serving import connected


def test_a_service_that_can_open_no_more_files_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "s")

    def no_file(*_: object) -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    async def compose(*_: object) -> NoReturn:
        monkeypatch.setattr(builtins, "__import__", no_file)
        no_file()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        monkeypatch.setattr(program, "passed_socket", lambda *_: listener)
        monkeypatch.setattr(program, "_composed", compose)
        monkeypatch.setattr("circleosd.refusal.refuse", partial(refuse, seconds=0.1))
        monkeypatch.setattr(journal, "set_up", lambda: None)
        with connected(path) as peer:
            peer.send(b"request\n")
            try:
                with pytest.raises(Unavailable, match="auth-service cannot start"):
                    program.serve("auth-service")
            finally:
                monkeypatch.undo()
            assert b"auth-service cannot start: [Errno 24] Too many open files" in peer.recv(1000)


def test_a_service_that_can_have_no_event_loop_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "s")

    def no_loop() -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        monkeypatch.setattr(program, "passed_socket", lambda *_: listener)
        monkeypatch.setattr(threads, "runner", no_loop)
        monkeypatch.setattr(journal, "set_up", lambda: None)
        monkeypatch.setattr("circleosd.refusal.refuse", partial(refuse, seconds=0.1))
        with connected(path) as peer:
            peer.send(b"request\n")
            with pytest.raises(Unavailable, match="auth-service cannot start"):
                program.serve("auth-service")
            assert b"auth-service cannot start: [Errno 24] Too many open files" in peer.recv(1000)


def test_a_service_that_can_open_no_more_files_goes_on_without_short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_file(*_: object) -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as while_it_tries:
        while_it_tries.setattr(builtins, "__import__", no_file)
        program._take_short_turns()
