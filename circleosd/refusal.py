"""A service that cannot start tells waiting clients why, instead of letting them wait."""

from __future__ import annotations

import contextlib
import socket
import time

from circleosd import wire
from circleosd.errors import CircleError
from circleosd.passing import PassingSocket

# Each connection starts the service again, and a socket unit gives up after 20 starts in 2 s (TriggerLimitBurst=,
# systemd.socket(5)): one start answers for this long.
SECONDS = 2.0
PATIENCE = 0.1  # seconds for a request to arrive; a client may not look for an answer before it has sent one


def refuse(listener: socket.socket, error: CircleError | None, *, seconds: float = SECONDS) -> None:
    """Answer every connection with `error`, or with nothing, and close it, until the time is over. Blocks."""
    reply = wire.failure(error) if error else b""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            accepted, _ = listener.accept()
        except OSError:  # the time is over, or no descriptor is left
            time.sleep(PATIENCE)
            continue
        with PassingSocket(accepted) as peer, contextlib.suppress(OSError):  # the client may have gone
            peer.settimeout(PATIENCE)
            with contextlib.suppress(TimeoutError):
                peer.recv(1)
            peer.sendall(reply)
