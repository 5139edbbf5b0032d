"""The worker process: takes its socket, loads one plugin, and serves its manager until that closes the connection.

Started as `circleosd worker NAME` with the listening socket as descriptor 3 (sd_listen_fds(3)). The exit status is 0
after the manager has closed the connection, 1 if it violated the protocol or no socket was passed, `NO_MEMORY` if out
of memory.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from circleosd.activation import passed_socket
from circleosd.worker.channel import Channel
from circleosd.worker.frames import FAILED, LOAD, Failed, FrameError, failed_body, parse_load
from circleosd.worker.limits import NO_MEMORY, forget_environment, settle


def main(name: str) -> NoReturn:
    """`name` is the unit's instance name, for messages; the manager says what to run.

    Does not run code of a native plugin at the end, as exit(3) would: it could hang, and nothing limits its time then.
    """
    status = _main(name)
    sys.stderr.flush()
    os._exit(status)


def _main(name: str) -> int:
    try:
        listener = passed_socket(os.environ, os.getpid())
        # First: otherwise a failed worker would be restarted over and over for the waiting connection.
        connection, _ = listener.accept()
        listener.close()
        serve(Channel(connection))
        return 0
    except (BrokenPipeError, ConnectionResetError):
        return 0
    except MemoryError:
        return NO_MEMORY
    except (FrameError, OSError) as exc:
        print(f"cannot serve the plugin {name}: {exc}", file=sys.stderr)
        return 1


def serve(channel: Channel) -> None:
    """Serves one connection. Raises `FrameError` or OSError if the manager disconnects or errs.

    If this machine lacks something that a worker needs, the manager is told so: this is not the plugin's fault.
    """
    frame, descriptors = channel.receive_first()
    if frame is None:
        return
    if frame.kind != LOAD:
        raise FrameError("the first frame is not LOAD")
    load = parse_load(frame.body)
    try:
        settle()
        forget_environment()
        # Not before there is something to load: imports are most of the start, and the manager may disconnect.
        from circleosd.worker.session import begin

        session = begin(channel, load, descriptors)
    except (OSError, ImportError) as exc:
        print(f"cannot serve the plugin {load.name}: {exc}", file=sys.stderr)
        channel.send(FAILED, 0, failed_body(Failed("unavailable", f"its worker cannot continue: {exc}", [])))
        return
    if session is not None:
        session.serve()
