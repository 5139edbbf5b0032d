"""What circlectl makes of replies that do not have the form that their contracts declare."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from circlectl import cli, commands, completion
from circleosd import client
from tests import PROJECT

COMMANDS = [
    item
    for group in commands.GROUPS
    for item in commands.of_group(group).values()
    if item.local is None or item.group == "system"
]
DEEP: Any = None
for _ in range(900):
    DEEP = [DEEP]
REPLIES = [
    None,
    5,
    [1],
    {},
    {"name": 7},
    [{}],
    [{"name": []}],
    [[]],
    {"x": DEEP},
    DEEP,
    {"time": "x"},
    [{"time": 1e300}],
]


@pytest.fixture
def reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What every service replies, whatever it is asked: put it in here."""
    given: list[Any] = []

    def call(path: str, request: dict[str, Any], **_: object) -> Iterator[Any]:
        yield from given

    monkeypatch.setattr(client, "call", call)
    for name in ("XDG_STATE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    return given


@pytest.mark.parametrize("command", COMMANDS, ids=lambda item: f"{item.group} {item.verb}")
def test_a_malformed_reply_is_one_line_and_a_status(
    command: commands.Command, reply: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"path": str(PROJECT / "README.md"), "uid": "1000", "verb": "service:stop", "role": "viewer"}
    arguments = [values.get(item.name, "x") for item in command.parameters if item.required]
    for data in REPLIES:
        reply[:] = [data]
        monkeypatch.setattr(sys, "stdin", io.StringIO("long enough\n" * 2))
        status = cli.run([command.group, command.verb, *arguments, *(["--password-stdin"] if command.secrets else [])])
        err = capsys.readouterr().err
        assert (status, err) == (0, "") or (status, err.count("\n"), err[-11:]) == (1, 1, "[internal]\n"), data


def test_a_malformed_row_of_a_followed_record_ends_following(
    reply: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_end_with_the_reader", lambda: None)
    reply.append([])
    assert cli.run(["system", "history", "--follow"]) == 1
    assert "a reply does not have the form that circlectl expects (TypeError: " in capsys.readouterr().err


def test_what_is_missing_is_named_with_what_may_be_the_cause(
    reply: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    reply.append({"name": "web", "state": "active"})
    assert cli.run(["service", "start", "web"]) == 1
    assert capsys.readouterr().err == (
        "circlectl: a reply does not have the form that circlectl expects (KeyError: 'sub'); "
        "is circlectl newer than the service? see: circlectl system status [internal]\n"
    )


def test_a_service_with_a_malformed_report_does_not_hide_the_others(
    reply: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    reply.append(["odd"])
    assert cli.run(["system", "status"]) == 1
    assert capsys.readouterr().out.count("  internal  ") == 3


def test_no_names_are_offered_from_a_malformed_reply(reply: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    reply.append([{"name": 7}])
    assert completion.run(["fish", "service", "start", ""]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_time_that_no_calendar_has_is_shown_as_a_number(reply: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    for moment in (1e17, 1e300):
        reply[:] = [{"name": "alice", "created": moment}]
        assert cli.run(["user", "show", "alice"]) == 0
        assert f"created: {moment}\n" in capsys.readouterr().out
