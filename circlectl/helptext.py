"""Help, generated from the contracts: the commands, their parameters, and what they do."""

from __future__ import annotations

from typing import Any, get_args

from circlectl import commands
from circlectl.commands import Command
from circleosd.api.contract import Mark, Parameter, Request

FLAGS = {
    "--scope": "which CircleOSD to use: system, or user for your own (default: system if there is one)",
    "--json": "print the reply's data as JSON",
    "--password-stdin": "read passwords from standard input, one per line, instead of prompting",
    "--": "treat everything that follows as values, even if it looks like a flag",
    "--help": "show this help and exit",
}
_SHOWN = {"--scope": "--scope SCOPE", "--help": "-h, --help"}
NARROW = 30  # minimum width of a description; if there is less room, it goes below the name


def overview(columns: int = 0) -> str:
    """All groups and their commands. The lines are wrapped to `columns` if that is given."""
    lines = ["usage: circlectl GROUP COMMAND [ARGUMENT ...] [--flag ...]", ""]
    for group, about in commands.GROUPS.items():
        lines.append(f"{group}: {about}")
        lines += _listing(group, columns)
        lines.append("")
    return "\n".join([*lines, *_of_every_command(columns), ""])


def of_group(group: str, columns: int = 0) -> str:
    """The commands of one group."""
    listed = _listing(group, columns)
    return "\n".join([f"usage: circlectl {group} COMMAND", "", *listed, "", *_of_every_command(columns), ""])


def _listing(group: str, columns: int) -> list[str]:
    found = commands.of_group(group).values()
    return [_row(f"{usage(command):<44} ", phrase(command.contract.summary()), columns) for command in found]


def _of_every_command(columns: int) -> list[str]:
    rows = [_row(f"{_SHOWN.get(flag, flag):<17} ", about, columns) for flag, about in FLAGS.items()]
    return ["Flags of all commands:", *rows]


def _row(left: str, right: str, columns: int) -> str:
    """A line of two columns, the second one wrapped; two lines or more on a narrow terminal."""
    left = f"  {left}"
    if not columns:
        return left + right
    import textwrap

    if columns - len(left) < NARROW:
        below = " " * 6
        wrapped = textwrap.fill(right, max(columns, NARROW), initial_indent=below, subsequent_indent=below)
        return f"{left.rstrip()}\n{wrapped}"
    return textwrap.fill(right, columns, initial_indent=left, subsequent_indent=" " * len(left))


def of_command(command: Command, columns: int = 0) -> str:
    """One command in detail."""
    lines = [f"usage: circlectl {command.group} {usage(command)}", "", command.contract.summary(), ""]
    rows = [(_word(item), described(item)) for item in command.parameters]
    rows += [(f"({item.name})", secret(item)) for item in command.secrets]
    if rows:
        width = max(len(word) for word, _ in rows)
        lines += [*(_row(f"{word:<{width}}  ", about, columns) for word, about in rows), ""]
    return "\n".join([*lines, needed(command.contract), "", *_of_every_command(columns), ""])


def described(item: Parameter) -> str:
    """What a parameter is, its possible values and its default."""
    default = "" if item.required or item.default in (None, False, "") else f" (default: {item.default})"
    among = f": {', '.join(choices(item.type))}" if choices(item.type) else ""
    if Mark.TIME in item.marks:
        from circlectl.times import EXAMPLES

        among = f", such as {EXAMPLES}"
    return f"{item.doc}{among}{default}"


def secret(item: Parameter) -> str:
    """What a secret is and how to provide it."""
    return f"{item.doc} (prompted for, or read with --password-stdin)"


def needed(contract: type[Request]) -> str:
    """Who may carry out a command, in a sentence."""
    if contract.access == "anyone":
        return "Anyone may do this."
    role = f"Needs the role {contract.access}" + (", or a rule that allows it" if contract.takes_rules() else "")
    return f"{role}, except for yourself." if contract.own_object else f"{role}."


def choices(kind: Any) -> list[str]:
    """The values of a type with a closed set of values (Literal), also within a union."""
    return [
        value
        for part in get_args(kind)
        for value in ([part] if type(part) is str else choices(part))  # and not a Doc, which is a str too
    ]


def usage(command: Command) -> str:
    """The verb and what it takes."""
    words = [command.verb]
    for item in command.parameters:
        if Mark.OPTION not in item.marks:
            words.append(_word(item) if item.required else f"[{_word(item)}]")
    if any(Mark.OPTION in item.marks for item in command.parameters):
        words.append("[--flag ...]")
    return " ".join(words)


def _word(item: Parameter) -> str:
    name = item.spelled
    if Mark.OPTION not in item.marks:
        return name.upper()
    return f"--{name}" if item.type is bool else f"--{name} {name.upper()}"


def phrase(text: str) -> str:
    """A sentence as part of a line: without capital letter and period."""
    return text[:1].lower() + text[1:].rstrip(".")
