"""The main process of a service: its start according to the unit file, its output by lines, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from circleosd.activation import FIRST
from circleosd.embedded.sockets import readable
from circleosd.embedded.unitfile import UnitFile
from circleosd.errors import BadRequest
from circleosd.registry.units import signal_name

LONGEST_LINE = 8192  # bytes; a longer one is cut
BURST, INTERVAL = 4 << 20, 30.0  # bytes of output accepted per interval; journald counts lines
DIRECTORIES = {"StateDirectory": "S", "CacheDirectory": "C", "RuntimeDirectory": "t"}  # by the specifier of the parent
PR_SET_PDEATHSIG = 1  # prctl(2)

_libc = ctypes.CDLL(None)


class Process:
    """One run of a service, as leader of its own session, which ends with this process.

    `specifiers` name the parents of its directories, `watchdog` is in seconds, `listener` is the socket that it gets.
    Raises `BadRequest` for settings that the embedded mode does not support, OSError and ValueError if it cannot be
    started.
    """

    def __init__(
        self, file: UnitFile, specifiers: Mapping[str, str], watchdog: float, listener: socket.socket | None
    ) -> None:
        supervisor = os.getpid()
        environment = {**os.environ, **_environment(file), **_directories(file, specifiers)}
        if watchdog < math.inf:
            environment["WATCHDOG_USEC"] = str(int(watchdog * 1e6))
        if listener:
            environment["LISTEN_FDS"] = "1"

        def become() -> None:
            """Runs in the child, the only place where its pid is known."""
            os.environ.update(environment, LISTEN_PID=str(os.getpid()), WATCHDOG_PID=str(os.getpid()))
            if listener:
                os.dup2(listener.fileno(), FIRST)  # replaces the event loop's own
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != supervisor:
                os.kill(os.getpid(), signal.SIGKILL)

        if user := file.get("Service", "User"):
            raise BadRequest(f"the embedded mode runs everything as you, not as User={user}")
        self._child = subprocess.Popen(
            file.command(environment),
            cwd=file.get("Service", "WorkingDirectory", "/").lstrip("-"),
            umask=int(file.get("Service", "UMask", "0022"), 8),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=become, pass_fds=(FIRST,) if listener else (),
        )  # fmt: skip
        self.pid = self._child.pid
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError:
            self._child.kill()
            self._child.wait()
            raise
        self.ended = asyncio.create_task(readable(self._pidfd))

    def signal(self, number: int) -> None:
        """Send a signal to it and its children, including those that it left behind. Not after `reap`."""
        os.killpg(self.pid, number)

    async def reap(self) -> tuple[int | None, str | None]:
        """Wait for its end; return its exit status, or None and the name of the signal that ended it.

        Cancelling is ignored: the process would remain as a zombie.
        """
        while not self.ended.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([self.ended])
        os.close(self._pidfd)
        code = self._child.wait()
        return (code, None) if code >= 0 else (None, signal_name(-code))

    async def lines(self) -> AsyncIterator[str]:
        """The output of the process and its children, line by line, until the last of them closes it."""
        assert self._child.stdout is not None
        with self._child.stdout as output:
            data, rest, since, taken = b"-", b"", 0.0, 0
            while data:
                await readable(output.fileno())
                data = os.read(output.fileno(), LONGEST_LINE)
                if time.monotonic() - since > INTERVAL:
                    since, taken = time.monotonic(), 0
                taken += len(data)
                if taken > BURST:
                    if taken - len(data) <= BURST:
                        yield f"wrote more than {BURST} bytes within {INTERVAL:g} s; some of what follows is dropped"
                    rest = b""
                    continue
                *whole, rest = (rest + data).split(b"\n")
                if rest and (not data or len(rest) >= LONGEST_LINE):
                    whole, rest = [*whole, rest], b""
                for line in whole:
                    yield line.decode("utf-8", "replace")


def _environment(file: UnitFile) -> dict[str, str]:
    """The variables that the unit file sets (Environment=, systemd.exec(5))."""
    assignments = (assignment.partition("=") for assignment in file.words("Service", "Environment"))
    return {key: value for key, _, value in assignments}


def _directories(file: UnitFile, specifiers: Mapping[str, str]) -> dict[str, str]:
    """Make the directories of the service (StateDirectory= and the like); return the variables that name them."""
    variables = {}
    for key, specifier in DIRECTORIES.items():
        paths = [Path(specifiers[specifier], name) for name in file.words("Service", key)]
        for path in paths:
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(int(file.get("Service", f"{key}Mode", "0755"), 8))
        if paths:
            variables[key.removesuffix("Directory").upper() + "_DIRECTORY"] = ":".join(map(str, paths))
    return variables
