"""Replies as text."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints, is_typeddict

import pytest

from circlectl import commands, render, views


def test_what_would_steer_a_terminal_or_reorder_a_line_is_shown_as_an_escape() -> None:
    assert render.printable("a\x1b[31m\r\nb\x9bc\x7f") == r"a\x1b[31m\r\nb\x9bc\x7f"
    assert render.printable("kv\u202e and \u2066more\u2069\u2028next") == r"kv\u202e and \u2066more\u2069\u2028next"
    assert render.printable("1\u200e2\u200f\u061c") == r"1\u200e2\u200f\u061c"
    assert render.printable("Zoë 😀 שלום a\u00a0b") == "Zoë 😀 שלום a\u00a0b"


def test_a_log_and_a_plugins_text_keep_their_tabs() -> None:
    line = {"time": 0.0, "text": "\tat org.example\x1b[2J\r"}
    shown = views.of(commands.of_group("service")["logs"], line, room=80)
    assert str(shown).endswith("  \tat org.example\\x1b[2J\\r")
    text = views.of(commands.of_group("plugin")["invoke"], "a\tb\n\x1b[2Jc\r", room=80)
    assert text == "a\tb\n\\x1b[2Jc\\r"


def test_a_followed_row_of_an_altered_record_steers_no_terminal() -> None:
    row: dict[str, Any] = {
        "time": 0.0, "service": "auth-service", "seq": 1, "actor": {"user": "a\x1b[31mb", "uid": 0}, "action": "x\r",
        "object": "o\x07", "phase": "done", "error": None, "before": None, "after": None, "intent": None, "count": 1,
        "message": "m\x9b",
    }  # fmt: skip
    shown = views.of(commands.of_group("system")["history"], row, room=80)
    assert shown is not None
    assert shown.isprintable()
    assert r"a\x1b[31mb/0" in shown


@pytest.mark.parametrize(
    ("group", "verb", "reply"),
    [
        ("user", "can", {"allowed": False, "why": "service:restart a\nyes: \x1b[1mb needs the role operator"}),
        ("plugin", "sign", {"manifest": "a\n\x1b[1m.json", "signature": "a\n\x1b[1m.json.sig"}),
    ],
)
def test_no_name_that_was_given_on_the_command_line_steers_a_terminal(
    group: str, verb: str, reply: dict[str, Any]
) -> None:
    assert str(views.of(commands.of_group(group)[verb], reply)).isprintable()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plugin@a.staged", "plugin@a.staged"),
        ("web  done\u2003active → inactive", r"'web  done\u2003active \u2192 inactive'"),
        ("web\u2800\u2800done\u3164", r"'web\u2800\u2800done\u3164'"),
        ("web\u200b", r"'web\u200b'"),
        ("w\u0435b", r"'w\u0435b'"),
    ],
)
def test_no_object_of_a_refused_request_passes_for_an_outcome_or_another_name(name: str, shown: str) -> None:
    row: dict[str, Any] = {
        "time": 0.0, "service": "service-registry", "seq": 1, "actor": {"user": None, "uid": 7}, "action": "stop",
        "object": name, "phase": "denied", "error": "denied", "before": None,
        "after": None, "intent": None, "count": 1, "message": "no role",
    }  # fmt: skip
    assert str(views.of(commands.of_group("system")["history"], row)).endswith(f"  stop  {shown}  denied  no role")


@pytest.mark.parametrize(
    ("outcome", "shown"),
    [
        ((None, "active", "inactive", None), "done     active → inactive"),
        (("denied", None, None, "who signed it " + "x" * 64), "denied   who signed it " + "x" * 64),
        (("unit-failed", "inactive", "failed", "status 4"), "unit-failed  inactive → failed; status 4"),
        (("conflict", None, None, None), "conflict  -"),
        ((None, None, {"digest": "0123456789ab" + "c" * 52}, None), "done     - → digest=0123456789ab…"),
    ],
)
def test_the_record_is_shown_with_the_reasons_of_what_failed(outcome: tuple[Any, ...], shown: str) -> None:
    row: dict[str, Any] = {
        "time": 0.0, "service": "auth-service", "seq": 1, "actor": {"user": "a", "uid": 0}, "action": "stop",
        "object": "o", "phase": "outcome", "intent": None, "count": 1,
        **dict(zip(("error", "before", "after", "message"), outcome, strict=True)),
    }  # fmt: skip
    table = str(views.of(commands.of_group("system")["history"], [row]))
    assert table.splitlines()[1].endswith(f"  {shown}")


def test_no_time_or_span_of_a_reply_is_shown_as_a_bare_number() -> None:
    found = {
        command: command.contract.reply for group in commands.GROUPS for command in commands.of_group(group).values()
    }
    for command, reply in found.items():
        row = next(iter(get_args(reply)), reply)
        for name, kind in (get_type_hints(row) if is_typeddict(row) else {}).items():
            if kind in (float, float | None):
                assert render.value(name, 1.5) != "1.5", f"{command.group} {command.verb}: {name}"


def test_each_view_is_of_a_command() -> None:
    there = {(group, verb) for group in commands.GROUPS for verb in commands.of_group(group)}
    assert {*views._SPECIAL, *views._HIDDEN} <= there


def test_the_limits_of_a_plugin_have_units() -> None:
    limits = {"memory": 1 << 20, "time": 5.0, "output": 1024, "concurrency": 2, "storage": 0}
    shown = views.of(commands.of_group("plugin")["show"], {"limits": limits, "capabilities": []})
    assert shown is not None
    assert "memory=1.0 MiB, time=5.0 s, output=1.0 KiB, concurrency=2, storage=0 B" in shown


def test_the_columns_of_a_table_are_as_wide_as_their_widest_cell_on_a_terminal() -> None:
    names = ("a", "größer", "e\u0301e\u0301", "東京都港", "दुनिया", "สวัสดี", "\u1112\u1161\u11ab", "a\u200bb", "1\u20dd")
    rows = [{"name": name, "last_login": None, "state": "x"} for name in names]
    assert render.table(rows, ("name", "last_login", "state")).split("\n") == [
        "NAME      LAST LOGIN  STATE",
        "a         -           x",
        "größer    -           x",
        "e\u0301e\u0301        -           x",
        "東京都港  -           x",
        "दुनिया     -           x",
        "สวัสดี      -           x",
        "\u1112\u1161\u11ab        -           x",
        "a\u200bb        -           x",
        "1\u20dd         -           x",
    ]


def test_a_long_cell_of_a_table_is_cut_to_as_many_columns_whatever_its_characters_take() -> None:
    whole = "x" * 64, "東" * 32, "e\u0301" * 64
    cut = {"x" * 65: "x" * 63 + "…", "東" * 33: "東" * 31 + "…", "x" + "東" * 40: "x" + "東" * 31 + "…"}
    shown = render.table([{"name": text, "is": "y"} for text in (*whole, *cut)], ("name", "is")).split("\n")
    assert [line.partition("  ")[0] for line in shown] == ["NAME", *whole, *cut.values()]
    assert render.table([{"name": "y", "is": text} for text in cut], ("name", "is")).split("\n")[1:] == [
        f"y     {text}" for text in cut
    ]


def test_a_table_is_cut_to_fit_a_terminal_if_that_is_possible() -> None:
    rows = [
        {"name": "web", "functions": "one, two, three, four", "description": "counts what there is", "state": "active"},
        {"name": "db", "functions": "one", "description": "東京都港区北青山にある", "state": "inactive"},
    ]
    columns = ("name", "functions", "description", "state")
    whole = render.table(rows, columns)
    assert render.table(rows, columns, 61) == render.table(rows, columns, 0) == whole
    assert render.table(rows, columns, 50).split("\n") == [
        "NAME  FUNCTIONS         DESCRIPTION       STATE",
        "web   one, two, three…  counts what the…  active",
        "db    one               東京都港区北青…   inactive",
    ]
    assert max(map(render._width, render.table(rows, columns, 39).split("\n"))) == 39
    assert render.table(rows, columns, 38) == whole, "it would not fit in any case"


def test_no_time_is_cut_to_fit_a_terminal() -> None:
    row = {"name": "web", "description": "counts what there is", "created": 1.6e9, "state": "active"}
    shown = render.table([row], [*row], 46)
    assert shown.split("\n")[1] == f"web   counts wha…  {render.value('created', 1.6e9)}  active"
    assert render.table([row], [*row], 45) == render.table([row], [*row])


def test_one_line_that_cannot_fit_a_terminal_does_not_keep_the_others_from_it() -> None:
    rows = [
        {"name": name, "description": "what it is for", "unit": f"{unit}.service"}
        for name, unit in (("web", "nginx"), ("db", "postgresql"), ("x", "circleosd-plugin@long-name"))
    ]
    assert render.table(rows, [*rows[0]], 38).split("\n") == [
        "NAME  DESCRIPTION   UNIT",
        "web   what it is …  nginx.service",
        "db    what it is …  postgresql.service",
        "x     what it is …  circleosd-plugin@long-name.service",
    ]
    assert render.table(rows, [*rows[0]], 34) == render.table(rows, [*rows[0]])
