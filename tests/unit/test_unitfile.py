"""Unit files as the embedded mode reads them."""

from __future__ import annotations

import pytest

from circleosd.embedded import unitfile
from circleosd.errors import BadRequest
from tests.integration.embedded_host import PROJECT

TEXT = r"""
# a comment
; another
[Unit]
Description=One  line
Wants=a.socket b.socket
Wants="c d.socket"

[Service]
ExecStart=/bin/sh -c 'echo $$ "%i"' \
    more
Environment=A=1 "B=two words"
Environment=
Environment=C=3
TimeoutStartSec=1min 30s
"""


def test_keys_lists_quotes_continuations_and_resets() -> None:
    file = unitfile.parse(TEXT)
    assert file.get("Unit", "Description") == "One  line"
    assert file.words("Unit", "Wants") == ["a.socket", "b.socket", "c d.socket"]
    assert file.get("Service", "ExecStart") == "/bin/sh -c 'echo $$ \"%i\"' more"
    assert file.words("Service", "Environment") == ["C=3"]
    assert file.seconds("Service", "TimeoutStartSec", 5) == 90
    assert file.seconds("Service", "TimeoutStopSec", 5) == 5
    assert file.get("Install", "WantedBy") == ""


@pytest.mark.parametrize("text", ["Key=before a section", "[Unit]\nno assignment"])
def test_a_line_that_is_nothing_is_named(text: str) -> None:
    with pytest.raises(BadRequest, match=f"line {len(text.splitlines())} is neither"):
        unitfile.parse(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 5), ("100ms", 0.1), ("2h 3min", 7380), ("1.5s", 1.5), ("infinity", float("inf")), ("0", 0)],
)
def test_time_spans(text: str, seconds: float) -> None:
    assert unitfile.time_span(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "soon", "5 parsecs", "-1s", "5s,"])
def test_what_is_no_time_span(text: str) -> None:
    with pytest.raises(BadRequest, match="not a time span"):
        unitfile.time_span(text)


def test_specifiers_and_templates() -> None:
    values = {**unitfile.specifiers("a@b-c.service"), "t": "/run"}
    assert unitfile.expand("%t/%p/%i %I %n %N 100%%", values) == "/run/a/b-c b/c a@b-c.service a@b-c 100%"
    assert unitfile.template_of("a@b-c.service") == "a@.service"
    assert unitfile.template_of("a@.service") is None
    assert unitfile.template_of("a.service") is None
    with pytest.raises(BadRequest, match="%j is not supported"):
        unitfile.expand("%j", values)


def test_commands_split_and_replace_variables() -> None:
    environment = {"OPTS": "-a -b", "NAME": "x y"}
    assert unitfile.command("-/bin/prog $OPTS '${NAME}' ${NONE}z", environment) == ["/bin/prog", "-a", "-b", "x y", "z"]
    for wrong in ("", "'unclosed", "@/bin/sh sh"):
        with pytest.raises(BadRequest):
            unitfile.command(wrong, {})


def test_every_shipped_unit_can_be_read() -> None:
    files = [path for path in (PROJECT / "units").iterdir() if path.suffix in (".socket", ".service", ".target")]
    assert len(files) >= 9
    for path in files:
        assert unitfile.parse(path.read_text()).get("Unit", "Description").startswith(("CircleOSD", "Socket of"))
