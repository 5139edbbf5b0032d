"""A unit's lines, read from a journal that is not as journald wrote it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from circleosd.errors import Limit
from circleosd.systemd import logs

UNIT = logs.Source("a.service", "system")


class Reader(contextlib.AbstractContextManager["Reader", None]):
    """systemd-python's, as far as it is used here, over messages; None is an entry with a name that is no text."""

    def __init__(self, *messages: str | list[str] | None) -> None:
        self._messages = [*messages]
        self._at = len(messages)

    def __exit__(self, *_: object) -> None: ...

    def seek_tail(self) -> None:
        self._at = len(self._messages)

    def seek_cursor(self, cursor: str) -> None:
        self._at = int(cursor) - 1

    def get_previous(self) -> dict[str, Any]:
        self._at -= 1
        return self._entry() if self._at >= 0 else {}

    def get_next(self) -> dict[str, Any]:
        self._at += 1
        return self._entry() if self._at < len(self._messages) else {}

    def _entry(self) -> dict[str, Any]:
        message = self._messages[self._at]
        if message is None:
            b"MES\x88AGE".decode()
        return {"MESSAGE": message, "__CURSOR": str(self._at), "__REALTIME_TIMESTAMP": datetime.fromtimestamp(5, UTC)}

    def fileno(self) -> int:
        return 0

    def get_timeout_ms(self) -> int:
        return -1

    def process(self) -> None: ...


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Reader]:
    def of(*messages: str | list[str] | None) -> Reader:
        reader = Reader(*messages)
        monkeypatch.setattr(logs, "_about", lambda source: reader)
        return reader

    return of


def test_an_entry_that_a_failing_disk_has_damaged_hides_no_other(journal: Callable[..., Reader]) -> None:
    journal(None, "one", None, None, "two", None)
    assert [line.text for line in logs.tail(UNIT, 10, None)] == ["one", "two"]


def test_of_a_message_that_an_entry_has_twice_the_first_is_shown(journal: Callable[..., Reader]) -> None:
    journal(["one", "two"])
    assert [line.text for line in logs.tail(UNIT, 10, None)] == ["one"]


def test_a_follower_goes_on_behind_a_damaged_entry(journal: Callable[..., Reader]) -> None:
    reader, follower = journal("one", None, "two"), logs._Follower()
    assert [line.text for line in follower.open(UNIT, 10, None)] == ["one", "two"]
    reader._messages += [None, "three"]
    assert [line.text for line in follower.read()] == ["three"]


@pytest.mark.parametrize("bound", ["entries", "seconds"])
def test_a_unit_that_logs_nothing_but_empty_messages_keeps_no_reader_for_long(
    journal: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    if bound == "entries":
        monkeypatch.setattr(logs, "MOST_READ", 50)
    else:
        now = iter(range(1000))
        monkeypatch.setattr("time.monotonic", lambda: float(next(now)))
    journal("first", *[""] * 100, "last")
    assert [line.text for line in logs.tail(UNIT, 1, None)] == ["last"]
    with pytest.raises(Limit, match=r"^so many lines in the log of a\.service are too far back; ask for fewer of them"):
        logs.tail(UNIT, 2, None)
    with pytest.raises(Limit, match="too far back"):
        logs._Follower().open(UNIT, 2, None)
    assert logs._Follower().open(UNIT, 0, None) == []


def test_the_last_lines_of_a_run_that_logs_empty_messages_are_told(
    journal: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MOST_READ", 50)
    monkeypatch.setattr(logs, "_readable", lambda: True)
    journal("first", *[""] * 100, "last")
    assert logs.of_run(UNIT, 4, "0" * 32, 2, ended=False) == ["last"]
