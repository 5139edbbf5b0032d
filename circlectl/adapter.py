"""The only place that uses python-fire: turns a command line into an inert description of a request.

Fire runs a command before it has looked at the whole line, guesses types, and offers a Python prompt and a pager. So
the functions that it calls here only note their arguments, arguments remain text as typed, and Fire's own flags cannot
be reached.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from circlectl.commands import Command
from circleosd.api.contract import Mark, quoted
from circleosd.errors import BadRequest

LITERAL = "\0"  # marks an argument that followed `--`; no argument can contain this character (execve(2))


class Call:
    """The arguments of a call. Fire would chain leftover arguments onto members of a result; this shows none."""

    __slots__ = ("arguments",)

    def __init__(self, arguments: Mapping[str, str]) -> None:
        self.arguments = arguments

    def __dir__(self) -> list[str]:
        return []


class _Members:
    """A level of the command tree: Fire finds only the given names, and nothing of Python's."""

    def __init__(self, members: Mapping[str, Any]) -> None:
        self.__dict__.update(members)

    def __dir__(self) -> list[str]:
        return [*self.__dict__]


def _no_usage(*_: object, **__: object) -> str:
    return ""


# Modules that Fire imports but that are not needed here, with the attributes that it looks up: most of the cost of
# importing Fire. asyncio is imported for one predicate; completion, docstrings, helptext and interact for things that
# circlectl does itself or not at all; its console runs $PAGER, and its Windows colors load ctypes.
_STAND_INS: dict[str, dict[str, Any]] = {
    "asyncio": {"iscoroutinefunction": inspect.iscoroutinefunction},
    "fire.completion": {},
    "fire.console": {"console_io": None},
    "fire.console.console_io": {},
    "fire.docstrings": {},
    "fire.formatting_windows": {},
    "fire.helptext": {"UsageText": _no_usage, "HelpText": _no_usage},
    "fire.interact": {},
}


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Replace, while Fire is imported, modules that are not needed here. The real asyncio can still be imported."""
    absent = [name for name in _STAND_INS if name not in sys.modules]
    for name in absent:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(_STAND_INS[name])
    try:
        yield
    finally:
        if "asyncio" in absent:
            del sys.modules["asyncio"]


def parse(command: Command, arguments: Sequence[str]) -> Mapping[str, str]:
    """The parameters given on a command line, as typed. Raises `BadRequest` for a line that Fire does not accept."""
    with _stand_ins():
        import fire
        from fire import decorators

    made: list[Call] = []  # Fire is untyped: its result is only compared with what was made here

    def bound(*values: str, **given: str) -> Call:
        passed = signature.bind_partial(*values, **given).arguments
        made.append(Call({names[word]: value for word, value in passed.items() if value is not None}))
        return made[-1]

    names = {item.word: item.name for item in command.parameters}
    signature = _signature(command)
    bound.__name__ = command.verb
    bound.__signature__ = signature  # type: ignore[attr-defined]  # what inspect.signature() goes by
    decorators.SetParseFn(_as_typed)(bound)

    tree = _Members({command.group: _Members({command.verb: bound})})
    line = [command.group, command.verb, *_normal(command, arguments), "--", "--separator", LITERAL + LITERAL]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            result = fire.Fire(tree, command=line, name="circlectl", serialize=lambda _: None)
        except fire.core.FireExit as exc:
            raise BadRequest(_sentence(command, exc.trace.elements[-1])) from None
    call = made[-1] if made else None
    if call is None or result is not call:
        raise BadRequest(f"cannot parse the arguments of {command.group} {command.verb}")
    return call.arguments


def _signature(command: Command) -> inspect.Signature:
    """Parameters are positional, unless they are marked as options: then they are flags."""
    kinds = inspect.Parameter
    positional, flags = [], []
    for item in command.parameters:
        if Mark.OPTION in item.marks:
            flags.append(kinds(item.word, kinds.KEYWORD_ONLY, default=None))
        else:
            default = kinds.empty if item.required else None
            positional.append(kinds(item.word, kinds.POSITIONAL_OR_KEYWORD, default=default))
    return inspect.Signature([*positional, *flags])


def _as_typed(value: str) -> str:
    return value.removeprefix(LITERAL)


def _normal(command: Command, arguments: Sequence[str]) -> list[str]:
    """Rewrite what Fire would misread: flags, and values that look like flags. Raises `BadRequest`.

    A flag takes the next word as its value, whatever that is, unless it is another flag; Fire would make up a value.
    The values of a flag that may be given several times are joined with commas, since Fire takes only the last one.
    """
    name = f"{command.group} {command.verb}"
    flags = {f"--{item.spelled}": item for item in command.parameters}
    end = arguments.index("--") if "--" in arguments else len(arguments)
    words = iter(arguments[:end])
    values: list[str] = []
    given: dict[str, list[str]] = {}
    for word in words:
        flag, equals, value = word.partition("=")
        if (item := flags.get(flag)) is None:
            # A lone - and a negative number are values; any other word that starts with - is meant as a flag.
            if word.startswith("-") and not re.fullmatch(r"-([0-9.].*)?", word, re.DOTALL):
                raise BadRequest(f"{name} does not take {quoted(word)}")
            values.append(word)
            continue
        if not equals:
            following = "true" if item.type is bool else next(words, None)
            if following is None or following.partition("=")[0] in flags:
                raise BadRequest(f"{name}: {flag} needs a value")
            value = following
        if list[str] not in get_args(item.type):
            given[flag] = []
        given.setdefault(flag, []).append(value)
    values += arguments[end + 1 :]
    return [*(LITERAL + item for item in values), *(f"{flag}={LITERAL}{','.join(of)}" for flag, of in given.items())]


def _sentence(command: Command, element: Any) -> str:
    """Fire's complaint as a sentence, without its vocabulary."""
    name = f"{command.group} {command.verb}"
    text = str(element.ErrorAsStr()).replace(LITERAL, "")
    if "required argument" in text:
        return f"{name} needs {text.rpartition(':')[2].strip().upper()}"
    if "Could not consume arg" in text:
        return f"{name} does not take {quoted(text.partition('Could not consume arg:')[2].strip())}"
    return f"{name}: {text[:1].lower()}{text[1:]}"
