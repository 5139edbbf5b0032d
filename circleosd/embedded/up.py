"""`circleosd up`: the supervisor and its sockets, in the foreground."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from shlex import quote

from circleosd.config import ServerSettings
from circleosd.embedded.control import Control
from circleosd.embedded.sockets import bound, listens
from circleosd.embedded.supervisor import Supervisor
from circleosd.errors import BadRequest, Conflict, UnitFailed
from circleosd.paths import SERVICES, UNMAPPED, home, runtime_dir, socket_path
from circleosd.server import Server
from circleosd.systemd.notify import Notifier

log = logging.getLogger(__name__)

TARGET = "circleosd.target"
MOST = 1 << 16  # connections, all of one uid: the registry's, which opens one per question and limits those
MAX_LINE = 16 << 20  # bytes: the registry asks about all units of the catalog at once, whose files may have 1 MiB each


async def run(runtime: Path, state: Path, cache: Path, places: Sequence[Path]) -> None:
    """Supervise until SIGINT, SIGTERM or, unless nohup(1) ignores it, SIGHUP.

    Sockets are in `runtime`, persistent files in `state` and `cache`, unit files in `places`. Raises OSError,
    `BadRequest` for a path that is too long or in the hands of another user, `Conflict` if another supervisor is
    running there.
    """
    os.umask(0o077)
    control_path, notify_path = socket_path("supervisor", str(runtime)), socket_path("notify", str(runtime))
    for directory in (state, cache):
        _make(directory)
    ours = Notifier()
    _set_environment(control_path, notify_path)
    specifiers = {
        "t/circleosd": str(runtime), "t": str(runtime.parent), "S": str(state), "C": str(cache),
    }  # fmt: skip
    if own := home(os.environ):
        specifiers["h"] = own
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    with (
        _held(runtime),
        bound(control_path, socket.SOCK_STREAM) as control,
        bound(notify_path, socket.SOCK_DGRAM) as notify,
    ):
        supervisor = Supervisor(specifiers, places)
        notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        loop.add_reader(notify, supervisor.notified, notify)
        control.listen()
        settings = ServerSettings(idle_exit=0, max_connections=MOST, max_connections_per_uid=MOST)
        server = Server(Control(supervisor), control, settings, max_line=MAX_LINE, manager=ours)
        serving = asyncio.create_task(server.run())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                loop.add_signal_handler(number, told.set)
        try:
            for name in supervisor.file(TARGET).words("Unit", "Wants"):
                if await supervisor.job("start", name) != "done":
                    raise UnitFailed(f"cannot start {name}")
            log.info("listening below %s%s; stop with Ctrl-C", runtime, found_with(str(runtime), os.environ))
            await told.wait()
        finally:
            await supervisor.stop()
            server.stop()
            await serving
            loop.remove_reader(notify)


def _set_environment(control: str, notify: str) -> None:
    """Set what the services inherit: how they reach the supervisor, not how we reach our own service manager."""
    for key in [key for key in os.environ if key.startswith(("LISTEN_", "WATCHDOG_"))]:
        del os.environ[key]
    os.environ.update(CIRCLEOSD_SUPERVISOR=control, NOTIFY_SOCKET=notify)
    # Our own programs are next to the interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"


def found_with(runtime: str, env: Mapping[str, str]) -> str:
    """The option that circlectl needs to find `runtime`, as the end of a sentence; empty if it needs none."""
    how = f"CIRCLEOSD_RUNTIME_DIR={quote(runtime)}"
    with contextlib.suppress(BadRequest):  # if there is no home directory
        if runtime == runtime_dir(env):
            return ""
        if runtime == runtime_dir(env, "user"):
            how = "--scope user"
    return f", where circlectl finds it with {how}"


def _make(directory: Path) -> None:
    """Make a directory unless it exists.

    Raises `BadRequest` if it, or the one in which it would have to be made, belongs to a user other than root: that
    user could replace the sockets in it and be told passwords, or change what CircleOSD has stored.
    """
    there, missing = directory.absolute(), list[Path]()
    while not os.path.lexists(there):
        missing.append(there)
        there = there.parent

    def check(place: Path) -> None:
        for found in (place.lstat(), place.stat()):
            if found.st_uid not in (0, os.getuid(), UNMAPPED):
                why = f"{place} belongs to uid {found.st_uid}"
                raise BadRequest(f"cannot run CircleOSD at {directory}: {why}; choose another directory")

    check(there)
    directory.mkdir(parents=True, exist_ok=True)
    for place in missing:
        check(place)  # in /tmp, somebody else may have made it by now


@contextlib.contextmanager
def _held(runtime: Path) -> Iterator[None]:
    """Keep other supervisors out of a directory, which is removed in the end if it was created here and is empty.

    Otherwise, a remaining /run/circleosd would be taken for the system's (`paths.runtime_dir`). Raises `Conflict`, also
    if systemd is listening there: its sockets would be replaced, and then gone while their units stay active.
    """
    made = not runtime.exists()
    _make(runtime)
    taken = Conflict(f"CircleOSD is already running at {runtime}")
    lock = os.open(runtime, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise taken from None
    try:
        if any(listens(socket_path(service, str(runtime))) for service in SERVICES):
            raise taken
        yield
    finally:
        if made:
            for directory, _, _ in os.walk(runtime, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
        os.close(lock)
