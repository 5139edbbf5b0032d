"""`circlectl`: start, run the command line, end. Everything that costs time at every start is kept out of here."""

from __future__ import annotations

import gc
import io
import os
import sys

TYPE_CHECKING = False  # other imports are left to `main`, which handles an interruption
if TYPE_CHECKING:
    from typing import Literal, NoReturn, TextIO

INTERRUPTED = 130  # as a shell counts SIGINT


def main() -> NoReturn:
    """Run the command line and exit with its status.

    A command lives for some 50 ms: garbage collection and the teardown of modules would take a quarter of that.
    """
    gc.disable()
    _prepare_streams()
    try:
        import contextlib

        from circlectl.cli import BROKEN_PIPE, run

        status = run(sys.argv[1:])
        with contextlib.suppress(OSError):  # a failure to write does not change what was done
            sys.stderr.flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        status = BROKEN_PIPE
    os._exit(status)


def _prepare_streams() -> None:
    """Put /dev/null where a standard stream is closed, and escape what the locale's encoding lacks."""
    sys.stdin = sys.stdin or _null("r")
    sys.stdout = sys.stdout or _null("w")
    sys.stderr = sys.stderr or _null("w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _null(mode: Literal["r", "w"]) -> TextIO:
    return open(os.devnull, mode, encoding="utf-8")


if __name__ == "__main__":
    main()
