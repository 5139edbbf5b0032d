"""Starting a process the way a service manager does: own session, passed sockets, and a descriptor that tells its
end.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
from collections.abc import Mapping, Sequence
from typing import NoReturn

FIRST_FD = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)
PR_SET_PDEATHSIG = 1  # prctl(2)
EXIT_EXEC = 203  # what systemd shows when it could not execute a program, systemd.exec(5)

_libc = ctypes.CDLL(None, use_errno=True)


def spawn(
    argv: list[str], environment: Mapping[str, str], *, sockets: Sequence[int], output: int, directory: str
) -> tuple[int, int]:
    """Start `argv`; return its pid and a pidfd (pidfd_open(2)) that becomes readable when it ends.

    `sockets` become descriptors 3, 4, … (LISTEN_FDS, LISTEN_PID), `output` its standard output and error. It gets
    SIGTERM
    when this process dies. Raises OSError when it cannot be executed.
    """
    failed, report = os.pipe()  # close-on-exec: an end of file says that exec worked
    pid = os.fork()
    if pid == 0:
        _become(argv, dict(environment), sockets, output, directory, report)
    os.close(report)
    with os.fdopen(failed, "rb") as pipe:
        error = pipe.read()
    if error:
        os.waitpid(pid, 0)
        raise OSError(int(error), os.strerror(int(error)), argv[0])
    return pid, os.pidfd_open(pid)


def _become(
    argv: list[str],
    environment: dict[str, str],
    sockets: Sequence[int],
    output: int,
    directory: str,
    report: int,
) -> NoReturn:
    """In the child: set up and execute; on failure send errno back."""
    try:
        os.setsid()
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        os.chdir(directory)
        # First out of the way of the numbers that are about to be filled.
        passed = [os.dup(fd) for fd in sockets]
        high = [_above(fd, FIRST_FD + len(passed)) for fd in (*passed, report)]
        report = high.pop()
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for target, fd in enumerate(high, FIRST_FD):
            os.dup2(fd, target)
        if sockets:
            environment |= {"LISTEN_FDS": str(len(sockets)), "LISTEN_PID": str(os.getpid())}
        if "WATCHDOG_USEC" in environment:
            environment["WATCHDOG_PID"] = str(os.getpid())
        os.execve(argv[0], argv, environment)
    except OSError as exc:
        os.write(report, str(exc.errno).encode())
    finally:
        os._exit(EXIT_EXEC)


def _above(fd: int, least: int) -> int:
    """A close-on-exec copy of `fd` with a number of at least `least`."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, least)
