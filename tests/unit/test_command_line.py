"""circlectl's command line: the traps of Fire, and what a line becomes. No service is called here."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import NoReturn

import pytest

from circlectl import adapter, cli, commands, helptext, prompting, system
from circleosd.errors import BadRequest
from circleosd.paths import SERVICES
from tests import PROJECT

TEXTS = ["None", "True", "12345", "1e5", "2e9672320848", "0x10", "[1,2]", '{"a":1}', "(1,)", "", " ", "a b", "'q'", '"']
TEXTS += ["-", "-5", "-.5", "ünï→🙂" * 400, "a\nb", "__class__", "--json"[2:], "$(id)", "%s", "\\", "*"]


def parse(line: str, *more: str) -> dict[str, str]:
    group, verb, *rest = line.split()
    return dict(adapter.parse(commands.of_group(group)[verb], [*rest, *more]))


@pytest.mark.parametrize("text", TEXTS)
def test_arguments_arrive_as_typed(text: str) -> None:
    assert parse("plugin invoke example handle", text) == {"id": "example", "func": "handle", "payload": text}
    assert parse("user create", text) == {"name": text}


@pytest.mark.parametrize("text", [*TEXTS, "--help", "-h", "--", "--json", "--separator", "---", "-x", "--payload=1"])
def test_behind_two_dashes_everything_is_a_value(text: str) -> None:
    expected = {"id": "example", "func": "handle", "payload": text}
    assert parse("plugin invoke example handle", "--", text) == expected
    assert parse("plugin invoke", "--", "example", "handle", text) == expected


def test_flags_take_their_value_by_space_or_equals() -> None:
    assert parse("user create alice --role operator") == {"name": "alice", "role": "operator"}
    assert parse("user create --role=operator --uid=5 alice") == {"name": "alice", "role": "operator", "uid": "5"}


@pytest.mark.parametrize("text", [*TEXTS, "-x", "---", "--payload=1", "a=b", "=", "-5min"])
def test_a_flags_value_arrives_as_typed(text: str) -> None:
    expected = {"id": "example", "reason": text}
    assert parse("plugin disable example", "--reason", text) == expected
    assert parse("plugin disable", f"--reason={text}", "example") == expected


def test_of_a_flag_given_twice_the_last_counts() -> None:
    assert parse("user create alice --uid 5 --uid 6") == {"name": "alice", "uid": "6"}


def test_a_flag_for_several_values_can_be_given_several_times() -> None:
    command = commands.of_group("plugin")["load"]
    given = adapter.parse(command, ["--grant", "kv", "p.wasm", "--grant=clock,config", "--trust"])
    assert given == {"path": "p.wasm", "grant": "kv,clock,config", "trust": "true"}


def test_a_switch_takes_no_value_from_what_follows() -> None:
    assert parse("plugin load --trust x.so") == {"trust": "true", "path": "x.so"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("service stop", "service stop needs NAME"),
        ("plugin invoke", "plugin invoke needs ID"),
        ("plugin invoke example", "plugin invoke needs FUNC"),
        ("service stop nginx apache", "does not take 'apache'"),
        ("service stop nginx __class__", "does not take '__class__'"),
        ("service stop nginx __init__", "does not take '__init__'"),
        ("service stop nginx arguments", "does not take 'arguments'"),
        ("service stop nginx --now", "does not take '--now'"),
        ("service list extra", "does not take 'extra'"),
        ("user create alice --password=x", "does not take '--password=x'"),
        ("plugin load x --files=1", "does not take '--files=1'"),
        ("service logs nginx -l 5", "does not take '-l'"),
        ("service logs nginx --nofollow", "does not take '--nofollow'"),
        ("service logs nginx --since", "--since needs a value"),
        ("user create alice --role --uid 5", "--role needs a value"),
        ("user create --name", "--name needs a value"),
    ],
)
def test_a_line_that_fits_no_command_is_refused_in_our_words(
    line: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadRequest, match=says):
        parse(line)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "line", ["service stop nginx --help", "service stop nginx -h", "service --help stop nginx", "user create --help"]
)
def test_help_does_nothing_else(line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIRCLEOSD_RUNTIME_DIR", "/nonexistent")
    monkeypatch.setenv("PAGER", "/bin/false")
    assert cli.run(line.split()) == 0
    assert capsys.readouterr().out.startswith("usage: circlectl")


@pytest.mark.parametrize(
    ("words", "shows"),
    [
        ([], "usage: circlectl GROUP COMMAND"),
        (["help"], "usage: circlectl GROUP COMMAND"),
        (["help", "service"], "usage: circlectl service COMMAND"),
        (["help", "service", "stop"], "usage: circlectl service stop NAME"),
    ],
)
def test_help_is_of_what_stands_behind_it(words: list[str], shows: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(words) == 0
    assert capsys.readouterr().out.startswith(shows)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["help", "nonsense"], "no command 'nonsense'; available: user,"),
        (["help", "service", "nonsense"], "no command 'service nonsense'; available: list,"),
        (["start", "nginx"], "no command 'start'; did you mean: service start [bad-request]"),
        (["status"], "no command 'status'; did you mean: service status, system status [bad-request]"),
        (["--lines", "1", "system", "history"], "'--lines' is not a global flag; put the flags of a command after it"),
        (["system", "--lines", "1", "history"], "'--lines' is not a global flag; put the flags of a command after it"),
        ([""], "no command ''; available: user,"),
        (["", "service", "list"], "no command ''; available: user,"),
        (["service", ""], "no command 'service '; available: list,"),
        (["service", "", "stop"], "no command 'service '; available: list,"),
    ],
)
def test_a_word_that_is_empty_or_no_command_is_refused(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err


@pytest.mark.parametrize("line", ["service logs nginx --since", "service logs nginx --bogus", "service logs"])
def test_a_refused_line_ends_with_the_code_and_then_where_its_help_is(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(line.split()) == 2
    assert capsys.readouterr().err.endswith(" [bad-request]; see: circlectl service logs --help\n")


@pytest.mark.parametrize("line", ["-- --interactive", "service -- --interactive", "service list -- --interactive"])
def test_fires_own_flags_cannot_be_reached(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(line.split()) == 2
    assert ">>>" not in capsys.readouterr().out


@pytest.mark.parametrize("line", ["keys", "service pop", "nonsense", "service __class__", "service __dir__"])
def test_pythons_members_are_no_commands(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(line.split()) == 2
    assert "no command" in capsys.readouterr().err


def test_an_error_is_one_line_with_its_code_and_a_next_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIRCLEOSD_RUNTIME_DIR", "/nonexistent")
    assert cli.run(["service", "list"]) == 12
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "not listening at /nonexistent" in err
    assert "[unavailable]; start CircleOSD:" in err


def test_the_status_of_a_service_that_does_not_answer_is_told_with_that_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIRCLEOSD_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(system, "ANSWER", 0.1)
    with socket.socket(socket.AF_UNIX) as hangs:
        hangs.bind(str(tmp_path / "auth-service.sock"))
        hangs.listen()
        assert cli.run(["system", "status"]) == 12
    out, err = capsys.readouterr()
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [[name, "unavailable"] for name in SERVICES]
    assert err.startswith("circlectl: auth-service did not answer within 0.1 s [unavailable]; see the log: ")


@pytest.mark.parametrize(
    "line",
    [
        "--scope user service list",
        "service --scope=user list",
        "service list --scope user",
        "service list --scope=user",
    ],
)
def test_the_scope_stands_anywhere_in_the_line(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIRCLEOSD_RUNTIME_DIR", "/nowhere")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nonexistent")
    assert cli.run(line.split()) == 12
    err = capsys.readouterr().err
    assert "not listening at /nonexistent/circleosd/service-registry.sock" in err
    assert "systemctl --user start circleosd.target" in err


@pytest.mark.parametrize(
    "line",
    ["service list --scope", "service list --scope=", "service list --scope both", "--scope", "--scope service list"],
)
def test_a_scope_that_there_is_not_is_refused(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(line.split()) == 2
    err = capsys.readouterr().err
    assert "--scope must be system or user" in err
    assert "  " not in err, "the command in the next step is none"


def test_behind_two_dashes_a_scope_is_a_value() -> None:
    assert cli._split(["plugin", "invoke", "--", "--scope", "user"])[1] == ["plugin", "invoke", "--", "--scope", "user"]


def test_every_command_has_help_that_names_what_it_takes() -> None:
    everything = helptext.overview()
    for group in commands.GROUPS:
        for command in commands.of_group(group).values():
            assert f"  {command.verb}" in everything
            text = helptext.of_command(command)
            for item in command.parameters:
                assert item.doc, f"{command.group} {command.verb} {item.name} has no Doc"
                assert item.doc in text
            assert "\n\n\n" not in text


@pytest.mark.parametrize(
    ("group", "verb", "says"),
    [
        ("user", "passwd", "Needs the role admin, or a rule that allows it, except for yourself."),
        ("user", "create", "Needs the role admin, or a rule that allows it."),
        ("service", "list", "Needs the role viewer, or a rule that allows it."),
        ("plugin", "load", "Needs the role admin."),
        ("plugin", "events", "Needs the role operator."),
        ("user", "whoami", "Anyone may do this."),
    ],
)
def test_help_says_who_may_do_it(group: str, verb: str, says: str) -> None:
    assert f"\n{says}\n" in helptext.of_command(commands.of_group(group)[verb])


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 132])
def test_help_fits_the_terminal(columns: int) -> None:
    pages = [helptext.overview(columns=columns)]
    for group in commands.GROUPS:
        pages += [helptext.of_group(group, columns=columns)]
        pages += [helptext.of_command(command, columns=columns) for command in commands.of_group(group).values()]
    for line in "\n".join(pages).splitlines():
        assert len(line) <= columns or line.lstrip() == line, line


def test_the_longest_flag_of_a_command_is_apart_from_what_it_means() -> None:
    assert "  --signature SIGNATURE  the manifest's" in helptext.of_command(commands.of_group("plugin")["load"])


def test_help_on_a_narrow_terminal_has_descriptions_below_names() -> None:
    assert "  logout\n      end your session\n" in helptext.overview(columns=40)
    assert helptext.overview(columns=20) == helptext.overview(columns=helptext.NARROW)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("user login a --lifetime nan", "a number"),
        ("user login a --lifetime 1e400", "a number"),
        ("service logs a --lines " + "9" * 5000, "a whole number"),
        ("service logs a --lines 1.5", "a whole number"),
        ("user create a --uid 1e3", "a whole number"),
    ],
)
def test_a_number_that_json_or_the_parameter_lacks_is_refused(
    line: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(line.split()) == 2
    err = capsys.readouterr().err
    assert f"is not {kind} [bad-request]" in err
    assert len(err) < 300


def test_a_file_without_a_name_is_quoted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIRCLEOSD_RUNTIME_DIR", "/nonexistent")
    assert cli.run(["plugin", "load", ""]) == 5
    assert capsys.readouterr().err == "circlectl: no such file: '' [not-found]\n"


def test_a_password_without_end_on_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (password,) = commands.of_group("user")["login"].secrets
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 10_000_000))
    with pytest.raises(BadRequest, match=r"^the password on standard input has too many characters$"):
        prompting.secret(password, "password", stdin=True)


def test_the_command_line_is_made_without_heavy_imports() -> None:
    code = (
        "import sys; from circlectl.cli import run; run(['service', 'list']); "
        "print(sorted({'asyncio','pydantic','pydantic_core','wasmtime','dbus_fast','rich','sqlite3','ctypes','subprocess',"
        "'tomllib','systemd','argon2'} & set(sys.modules)))"
    )
    modules = os.pathsep.join(filter(None, sys.path))  # which not every Python finds by itself
    environment = {"CIRCLEOSD_RUNTIME_DIR": "/nonexistent", "PATH": "", "PYTHONPATH": modules}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_stream_is_shown_also_where_there_can_be_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a unit with TasksMax=1. That nobody reads any more is noticed by the next line then."""

    def no_thread(self: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with open(os.devnull, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        cli._end_with_the_reader()


def test_an_interruption_during_the_imports_is_no_traceback() -> None:
    code = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "typing":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from circlectl.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"circlectl {project['version']}\n"
