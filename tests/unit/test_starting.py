"""A service that cannot start."""

from __future__ import annotations

import builtins
import errno
import re
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
from tests import PROJECT
from tests.unit.serving import connected


def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, int]:
    """What a client hears from auth-service, which cannot start, and the exit status of that."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        monkeypatch.setattr(program, "passed_socket", lambda *_: listener)
        monkeypatch.setattr("circleosd.refusal.refuse", partial(refuse, seconds=0.1))
        monkeypatch.setattr(journal, "set_up", lambda: None)
        with connected(path) as peer:
            peer.send(b"request\n")
            try:
                with pytest.raises(Unavailable, match="auth-service cannot start") as ended:
                    program.serve("auth-service")
            finally:
                monkeypatch.undo()
            return peer.recv(1000), ended.value.exit_status


def no_file(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EMFILE, "Too many open files")


def test_a_service_that_can_open_no_more_files_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def compose(*_: object) -> NoReturn:
        monkeypatch.setattr(builtins, "__import__", no_file)
        no_file()

    monkeypatch.setattr(program, "_composed", compose)
    assert b"auth-service cannot start: [Errno 24] Too many open files" in told(tmp_path, monkeypatch)[0]


def test_a_service_that_can_have_no_event_loop_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "runner", no_file)
    assert b"auth-service cannot start: [Errno 24] Too many open files" in told(tmp_path, monkeypatch)[0]


def test_a_service_that_cannot_start_because_of_a_defect_is_not_started_over_and_over_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def compose(*_: object) -> NoReturn:
        raise ImportError("cannot import name 'store'")

    monkeypatch.setattr(program, "_composed", compose)
    heard, status = told(tmp_path, monkeypatch)
    assert b"auth-service cannot start: an internal error; see its log" in heard
    unit = (PROJECT / "units/circleosd-auth.service").read_text()
    (statuses,) = re.findall(r"^RestartPreventExitStatus=(.*)$", unit, re.MULTILINE)
    assert str(status) in statuses.split()
    assert "ImportError: cannot import name 'store'" in caplog.text


def test_a_service_that_can_open_no_more_files_goes_on_without_short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as while_it_tries:
        while_it_tries.setattr(builtins, "__import__", no_file)
        program._take_short_turns()


def test_an_interruption_while_it_starts_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def up(directory: str | None) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "up", up)
    monkeypatch.setattr("sys.argv", ["circleosd", "up"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 130
