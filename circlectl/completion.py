"""Completion: `circlectl --complete SHELL ...`, called by the scripts in completions/ when Tab is pressed.

`--complete zsh|fish WORD...` gets the words after the program's name, the last one being the word at the cursor, and
prints one candidate per line, as `WORD<Tab>DESCRIPTION`. `--complete bash LINE BREAKS` gets the line as typed up to the
cursor and COMP_WORDBREAKS (bash(1)), and prints replacements for the word that readline completes, quoted in the same
way. The exit status is `FILES` if file names are wanted. Errors are not printed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from circlectl import commands, shellwords
from circlectl.asking import MALFORMED, Asking
from circlectl.commands import Command
from circlectl.helptext import FLAGS, choices, phrase
from circleosd import paths
from circleosd.api.contract import Mark, Parameter, Pattern
from circleosd.errors import CircleError

FILES = 10  # the exit status that asks the shell to complete file names
PATIENCE = 1.5  # seconds to wait for names, including a service's cold start
ABOUT = 60  # characters of a description

Rows = list[dict[str, Any]]
Lookup = Callable[[str | None, str], Rows]


class Candidate(NamedTuple):
    """A word that could stand at the cursor, and what it is."""

    word: str
    about: str = ""


class WantsFile(Exception):
    """Names of files are wanted."""


def run(argv: Sequence[str]) -> int:
    """Carry out `--complete`; return the exit status."""
    try:
        match argv:
            case ["bash", line, breaks]:
                typed = shellwords.split_bash(line, breaks)
                found = candidates([*typed.before[1:], typed.word], _names_of)
                fitting = [item.word for item in found if item.word.startswith(typed.word)]
                for replacement in filter(None, map(typed.replacement, fitting)):
                    print(replacement)
            case ["zsh" | "fish", *words] if words:
                for item in candidates(words, _names_of):
                    print(f"{item.word}\t{item.about}" if item.about else item.word)
            case _:
                return 2
    except WantsFile:
        return FILES
    except BrokenPipeError:
        raise
    except (CircleError, OSError, *MALFORMED):
        return 0  # without an answer from the service there are no names to offer
    return 0


def candidates(words: Sequence[str], lookup: Lookup) -> list[Candidate]:
    """Candidates to replace the last of `words`. `lookup(scope, group)` returns what that group currently lists.

    Candidates that do not fit on a line, or would be taken for a flag, are left out. Raises `WantsFile`.
    """
    *before, current = words
    line = _Line(before)
    if not line.literal and current.startswith("--") and "=" in current:
        flag = current.partition("=")[0]
        found = [Candidate(f"{flag}={item.word}", item.about) for item in line.values_of(flag, lookup)]
    elif line.pending:
        found = line.values_of(line.pending, lookup)
    elif not line.literal and current.startswith("-"):
        found = line.flags()
    else:
        found = line.next_argument(lookup)
        found = [item for item in found if line.literal or not item.word.startswith("-")]
    return [Candidate(item.word, _about(item.about)) for item in found if item.word and item.word.isprintable()]


class _Line:
    """The words before the cursor, analyzed: group, verb, arguments, and whether a flag is waiting for its value."""

    def __init__(self, words: Sequence[str]) -> None:
        self.arguments: list[str] = []
        self.used: set[str] = set()
        self.scope: str | None = None
        self.pending = ""
        self.literal = False
        for word in words:
            self._take(word)

    def _take(self, word: str) -> None:
        if self.pending:
            self._value(self.pending, word)
            self.pending = ""
        elif self.literal or not word.startswith("-"):
            self.arguments.append(word)
        elif word == "--":
            self.literal = True
        else:
            flag, equals, value = word.partition("=")
            self.used.add(flag)
            if equals:
                self._value(flag, value)
            elif self._takes_value(flag):
                self.pending = flag

    def _value(self, flag: str, value: str) -> None:
        if flag == "--scope":
            self.scope = value

    @property
    def command(self) -> Command | None:
        """The command that the line names, if it names one yet."""
        group, verb = (*self.arguments, "", "")[:2]
        return commands.of_group(group).get(verb) if group in commands.GROUPS else None

    @property
    def _options(self) -> list[Parameter]:
        return [item for item in self.command.parameters if Mark.OPTION in item.marks] if self.command else []

    def _parameter(self, flag: str) -> Parameter | None:
        return next((item for item in self._options if f"--{item.spelled}" == flag), None)

    def _takes_value(self, flag: str) -> bool:
        parameter = self._parameter(flag)
        return flag == "--scope" or (parameter is not None and parameter.type is not bool)

    def flags(self) -> list[Candidate]:
        """The flags that can still be given."""
        found = [Candidate(f"--{item.spelled}", item.doc) for item in self._options]
        found += [Candidate(flag, about) for flag, about in FLAGS.items() if flag.startswith("--") and flag != "--"]
        return [item for item in found if item.word not in self.used]

    def values_of(self, flag: str, lookup: Lookup) -> list[Candidate]:
        """The values of a flag."""
        if flag == "--scope":
            return [Candidate("system", "/run/circleosd"), Candidate("user", "your own systemd manager's")]
        parameter = self._parameter(flag)
        return self._values(parameter, lookup) if parameter else []

    def next_argument(self, lookup: Lookup) -> list[Candidate]:
        """Candidates for the next argument."""
        if not self.arguments:
            return [Candidate(group, about) for group, about in commands.GROUPS.items()]
        group, *rest = self.arguments
        if group not in commands.GROUPS:
            return []
        if not rest:
            return [Candidate(verb, phrase(item.contract.summary())) for verb, item in commands.of_group(group).items()]
        if self.command is None:
            return []
        positional = [item for item in self.command.parameters if Mark.OPTION not in item.marks]
        return self._values(positional[len(rest) - 1], lookup) if len(rest) <= len(positional) else []

    def _values(self, parameter: Parameter, lookup: Lookup) -> list[Candidate]:
        assert self.command is not None
        if Mark.FILE in parameter.marks:
            raise WantsFile
        if values := choices(parameter.type):
            return [Candidate(value) for value in values]
        if self.command.verb == "create" and parameter.name == self.command.contract.object_field:
            return []  # a name that there is not yet
        if parameter.name == "func":
            rows = [row for row in lookup(self.scope, "plugin") if row["id"] == self.arguments[2]]
            return [Candidate(name) for row in rows for name in row["functions"]]
        if parameter.name in ("verb", "action_name"):
            return _actions(with_group=parameter.name == "verb")
        if (group := self._group_named_by(parameter)) and (listing := _listing(group)):
            column = listing.contract.row_field or ""
            return [Candidate(row[column], _describe(row)) for row in lookup(self.scope, group)]
        return []

    def _group_named_by(self, parameter: Parameter) -> str | None:
        """The group whose names are the values of a parameter, by its rule, its name, or an argument before it."""
        for group in commands.GROUPS:
            if parameter.name == group or _name_rule(group) in parameter.rules:
                return group
        if parameter.name == "object":  # of the verb before it, such as service:restart
            groups = [word.partition(":")[0] for word in self.arguments[2:] if ":" in word]
            return next((group for group in groups if group in commands.GROUPS), None)
        return None


def _actions(*, with_group: bool) -> list[Candidate]:
    """Every action, as named in rules or in the record."""
    from circleosd.api.actions import BY_VERB

    found = {verb if with_group else contract.action: phrase(contract.summary()) for verb, contract in BY_VERB.items()}
    return [Candidate(word, about) for word, about in found.items()]


@cache
def _listing(group: str) -> Command | None:
    return commands.of_group(group).get("list")


@cache
def _name_rule(group: str) -> Pattern | None:
    """The rule for all names of a group, which is that of the object of its commands."""
    of_group = commands.of_group(group).values()
    objects = (
        item for command in of_group for item in command.parameters if item.name == command.contract.object_field
    )
    return next((rule for item in objects for rule in item.rules if isinstance(rule, Pattern)), None)


def _describe(row: dict[str, Any]) -> str:
    return str(row.get("description") or row.get("role") or "")


def _about(text: str) -> str:
    """A description on one line, not too long."""
    line = "".join(char if char.isprintable() else " " for char in text)
    return line if len(line) <= ABOUT else line[: ABOUT - 1] + "…"


def _names_of(scope: str | None, group: str) -> Rows:
    """The rows of a group's list. Raises `CircleError`."""
    from circlectl import sessions

    listing = _listing(group)
    if listing is None:
        return []
    runtime = paths.runtime_dir(os.environ, scope)
    rows = Asking(runtime, sessions.load(runtime)).once(listing.service, {"action": "list"}, timeout=PATIENCE)
    return [row for row in rows if isinstance(row, dict)]
