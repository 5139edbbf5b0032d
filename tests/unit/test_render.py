"""Replies as text."""

from __future__ import annotations

from circlectl import render


def test_what_would_steer_a_terminal_or_reorder_a_line_is_shown_as_an_escape() -> None:
    assert render.printable("a\x1b[31m\r\nb\x9bc\x7f") == r"a\x1b[31m\r\nb\x9bc\x7f"
    assert render.printable("kv\u202e and \u2066more\u2069\u2028next") == r"kv\u202e and \u2066more\u2069\u2028next"
    assert render.printable("1\u200e2\u200f\u061c") == r"1\u200e2\u200f\u061c"
    assert render.printable("Zoë 😀 שלום a\u00a0b") == "Zoë 😀 שלום a\u00a0b"
