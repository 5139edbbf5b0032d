"""The command line of circlectl: flags, the request, the call, the reply; every error one line and an exit status."""

from __future__ import annotations

import codecs
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from circlectl import commands
from circlectl.commands import Command
from circlectl.helptext import choices
from circleosd import client, paths
from circleosd.api.contract import Mark, Parameter, quoted
from circleosd.errors import BadRequest, CircleError, Denied, NotFound, Unavailable

_START = "start CircleOSD: {manager} start circleosd.target, or here: circleosd up"
_LOG = "see the log: journalctl {unit} 'circleosd-*'"
_NEXT_STEP = {
    "bad-request": "see: {command} --help",
    "unknown-action": "is circlectl newer than the service? see: circlectl system status",
    "denied": "log in as somebody who may: circlectl user login NAME; see: circlectl user whoami",
    "unavailable": _LOG,
    "internal": _LOG,
    "timeout": "see: circlectl system status",
}
_SWITCHES = ("--json", "--help", "-h", "--version", "--password-stdin")


def run(argv: Sequence[str]) -> int:
    """Carry out a command line; return the exit status."""
    if argv[:1] == ["--complete"]:
        from circlectl import completion

        status = completion.run(argv[1:])
        sys.stdout.flush()
        return status
    flags, words = _split(argv)
    try:
        status = _run(words, flags)
        sys.stdout.flush()
        return status
    except CircleError as error:
        _complain(error, " ".join(words[:2]), flags.get("--scope"))
        return error.exit_status
    except BrokenPipeError:
        raise
    except OSError as exc:  # of standard output or the session's file; the service's are translated by the client
        what = f"cannot write {exc.filename or 'the output'}: {exc.strerror or exc}; what was asked for may be done"
        _complain(Unavailable(what), " ".join(words[:2]))
        return Unavailable.exit_status


def _run(words: Sequence[str], flags: Mapping[str, str]) -> int:
    if "--version" in flags:
        from circleosd import __version__

        print(f"circlectl {__version__}")
        return 0
    runtime = paths.runtime_dir(os.environ, flags.get("--scope"))
    command = _command(words, flags)
    return command if isinstance(command, int) else _carry_out(command, words[2:], flags, runtime)


