"""The command line of circlectl: flags, the command, its replies. Every error is one line and an exit status."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TextIO

from circlectl import commands, helptext
from circlectl.asking import Asking, going_by_replies
from circlectl.commands import Command
from circleosd import client, paths
from circleosd.api.contract import quoted
from circleosd.errors import BadRequest, CircleError, Unavailable

_START = "start CircleOSD: {manager} start circleosd.target, or in the foreground: circleosd up"
_LOG = "see the log: journalctl {unit} 'circleosd-*', or the output of circleosd up"
_NEXT_STEP = {
    "bad-request": "see: {command} --help",
    "unknown-action": "is circlectl newer than the service? see: circlectl system status",
    "denied": "log in as a user who may: circlectl user login NAME; see: circlectl user whoami",
    "unavailable": _LOG,
    "internal": _LOG,
}
BROKEN_PIPE = 141  # as a shell counts SIGPIPE
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
    except OSError as exc:
        what = f"cannot write the output: {exc.strerror or exc}; no request was made"
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
    """Separate global flags and their values from the rest, up to `--`. The value of a switch is ""."""
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
    """The command that the line names, or the exit status if only help was requested. Raises `BadRequest`."""
    wants_help = "--help" in flags or "-h" in flags
    if words[:1] == ["help"]:
        wants_help, words = True, words[1:]
    if not words:
        _help(helptext.overview)
        return 0
    if flag := next((word for word in words[:2] if word.startswith("-") and word != "--"), None):
        raise BadRequest(f"{quoted(flag)} is not a global flag; put the flags of a command after it")
    group, *rest = words
    if group not in commands.GROUPS:
        meant = [f"{name} {group}" for name in commands.GROUPS if group in commands.of_group(name)]
        offered = f"did you mean: {', '.join(meant)}" if meant else f"available: {', '.join(commands.GROUPS)}"
        raise BadRequest(f"no command {group[:64]!r}; {offered}")
    found = commands.of_group(group)
    if rest[:1] in ([], ["--"]):
        _help(partial(helptext.of_group, group), sys.stdout if wants_help else sys.stderr)
        return 0 if wants_help else 2
    verb = rest[0]
    if verb not in found:
        raise BadRequest(f"no command {f'{group} {verb[:64]}'!r}; available: {', '.join(found)}")
    if wants_help:
        _help(partial(helptext.of_command, found[verb]))
        return 0
    return found[verb]


def _help(text: Callable[[int], str], out: TextIO | None = None) -> None:
    """Print a help text, wrapped if the output is a terminal."""
    out = out or sys.stdout
    print(text(_columns(out) or 0), end="", file=out)


def _columns(out: TextIO) -> int | None:
    """The width of a terminal; None for anything else."""
    if not out.isatty():
        return None
    import shutil

    return shutil.get_terminal_size().columns


def _carry_out(command: Command, arguments: Sequence[str], flags: Mapping[str, str], runtime: str) -> int:
    from circlectl import composing, sessions

    token = sessions.load(runtime) if command.verb != "login" else None
    request, files = composing.request(command, arguments, Asking(runtime, token), stdin="--password-stdin" in flags)
    if command.contract.stream or "follow" in request:
        _end_with_the_reader()
    try:
        with going_by_replies():
            for data in _replies(command, request, Asking(runtime, token, files, said=_note)):
                _show(command, data, as_json="--json" in flags)
                sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as exc:  # standard output or the session's file; errors of the service are translated by the client
        what = f"cannot write {exc.filename or 'the output'}: {exc.strerror or exc}"
        raise Unavailable(f"{what}; the request may have succeeded") from exc
    return 0


def _end_with_the_reader() -> None:
    """End as soon as nobody reads the output any more: a followed stream may never have another line to write."""
    import select
    import threading

    def wait() -> None:
        poll.poll()
        os._exit(BROKEN_PIPE)

    poll = select.poll()
    with contextlib.suppress(OSError, RuntimeError):  # it has no descriptor, or there can be no more threads
        poll.register(sys.stdout.fileno(), 0)  # errors and hang-ups alone (poll(2))
        threading.Thread(target=wait, daemon=True).start()


def _replies(command: Command, request: dict[str, Any], ask: Asking) -> Iterator[Any]:
    """The data to show. Raises the error that occurred, possibly after yielding data."""
    from circlectl import sessions

    if command.local:
        data, problem = command.local(ask, request)
        yield from data if isinstance(data, Iterator) else (data,)
        if problem:
            raise problem
    elif command.contract.stream:
        yield from ask.stream(command.service, request)
    elif keeping := {"login": sessions.login, "logout": sessions.logout}.get(command.verb):
        yield keeping(ask, command.service, request)
    else:
        yield ask.once(command.service, request)


def _show(command: Command, data: Any, *, as_json: bool) -> None:
    """Print a reply's data."""
    if as_json:
        # Python would escape characters that the encoding lacks, but not as JSON; and a terminal would obey control
        # characters.
        escaped = sys.stdout.isatty() or codecs.lookup(sys.stdout.encoding).name != "utf-8"
        print(json.dumps(data, ensure_ascii=escaped, indent=2 if sys.stdout.isatty() else None))
        return
    from circlectl import views

    text = views.of(command, data, room=_columns(sys.stdout))
    if text is not None:
        print(text)


def _note(message: str) -> None:
    """Print what a service says about a request that it carried out."""
    from circlectl.render import printable

    _say(printable(message))


def _complain(error: CircleError, command: str, scope: str | None = None) -> None:
    """Print one line: what is wrong, its code, what to do next."""
    text = str(error)
    step = _START if isinstance(error, client.NotListening) else _NEXT_STEP.get(error.code, "")
    manager, unit = ("systemctl --user", "--user-unit") if scope == "user" else ("systemctl", "--unit")
    step = step.format(command=f"circlectl {command}".rstrip(), manager=manager, unit=unit)
    tail = f"; {step}" if step and "; " not in text else ""  # otherwise the text already names a step
    from circlectl.render import printable

    _say(f"{printable(text)} [{error.code}]{tail}")


def _say(text: str) -> None:
    """Print a line on standard error. A failure to do so does not change what was done."""
    with contextlib.suppress(OSError):
        print(f"circlectl: {text}", file=sys.stderr)
