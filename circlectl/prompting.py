"""Passwords: from the terminal without echo, or from standard input."""

from __future__ import annotations

import contextlib
import sys

from circleosd.api.contract import Mark, Parameter
from circleosd.errors import BadRequest

MAX_LINE = 64 * 1024  # characters of a line on standard input; a password has a fraction of that


def secret(item: Parameter, name: str, *, stdin: bool) -> str | None:
    """Read a password, called `name` in messages: a line of standard input, or from the terminal without echo.

    An empty one is None if it is optional. Raises `BadRequest`.
    """
    try:
        found = _read(item, name, stdin=stdin)
        (found or "").encode()
    except EOFError:
        raise BadRequest(f"no {name} was given") from None
    except UnicodeError:  # the exception would quote the password
        raise BadRequest(f"the {name} is not UTF-8 text") from None
    return found


def _read(item: Parameter, name: str, *, stdin: bool) -> str | None:
    if stdin:
        line = sys.stdin.readline(MAX_LINE)
        if not line:
            raise BadRequest(f"no {name} on standard input")
        if len(line) == MAX_LINE:
            raise BadRequest(f"the {name} on standard input has too many characters")
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
    """A line from the terminal without echo. Subsequent output starts on its own line, even if this raises."""
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
    """Prompt again after a stop (Ctrl-Z, fg), for which the shell had turned echo on."""
    import termios

    with contextlib.suppress(OSError, termios.error), open("/dev/tty", "r+b", buffering=0) as terminal:
        modes = termios.tcgetattr(terminal)
        modes[3] &= ~termios.ECHO
        termios.tcsetattr(terminal, termios.TCSAFLUSH, modes)
        terminal.write(prompt.encode())
