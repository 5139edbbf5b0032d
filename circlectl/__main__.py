"""`circlectl`: start, run the command line, end. What costs time at every start is kept out of here."""

import gc
import os
import sys
from typing import NoReturn

INTERRUPTED = 130  # as a shell counts SIGINT
BROKEN_PIPE = 141  # and SIGPIPE


def main() -> NoReturn:
    """Run the command line and exit with its status.

    A command lives for some 50 ms: collecting garbage and tearing modules down would be a quarter of that.
    """
    gc.disable()
    from circlectl.cli import run

    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
        sys.stderr.flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        status = BROKEN_PIPE
    os._exit(status)


if __name__ == "__main__":
    main()
