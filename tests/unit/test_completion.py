"""What Tab offers, and how bash's lines are read and words quoted. No shell and no service here."""

from __future__ import annotations

import subprocess

import pytest

from circlectl import cli, completion, shellwords
from circlectl.completion import Rows, WantsFile

BREAKS = " \t\n\"'@><=;|&(:"  # bash's default
NASTY = [
    "two words",
    "it's",
    'say "hi"',
    "$(touch x)",
    "`id`",
    "a;b&c|d",
    "back\\slash",
    "*?[a]",
    "~root",
    "wow!",
    "ünï→",
]
NASTY += ["#hash", "<in>out", "(sub)", "{a,b}", "a:b@c=d", "%s"]

LISTS: dict[str, Rows] = {
    "user": [{"name": "alice", "role": "operator"}, {"name": "bob", "role": "viewer"}],
    "service": [{"name": "nginx", "description": "the web\nserver"}, {"name": "getty@tty1", "description": ""}],
    "plugin": [
        {"id": "example", "description": "an example", "functions": ["handle", "upper"]},
        {"id": "other", "description": "x" * 200, "functions": [*NASTY, "con\x1btrol", "", "-x"]},
    ],
}


def words(*line: str) -> list[str]:
    return [item.word for item in completion.candidates(line, lambda scope, group: LISTS[group])]


def test_groups_verbs_and_choices_come_from_the_contracts() -> None:
    assert words("") == ["user", "service", "plugin", "system"]
    assert {"list", "status", "start", "stop"} <= set(words("service", ""))
    assert {"viewer", "operator", "admin"} <= set(words("user", "create", "carol", "--role", ""))
    assert {"--role=viewer", "--role=admin"} <= set(words("user", "create", "carol", "--role=a"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("service stop ", ["nginx", "getty@tty1"]),
        ("service --json stop ", ["nginx", "getty@tty1"]),
        ("--scope user service stop ", ["nginx", "getty@tty1"]),
        ("service stop -- ", ["nginx", "getty@tty1"]),
        ("service watch ", ["nginx", "getty@tty1"]),
        ("plugin unload ", ["example", "other"]),
        ("plugin invoke ", ["example", "other"]),
        ("plugin invoke example ", ["handle", "upper"]),
        ("plugin invoke other ", NASTY),
        ("plugin invoke other -- ", [*NASTY, "-x"]),
        ("plugin invoke nonesuch ", []),
        ("plugin invoke -- -x ", []),
        ("user login ", ["alice", "bob"]),
        ("user create ", []),
        ("user create -- --role=", []),
        ("system history ", []),
        ("system history --user ", ["alice", "bob"]),
        ("--scope ", ["system", "user"]),
        ("user grant ", ["alice", "bob"]),
        ("user grant alice service:restart ", ["nginx", "getty@tty1"]),
        ("user can alice plugin:invoke ", ["example", "other"]),
        ("user grant alice * ", []),
        ("service stop nginx ", []),
        ("plugin invoke example handle ", []),
        ("nonsense ", []),
        ("service nonsense ", []),
        ("service nonsense -", ["--scope", "--json", "--password-stdin", "--help"]),
        ("", ["user", "service", "plugin", "system"]),
    ],
)
def test_names_are_those_that_there_are_now(line: str, expected: list[str]) -> None:
    assert words(*line.split(" ")) == expected


def test_actions_are_offered_as_rules_and_the_record_name_them() -> None:
    assert {"service:restart", "plugin:invoke", "user:create"} <= set(words("user", "grant", "alice", ""))
    assert {"restart", "invoke", "create"} <= set(words("system", "history", "--action", ""))


def test_flags_are_offered_once_and_only_for_their_command() -> None:
    for begun in ("-", "--"):
        assert {"--role", "--uid", "--json"} <= set(words("user", "create", "carol", begun))
    assert "--role" not in words("user", "create", "--role", "admin", "-")
    assert "--role" not in words("user", "login", "-")
    assert "--name" not in words("user", "create", "-")
    assert words("user", "create", "--", "-") == []


def test_what_does_not_fit_on_a_line_is_not_offered() -> None:
    offered = words("plugin", "invoke", "--", "other", "")
    assert "-x" in offered
    assert "con\x1btrol" not in offered
    assert "" not in offered
    described = completion.candidates(["service", "stop", ""], lambda scope, group: LISTS[group])
    assert described[0] == ("nginx", "the web server")
    described = completion.candidates(["plugin", "unload", ""], lambda scope, group: LISTS[group])
    assert max(len(item.about) for item in described) == completion.ABOUT


def test_files_are_left_to_the_shell() -> None:
    for line in ("", "a=b", "--trust ", "--manifest ", "--manifest=x"):
        with pytest.raises(WantsFile):
            words("plugin", "load", *line.split(" "))


def test_the_scope_in_the_line_says_who_is_asked() -> None:
    asked: list[str | None] = []

    def lookup(scope: str | None, group: str) -> Rows:
        asked.append(scope)
        return []

    lines = ("service stop ", "--scope user service stop ", "service stop --scope=system ", "user login --lifetime 5 ")
    for line in lines:
        completion.candidates(line.split(" "), lookup)
    assert asked == [None, "user", "system", None]


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["nosuchshell", "x"], ["bash"], ["zsh"], ["fish", "service", "stop", ""],
        ["zsh", "--scope=moon", "user", "login", ""], ["bash", "circlectl service stop ", BREAKS],
        ["bash", "circlectl 'nonesuch", BREAKS], ["bash", "circlectl 'ser'v", BREAKS], ["bash", "-c", "x", "y"],
        ["zsh", "plugin", "invoke", "a", ""], ["zsh", "user", "login", "\udcff"],
    ],
)  # fmt: skip
def test_nothing_is_said_when_nothing_can_be_offered(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIRCLEOSD_RUNTIME_DIR", "/nonexistent")
    assert cli.run(["--complete", *arguments]) in (0, 2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("quote", ["", "'", '"'])
@pytest.mark.parametrize("typed", [0, 1, 3])
def test_bash_reads_back_the_very_name_that_was_inserted(name: str, quote: str, typed: int) -> None:
    """What stands in the line, completed, has to be one word, the name, and to run nothing."""
    prefix = name[:typed]
    begun = quote + shellwords.Typed([], "", 0, quote, False).replacement(prefix)
    line = f"circlectl plugin invoke other {begun}"
    split = shellwords.split_bash(line, BREAKS)
    assert split.before == ["circlectl", "plugin", "invoke", "other"]
    if split.settled:
        assert split.replacement(name) == ""
        return
    assert split.word == prefix
    kept = line[: len(line) - len(begun)] + _kept_by_readline(begun, split)
    completed = kept + split.replacement(name) + split.quote
    script = f'set -- {completed.removeprefix("circlectl ")}; printf \'%s\\n\' "$#" "${{!#}}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout == f"4\n{name}\n"


def _kept_by_readline(begun: str, split: shellwords.Typed) -> str:
    """The part of a begun word that stays: up to an open quote, or to the last character that breaks words."""
    if split.quote:
        return begun[: begun.index(split.quote) + 1]
    end = max((at + 1 for at, char in enumerate(begun) if char in BREAKS and begun[at - 1 : at] != "\\"), default=0)
    return begun[:end]