def _split(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Take the flags of every command, with their values, out of what stands before `--`; a switch has the value ""."""
    flags: dict[str, str] = {}
    words: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word in _SWITCHES:
            flags[word] = ""
        elif word == "--scope":
            flags[word] = next(rest, "")
        elif word.startswith("--scope="):
            flags["--scope"] = word.partition("=")[2]
        elif word == "--":
            words += [word, *rest]
        else:
            words.append(word)
    return flags, words


def _command(words: Sequence[str], flags: Mapping[str, str]) -> Command | int:
    """The command that the line names, or the exit status when help was all that was wanted. Raises `BadRequest`."""
    wants_help = "--help" in flags or "-h" in flags
    if words[:1] == ["help"]:
        wants_help, words = True, words[1:]
    if not words:
        return _help("overview")
    group, *rest = words
    if group not in commands.GROUPS:
        raise BadRequest(f"no command {group[:64]!r}; there are: {', '.join(commands.GROUPS)}")
    found = commands.of_group(group)
    if rest[:1] in ([], ["--"]):
        return _help("of_group", group) if wants_help else _help("of_group", group, out=sys.stderr) or 2
    verb = rest[0]
    if verb not in found:
        raise BadRequest(f"no command {group} {verb[:64]!r}; there are: {', '.join(found)}")
    return _help("of_command", found[verb]) if wants_help else found[verb]


def _help(what: str, *of: Any, out: Any = None) -> int:
    import shutil

    from circlectl import helptext

    out = out or sys.stdout
    columns = shutil.get_terminal_size().columns if out.isatty() else 0
    print(getattr(helptext, what)(*of, columns=columns), end="", file=out)
    return 0


def _carry_out(command: Command, arguments: Sequence[str], flags: Mapping[str, str], runtime: str) -> int:
    from circlectl import adapter, sessions

    given = adapter.parse(command, arguments)
    request: dict[str, Any] = {"action": command.contract.action}
    opened: list[int] = []
    for item in command.parameters:
        if item.name in given:
            request[item.name] = value = _convert(item, given[item.name])
            if command.secrets:  # else it is for the service to say
                item.check(value)
    token = sessions.load(runtime) if command.verb != "login" else None
    if command.secrets and command.contract.own_object and "name" not in given:
        _require_oneself(Asking(runtime, token, ()), command)
    for item in command.secrets:
        if item.name == "old" and "name" in given:  # another's password is changed without knowing it
            continue
        if item.name == "password" and "uid" in given and "--password-stdin" not in flags:  # the uid is the user
            continue
        if (secret := _secret(item, stdin="--password-stdin" in flags)) is not None:
            request[item.name] = secret
    if any(Mark.FILE in item.marks for item in command.parameters):
        opened = _open_files(command, request)
    ask = Asking(runtime, token, opened)
    problem: CircleError | None = None
    if command.service and command.contract.stream:
        for data in ask.stream(command.service, request):
            _show(command, data, as_json="--json" in flags)
            sys.stdout.flush()
        return 0
    if command.service is None:
        data, problem = importlib.import_module(command.module).COMMANDS[command.verb](ask, request)
    else:
        try:
            data = ask.once(command.service, request)
        except Denied:
            if command.group == "user" and command.verb == "logout":
                sessions.forget(runtime)  # the session is gone at the service; so is our end of it
            raise
        if command.group == "user" and command.verb == "login":
            try:
                sessions.save(runtime, data)
            except (OSError, BadRequest) as exc:
                Asking(runtime, data["token"], ()).once(command.service, {"action": "logout"})
                why = f" at {exc.filename}: {exc.strerror}" if isinstance(exc, OSError) else f": {exc}"
                raise BadRequest(f"cannot keep the session{why}") from exc
        elif command.group == "user" and command.verb == "logout":
            sessions.forget(runtime)
    for item in data if isinstance(data, Iterator) else (data,):
        _show(command, item, as_json="--json" in flags)
        sys.stdout.flush()
    if problem:
        raise problem
    return 0


class Asking:
    """Requests to the services that listen below `runtime`, with the session's token and what was opened to pass."""

    def __init__(self, runtime: str, token: str | None, files: Sequence[int]) -> None:
        self._runtime = runtime
        self._envelope = {"token": token} if token else {}
        self._files = files

    def once(self, service: str, request: dict[str, Any]) -> Any:
        """The data of the one reply."""
        path = paths.socket_path(service, self._runtime)
        return next(client.call(path, {**request, **self._envelope}, files=self._files, said=_note))

    def stream(self, service: str, request: dict[str, Any]) -> Iterator[Any]:
        """The data of each reply that holds some; there may be any time between two."""
        path = paths.socket_path(service, self._runtime)
        for data in client.call(path, {**request, **self._envelope}, stream=True):
            if data is not None:
                yield data


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
        raise BadRequest(f"{item.word}: {quoted(text)} is none of: {', '.join(values)}")
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


def _require_oneself(ask: Asking, command: Command) -> None:
    """Raises `BadRequest` unless who asks is a user, before passwords are asked for that would be in vain."""
    if ask.once("auth-service", {"action": "whoami"})["user"] is None:
        raise BadRequest(f"{command.group} {command.verb} needs NAME: you are no CircleOSD user yourself")


def _secret(item: Parameter, *, stdin: bool) -> str | None:
    """Read a password: a line of standard input, or from the terminal without echo.

    An empty one is None where that will do. Raises `BadRequest`.
    """
    name = {"old": "present password"}.get(item.name, item.name)
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
        secret = line.removesuffix("\n")
        return secret if secret or item.required else None
    if not sys.stdin.isatty():
        if not item.required:
            return None
        raise BadRequest(f"no terminal to ask for the {name} on; give it on standard input with --password-stdin")
    secret = _typed(f"{name.capitalize()}: ")
    if secret:
        item.check(secret)
        if Mark.NEW in item.marks and _typed(f"{name.capitalize()} again: ") != secret:
            raise BadRequest(f"the two {name}s differ")
    return secret if secret or item.required else None


def _typed(prompt: str) -> str:
    """A line from the terminal without echo. What comes next begins on a line of its own, also where this raises."""
    import getpass

    try:
        return getpass.getpass(prompt)
    except BaseException:
        with contextlib.suppress(OSError), open("/dev/tty", "w", encoding="utf-8") as terminal:
            print(file=terminal)
        raise


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
            raise NotFound(f"no file {path}") from None
        except (OSError, ValueError) as exc:
            raise BadRequest(f"cannot open {path}: {getattr(exc, 'strerror', None) or exc}") from exc
        request[name] = os.path.abspath(path)
    request["files"] = [*named]
    return opened


def _show(command: Command, data: Any, *, as_json: bool) -> None:
    """Print a reply's data."""
    if as_json:
        # What the encoding lacks would be escaped by Python, not as JSON; and a terminal would obey control characters.
        escaped = sys.stdout.isatty() or codecs.lookup(sys.stdout.encoding).name != "utf-8"
        print(json.dumps(data, ensure_ascii=escaped, indent=2 if sys.stdout.isatty() else None))
        return
    from circlectl import views

    text = views.of(command, data, terminal=sys.stdout.isatty())
    if text is not None:
        print(text)


def _note(message: str) -> None:
    """What a service has to say to a request that it carried out."""
    from circlectl.render import printable

    _say(printable(message))


def _complain(error: CircleError, command: str, scope: str | None = None) -> None:
    """One line: what is wrong, its code, what to do next."""
    text = str(error)
    step = _START if isinstance(error, client.NotListening) else _NEXT_STEP.get(error.code, "")
    manager, unit = ("systemctl --user", "--user-unit") if scope == "user" else ("systemctl", "--unit")
    step = step.format(command=f"circlectl {command}".rstrip(), manager=manager, unit=unit)
    tail = f"; {step}" if step and "; " not in text else ""  # else the text names a step itself
    from circlectl.render import printable

    _say(f"{printable(text)} [{error.code}]{tail}")


def _say(text: str) -> None:
    """A line on standard error. One that cannot be written there changes nothing about what was done."""
    with contextlib.suppress(OSError):
        print(f"circlectl: {text}", file=sys.stderr)
