"""The services' log."""

from __future__ import annotations

import logging
import sys

import pytest

from circleosd.systemd.journal import _OneLine, _Prefixed


@pytest.mark.parametrize(("form", "begins"), [(_OneLine(), ""), (_Prefixed(), "<3>")])
def test_what_a_message_holds_passes_for_no_other_line_and_steers_no_terminal(
    form: logging.Formatter, begins: str
) -> None:
    said = "a\n<1>forged\r\x1b[2J\x9b\u202ex\u2028y\tz ü"
    record = logging.LogRecord("a", logging.ERROR, "f.py", 1, "plugin %s said: %s", ("p", said), None)
    shown = form.format(record).replace("\N{REPLACEMENT CHARACTER}", "?")
    assert shown == f"{begins}plugin p said: a <1>forged??[2J??x?y\tz ü"


def test_a_traceback_has_its_lines_each_with_its_priority() -> None:
    try:
        raise ValueError("as it was")
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, "f.py", 1, "it failed", (), sys.exc_info())
    lines = _Prefixed().format(record).split("\n")
    assert (lines[0], lines[-1]) == ("<3>it failed", "<3>ValueError: as it was")
    assert all(line.startswith("<3>") for line in lines)
