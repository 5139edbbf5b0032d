"""The services' log."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from circleosd.api.common import Event
from circleosd.ledger import Phase
from circleosd.rows import ACTOR
from circleosd.systemd import journal
from circleosd.systemd.journal import Mirror, _OneLine, _Prefixed
from tests import PROJECT
from tests.waiting import SECONDS


@pytest.mark.parametrize(("form", "begins"), [(_OneLine(), ""), (_Prefixed(), "<3>")])
def test_what_a_message_holds_passes_for_no_other_line_and_steers_no_terminal(
    form: logging.Formatter, begins: str
) -> None:
    said = "a\n<1>forged\r\x1b[2J\x9b\u202ex\u2028y\tz ü"
    record = logging.LogRecord("a", logging.ERROR, "f.py", 1, "plugin %s said: %s", ("p", said), None)
    shown = form.format(record).replace("\N{REPLACEMENT CHARACTER}", "?")
    assert shown == f"{begins}plugin p said: a <1>forged??[2J??x?y\tz ü"


def test_a_complaint_is_one_line_and_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    journal.complain("cannot read /a\n<0>forged\x1b[2J\u202e.toml")
    shown = capsys.readouterr().err.replace("\N{REPLACEMENT CHARACTER}", "?")
    assert shown == "cannot read /a <0>forged?[2J?.toml\n"


def test_a_traceback_has_its_lines_each_with_its_priority() -> None:
    try:
        raise ValueError("as it was")
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, "f.py", 1, "it failed", (), sys.exc_info())
    lines = _Prefixed().format(record).split("\n")
    assert (lines[0], lines[-1]) == ("<3>it failed", "<3>ValueError: as it was")
    assert all(line.startswith("<3>") for line in lines)


@pytest.fixture
def journald(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Where journald would receive."""
    monkeypatch.setattr(journal, "SOCKET", str(tmp_path / "journal"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(journal.SOCKET)
        sock.settimeout(SECONDS)
        yield sock


def row(message: str | None) -> Event:
    return Event(
        service="auth-service",
        seq=7,
        time=1.0,
        phase="done" if message is None else "failed",
        actor={**dict.fromkeys(ACTOR), "uid": 0},
        action="create",
        object="alice",
        params={},
        before=None,
        after=None,
        error=None if message is None else "denied",
        message=message,
        duration=None,
        intent=None,
        count=1,
    )


@pytest.mark.parametrize("size", [10, 1 << 20])  # the second is more than a datagram may have
def test_a_row_is_an_entry_of_the_journals_own_protocol(journald: socket.socket, size: int) -> None:
    event: Event = {**row("ü" + "x" * size), "object": "two\nlines"}
    Mirror()(event)
    entry, descriptors, _, _ = socket.recv_fds(journald, 1 << 20, 1)
    for descriptor in descriptors:
        with open(descriptor, "rb") as file:
            entry += os.pread(file.fileno(), 1 << 24, 0)  # the offset is the sender's too
    assert bool(descriptors) == (size > 10)
    message = f"uid 0: create 'two\\nlines': failed: {event['message']}".encode()
    assert entry.startswith(b"MESSAGE=" + message + b"\nMESSAGE_ID=ac14")
    given = b"CIRCLEOSD_OBJECT\n" + (9).to_bytes(8, "little") + b"two\nlines\n"
    assert b"\nPRIORITY=4\nSYSLOG_IDENTIFIER=circleosd-auth-service\nCIRCLEOSD_ACTION=create\n" + given in entry
    assert json.loads(entry.rpartition(b"CIRCLEOSD_ROW=")[2]) == event


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (None, {"rule": "allow service:stop *"}, "done: - → rule=allow service:stop *"),
        ({"role": "viewer", "uid": None}, {"role": "admin"}, "done: role=viewer, uid=- → role=admin"),
        ({"sessions": ["a", "b"]}, None, "done: sessions=a, b → -"),
        ("inactive", "active", "done: inactive → active"),
        (None, {"version": "1\x1b[2J\nuid 0: stop"}, "done: - → version=1?[2J uid 0: stop"),
        (None, None, "done"),
    ],
)
def test_the_message_of_a_row_tells_what_was_changed(
    journald: socket.socket, before: object, after: object, told: str
) -> None:
    """It is all that there is where messages are sent on as by syslog."""
    Mirror()(Event(**{**row(None), "before": before, "after": after}))
    message = journald.recv(1 << 16).partition(b"\n")[0].decode().replace("\N{REPLACEMENT CHARACTER}", "?")
    assert message == f"MESSAGE=uid 0: create alice: {told}"


def test_no_object_of_a_refused_request_passes_for_an_outcome(journald: socket.socket) -> None:
    Mirror()(Event(**{**row("no role"), "object": "web: done: inactive → active"}))
    message = journald.recv(1 << 16).partition(b"\n")[0].decode()
    assert message == r"MESSAGE=uid 0: create 'web: done: inactive \u2192 active': failed: no role"


def test_no_row_waits_for_a_journald_that_one_has_waited_for_in_vain(
    journald: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal, "PATIENCE", 0.2)
    mirror = Mirror()
    while not caplog.messages:
        mirror(row(None))
    assert caplog.messages == ["row 7 of the ledger is not in the journal: journald accepts nothing"]
    monkeypatch.setattr(journal, "PATIENCE", 1e6)
    mirror(row(None))
    journald.recv(1 << 16)
    mirror(row(None))
    assert caplog.messages[1:] == ["journald accepts rows again; missing before row 7: 2"]


def test_without_a_journal_rows_go_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal, "SOCKET", str(tmp_path / "none"))
    Mirror()(row(None))
    assert not caplog.messages


def test_the_catalog_of_the_journal_explains_every_kind_of_row_by_fields_that_rows_have() -> None:
    text = (PROJECT / "units/circleosd.catalog").read_text()
    assert journal.MESSAGE_IDS.keys() == {*get_args(Phase)}
    assert re.findall("^-- (.*)$", text, re.MULTILINE) == [*journal.MESSAGE_IDS.values()]
    assert {*re.findall("@(.*?)@", text)} <= journal._fields(row(None)).keys()
    denied = text.partition(journal.MESSAGE_IDS["denied"])[2]
    assert "may not" not in denied
    assert "The message says why" in denied
