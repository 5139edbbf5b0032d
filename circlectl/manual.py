"""The page circlectl(1), generated from the contracts: `python -m circlectl.manual` prints it in mdoc(7)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from inspect import cleandoc
from typing import Any, get_args, get_origin, get_type_hints

from circlectl import commands
from circlectl.__main__ import INTERRUPTED
from circlectl.cli import BROKEN_PIPE
from circlectl.commands import Command
from circlectl.helptext import FLAGS, described, needed, phrase, secret
from circleosd import __version__
from circleosd.api.contract import Mark, Parameter
from circleosd.errors import BY_CODE

_HEAD = r"""
.Sh NAME
.Nm circlectl
.Nd control services, users and plugins of CircleOSD
.Sh SYNOPSIS
.Nm
.Op Fl -scope Ar system | user
.Op Fl -json
.Ar group
.Ar command
.Op Ar argument ...
.Op Fl -flag Ar ...
.Nm
.Op Ar group Op Ar command
.Fl -help
.Nm
.Fl -version
.Sh DESCRIPTION
.Nm
uses the services of CircleOSD, which systemd starts on demand, to start, stop and restart units, to call plugins, and
to manage the users who may do so.
What you may do depends on your uid and on the user that you have logged in as.
Every change, and every denied attempt at one, is recorded.
.Pp
Arguments are passed on exactly as they are typed.
These flags apply to all commands:
"""
_JSON = r"""
.Pp
Long cells of a table are cut, shorter on a narrow terminal, except times and the first and the last column.
With
.Fl -json ,
a reply is printed on one line, or indented if the output is a terminal; with
.Fl -follow ,
each row is one line.
Times are in seconds since the epoch, time spans in seconds and sizes in bytes; null means unknown or not applicable.
Later versions may add fields to those listed below.
"""
_TAIL = r"""
.Sh ENVIRONMENT
.Bl -tag -width Ds
.It Ev CIRCLEOSD_RUNTIME_DIR
The directory of the sockets, unless
.Fl -scope
is given.
.It Ev XDG_RUNTIME_DIR
The directory whose subdirectory
.Pa circleosd
has the sockets of the user's own CircleOSD; by default
.Pa /run/user/UID
if that has such a subdirectory, and for root always on a host booted with systemd; otherwise where
.Ic circleosd up
listens.
.It Ev XDG_STATE_HOME
Where the login session is stored, by default
.Pa ~/.local/state .
.El
.Sh FILES
.Bl -tag -width Ds
.It Pa /run/circleosd
The sockets of the system's CircleOSD, used by default if this directory exists.
.It Pa ~/.local/state/circleosd/sessions
The session that
.Ic user login
has opened, readable only by its owner.
.El
"""
_LAST = r"""
.Sh EXAMPLES
Restart a service, then show who did so:
.Bd -literal -offset indent
$ circlectl service restart nginx
$ circlectl system history \-\-object nginx
.Ed
.Pp
Call a plugin with a text that looks like a flag:
.Bd -literal -offset indent
$ circlectl plugin invoke example handle \-\- \-\-text
.Ed
.Pp
Call a plugin with the contents of a file:
.Bd -literal -offset indent
$ circlectl plugin invoke example handle \-\-payload\-stdin <text
.Ed
.Sh SEE ALSO
.Xr systemctl 1 ,
.Xr circleosd.toml 5 ,
.Xr circleosd 8
"""


def page(environment: Mapping[str, str]) -> str:
    """The whole page. Its date is SOURCE_DATE_EPOCH (reproducible-builds.org) or today."""
    date = time.gmtime(int(environment.get("SOURCE_DATE_EPOCH") or time.time()))
    lines = [f".Dd {time.strftime('%B', date)} {date.tm_mday}, {date.tm_year}", ".Dt CIRCLECTL 1"]
    lines += [f".Os CircleOSD {__version__}", _HEAD.strip(), *_flags(), _JSON.strip(), ".Sh COMMANDS"]
    for group, about in commands.GROUPS.items():
        lines += [f".Ss {group}: {_text(about)}", ".Bl -tag -width Ds"]
        for command in commands.of_group(group).values():
            lines += _command(command)
        lines.append(".El")
    return "\n".join([*lines, _TAIL.strip(), *_statuses(), _LAST.strip(), ""])


def _flags() -> Iterator[str]:
    yield ".Bl -tag -width Ds"
    for flag, about in FLAGS.items():
        value = " Ar scope" if flag == "--scope" else ""
        yield f".It {'Fl h , ' if flag == '--help' else ''}Fl {flag[1:]}{value}"
        yield _sentence(about)
    yield ".El"


def _command(command: Command) -> Iterator[str]:
    words = " ".join(_usage(item) for item in command.parameters)
    yield f".It Ic {command.group} {command.verb} {words}".rstrip()
    yield _text(" ".join(cleandoc(command.contract.__doc__ or "").split()))
    if command.parameters or command.secrets:
        yield ".Bl -tag -width Ds -compact"
        for item in command.parameters:
            yield f".It {_name(item)}"
            yield _sentence(described(item))
        for item in command.secrets:
            yield f".It Pq {item.spelled}"
            yield _sentence(secret(item))
        yield ".El"
    yield needed(command.contract)
    if command.contract.reply is not None:
        yield f"JSON: {_shape(command.contract.reply)}."


def _shape(reply: Any) -> str:
    """The shape of a reply: a text, or the fields of its objects, with their own fields in parentheses."""
    if reply is str:
        return "a text"
    if get_origin(reply) is list:
        return f"a list, each with {_shape(get_args(reply)[0])}"
    # No name is to be parted at the end of a line (groff(7)).
    return ", ".join(rf"\%{name}{_nested(kind)}" for name, kind in get_type_hints(reply).items())


def _nested(kind: Any) -> str:
    for part in (kind, *get_args(kind)):
        if hasattr(part, "__total__"):  # a TypedDict
            return f" ({_shape(part)})"
    return ""


def _usage(item: Parameter) -> str:
    return _name(item) if item.required else f"Oo {_name(item)} Oc"


def _name(item: Parameter) -> str:
    """A parameter in mdoc macros: an argument, or a flag and its value."""
    if Mark.OPTION not in item.marks:
        return f"Ar {item.spelled}"
    return f"Fl -{item.spelled}" + ("" if item.type is bool else f" Ar {item.spelled}")


def _statuses() -> Iterator[str]:
    yield ".Sh EXIT STATUS"
    yield ".Nm"
    yield "exits with 0 on success."
    yield "Otherwise it prints one line on standard error, with the code of the error in brackets,"
    yield "and exits with:"
    yield '.Bl -column "status" "unknown-action" -offset indent'
    for code, error in BY_CODE.items():
        yield f".It {error.exit_status} Ta Li {code} Ta {phrase(_text((error.__doc__ or '').partition('.')[0]))}"
    yield ".El"
    yield ".Pp"
    yield f"Without printing a line, it exits with {INTERRUPTED} when it is interrupted, and with"
    yield f"{BROKEN_PIPE} when nobody reads its output any more."


def _sentence(text: str) -> str:
    """Words from help as a sentence of running text."""
    return _text(f"{text[:1].upper()}{text[1:]}.")


def _text(text: str) -> str:
    """Text escaped for roff, one sentence per line (mdoc(7))."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    lines = escaped.replace(". ", ".\n").split("\n")
    return "\n".join(f"\\&{line}" if line[:1] in (".", "'") else line for line in lines)


if __name__ == "__main__":
    print(page(os.environ), end="")
