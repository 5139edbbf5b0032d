"""Help, made from the contracts: what there is, what it takes, what it does."""

from __future__ import annotations

from typing import Any, get_args

from circlectl import commands
from circlectl.commands import Command
from circleosd.api.contract import Mark, Parameter

FLAGS = {
    "--scope": "the CircleOSD of the system or the user's own: system, user (default: the one that there is)",
    "--json": "print the reply's data as JSON",
    "--password-stdin": "read a password from standard input instead of asking",
    "--": "what follows is values, also if it looks like a flag",
    "--help": "show this and do nothing",
}
_SHOWN = {"--scope": "--scope SCOPE", "--help": "-h, --help"}
GLOBAL = "Flags of every command:\n" + "".join(
    f"  {_SHOWN.get(flag, flag):<17} {about}\n" for flag, about in FLAGS.items()
)


def overview() -> str:
    """All groups and their commands."""
    lines = ["usage: circlectl GROUP COMMAND [ARGUMENT ...] [--flag ...]", ""]
    for group, about in commands.GROUPS.items():
        lines.append(f"{group}: {about}")
        lines += _listing(group)
        lines.append("")
    return "\n".join(lines) + GLOBAL


def of_group(group: str) -> str:
    """The commands of one group."""
    return "\n".join([f"usage: circlectl {group} COMMAND", "", *_listing(group), "", GLOBAL])


def _listing(group: str) -> list[str]:
    found = commands.of_group(group).values()
    return [f"  {usage(command):<44} {phrase(command.contract.summary())}" for command in found]


def of_command(command: Command) -> str:
    """One command in detail."""
    lines = [f"usage: circlectl {command.group} {usage(command)}", "", command.contract.summary(), ""]
    for item in command.parameters:
        lines.append(f"  {_word(item):<20} {described(item)}")
    for item in command.secrets:
        lines.append(f"  {'(' + item.name + ')':<20} {item.doc}: asked for without echo, or --password-stdin")
    needs = (
        f"Needs the role {command.contract.access}." if command.contract.access != "anyone" else "Anyone may do this."
    )
    return "\n".join([*lines, "", needs, "", GLOBAL])


def described(item: Parameter) -> str:
    """What a parameter is, the values it may have and the one that it has otherwise."""
    default = "" if item.required or item.default in (None, False, "") else f" (default: {item.default})"
    among = f": {', '.join(choices(item.type))}" if choices(item.type) else ""
    return f"{item.doc}{among}{default}"


def choices(kind: Any) -> list[str]:
    """The values of a type that has a closed set of them (Literal), also in a union."""
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
    """A sentence as part of a line: without capital and period."""
    return text[:1].lower() + text[1:].rstrip(".")
