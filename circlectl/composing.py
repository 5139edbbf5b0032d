"""Turns a command line into a request: its arguments, and the passwords and files that go with them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from circlectl import adapter
from circlectl.asking import Asking, going_by_replies
from circlectl.commands import Command
from circlectl.helptext import choices
from circleosd.api.contract import Mark, Parameter, quoted
from circleosd.errors import BadRequest, Limit, NotFound

MAX_INPUT = 16 << 20  # bytes of standard input: a worker's limit, and more than plugin-manager's default


def request(command: Command, words: Sequence[str], ask: Asking, *, stdin: bool) -> tuple[dict[str, Any], list[int]]:
    """The request for a command, and descriptors to pass along. With `stdin`, passwords come from standard input.

    Raises `BadRequest` for invalid arguments, `NotFound` for a file that does not exist.
    """
    given = adapter.parse(command, words)
    composed: dict[str, Any] = {"action": command.contract.action}
    for item in command.parameters:
        if item.name in given:
            composed[item.name] = value = _convert(item, given[item.name])
            if command.secrets:  # otherwise the service checks it
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
    from circlectl import prompting

    if "name" not in given:
        _require_oneself(ask, command)
    found: dict[str, str] = {}
    for item in command.secrets:
        if item.name == "old" and "name" in given:  # changing somebody else's password does not require knowing it
            continue
        if item.name == "password" and "uid" in given and not stdin:  # the uid identifies the user
            continue
        what = "current password" if item.name == "old" else "new password" if "old" in found else item.name
        if (secret := prompting.secret(item, what, stdin=stdin)) is not None:
            found[item.name] = secret
    return found


def _convert(item: Parameter, text: str) -> Any:
    """An argument's text, converted to the type in the contract. Raises `BadRequest`, which quotes it."""
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
    """Raises `BadRequest` unless the caller is a user, before prompting for passwords in vain."""
    with going_by_replies():
        user = ask.once(command.service, {"action": "whoami"})["user"]
    if user is None:
        raise BadRequest(f"{command.group} {command.verb} needs NAME: you are not a CircleOSD user")


def _open_files(command: Command, request: dict[str, Any]) -> list[int]:
    """Open files with the caller's rights, so that the service needs none; name them in `files`, in order."""
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
            opened.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        except FileNotFoundError:
            raise NotFound(f"no such file: {path or quoted(path)}") from None
        except (OSError, ValueError) as exc:
            raise BadRequest(f"cannot open {path}: {getattr(exc, 'strerror', None) or exc}") from exc
        request[name] = os.path.abspath(path)
    request["files"] = [*named]
    return opened
