"""What a command line asks for, as a request: its arguments, and the passwords and files that go with them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from circlectl import adapter
from circlectl.asking import Asking
from circlectl.commands import Command
from circlectl.helptext import choices
from circleosd.api.contract import Mark, Parameter, quoted
from circleosd.errors import BadRequest, Limit, NotFound

MAX_INPUT = 16 << 20  # bytes of standard input: what a worker takes, and more than plugin-manager does by default


def request(command: Command, words: Sequence[str], ask: Asking, *, stdin: bool) -> tuple[dict[str, Any], list[int]]:
    """The request of a command with `words` behind it, and descriptors to pass along; `stdin` has the passwords.

    Raises `BadRequest` for arguments that cannot be meant, `NotFound` for a file that there is not.
    """
    given = adapter.parse(command, words)
    composed: dict[str, Any] = {"action": command.contract.action}
    for item in command.parameters:
        if item.name in given:
            composed[item.name] = value = _convert(item, given[item.name])
            if command.secrets:  # else it is for the service to say
                item.check(value)
    for item in command.parameters:
        if Mark.STDIN in item.marks and composed.pop(f"{item.name}_stdin", False):
            if item.name in composed:
                raise BadRequest(f"the {item.name} is given twice: as an argument and with --{item.spelled}-stdin")
            composed[item.name] = _read_text(item.name)
    if command.secrets:
        composed |= _secrets(command, given, ask, stdin=stdin)
    if any(Mark.FILE in item.marks for item in command.parameters):
        return composed, _open_files(command, composed)
    return composed, []


def _secrets(command: Command, given: Mapping[str, str], ask: Asking, *, stdin: bool) -> dict[str, str]:
    """The passwords that the command takes."""
    if command.contract.own_object and "name" not in given:
        _require_oneself(ask, command)
    found: dict[str, str] = {}
    for item in command.secrets:
        if item.name == "old" and "name" in given:  # another's password is changed without knowing it
            continue
        if item.name == "password" and "uid" in given and not stdin:  # the uid is the user
            continue
        what = "current password" if item.name == "old" else "new password" if "old" in found else item.name
        if (secret := _secret(item, what, stdin=stdin)) is not None:
            found[item.name] = secret
    return found


def _convert(item: Parameter, text: str) -> Any:
    """An argument's text as what the contract wants there. Raises `BadRequest` that quotes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"{item.word}: {quoted(text)} is not UTF-8 text") from None
    if Mark.TIME in item.marks:
        from circlectl import times

        return times.parse(text)
    if (values := choices(item.type)) and text not in values:
        raise BadRequest(f"{item.word}: {quoted(text)} is not one of: {', '.join(values)}")
    types = set(get_args(item.type) or (item.type,))
    if bool in types:
        if text.lower() not in ("true", "false"):
            raise BadRequest(f"--{item.word} takes no value, but got {quoted(text)}")
        return text.lower() == "true"
    for number in (int, float):
        if number in types:
            try:
                value = number(text)
                int(value)  # neither infinite nor "not a number", which JSON does not have
            except (ValueError, OverflowError):
                kind = "a whole number" if number is int else "a number"
                raise BadRequest(f"{item.word}: {quoted(text)} is not {kind}") from None
            return value
    return text


def _read_text(name: str) -> str:
    """All of standard input. Raises `BadRequest`, `Limit`."""
    try:
        data = sys.stdin.buffer.read(MAX_INPUT + 1)
        if len(data) > MAX_INPUT:
            raise Limit(f"the {name} on standard input has more than {MAX_INPUT} bytes")
        return data.decode()
    except OSError as exc:
        raise BadRequest(f"cannot read the {name} from standard input: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise BadRequest(f"the {name} on standard input is not UTF-8 text, from byte {exc.start} on") from None


def _require_oneself(ask: Asking, command: Command) -> None:
    """Raises `BadRequest` unless who asks is a user, before passwords are asked for that would be in vain."""
    if ask.once("auth-service", {"action": "whoami"})["user"] is None:
        raise BadRequest(f"{command.group} {command.verb} needs NAME: you are not a CircleOSD user")


def _secret(item: Parameter, name: str, *, stdin: bool) -> str | None:
    """Read a password, which is called `name`: a line of standard input, or from the terminal without echo.

    An empty one is None where that will do. Raises `BadRequest`.
    """
    try:
        secret = _read_secret(item, name, stdin=stdin)
        (secret or "").encode()
    except EOFError:
        raise BadRequest(f"no {name} was given") from None
    except UnicodeError:  # which quotes it
        raise BadRequest(f"the {name} is not UTF-8 text") from None
    return secret


def _read_secret(item: Parameter, name: str, *, stdin: bool) -> str | None:
    if stdin:
        line = sys.stdin.readline()
        if not line:
            raise BadRequest(f"no {name} on standard input")
        secret = line.removesuffix("\n").removesuffix("\r")  # of a file from Windows: nobody could type it
        return secret if secret or item.required else None
    if not sys.stdin.isatty():
        if not item.required:
            return None
        raise BadRequest(f"no terminal to prompt for the {name}; pass it on standard input with --password-stdin")
    secret = _typed(f"{name.capitalize()}: ")
    if secret:
        item.check(secret)
        if Mark.NEW in item.marks and _typed(f"{name.capitalize()} again: ") != secret:
            raise BadRequest(f"the two {name}s do not match")
    return secret if secret or item.required else None


def _typed(prompt: str) -> str:
    """A line from the terminal without echo. What comes next begins on a line of its own, also where this raises."""
    import getpass
    import signal

    before = signal.signal(signal.SIGCONT, lambda *_: _resumed(prompt))
    try:
        return getpass.getpass(prompt)
    except BaseException:
        with contextlib.suppress(OSError), open("/dev/tty", "w", encoding="utf-8") as terminal:
            print(file=terminal)
        raise
    finally:
        signal.signal(signal.SIGCONT, before)


def _resumed(prompt: str) -> None:
    """Ask again after a stop (Ctrl-Z, fg), before which a shell has the terminal echo."""
    import termios

    with contextlib.suppress(OSError, termios.error), open("/dev/tty", "r+b", buffering=0) as terminal:
        modes = termios.tcgetattr(terminal)
        modes[3] &= ~termios.ECHO
        termios.tcsetattr(terminal, termios.TCSAFLUSH, modes)
        terminal.write(prompt.encode())


def _open_files(command: Command, request: dict[str, Any]) -> list[int]:
    """Open what the caller may read, so that the service need not be able to; note in `files` what is passed."""
    named = {
        item.name: request[item.name] for item in command.parameters if item.name in request and Mark.FILE in item.marks
    }
    beside = os.path.splitext(named["path"])[0] + ".json"
    if "manifest" not in named and os.path.lexists(beside):
        named["manifest"] = beside
    if "manifest" in named and "signature" not in named and os.path.lexists(beside := named["manifest"] + ".sig"):
        named["signature"] = beside
    opened = []
    for name, path in named.items():
        try:
            opened.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except FileNotFoundError:
            raise NotFound(f"no such file: {path or quoted(path)}") from None
        except (OSError, ValueError) as exc:
            raise BadRequest(f"cannot open {path}: {getattr(exc, 'strerror', None) or exc}") from exc
        request[name] = os.path.abspath(path)
    request["files"] = [*named]
    return opened
