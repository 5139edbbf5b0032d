"""The socket that a service manager passes to a process (sd_listen_fds(3)).

systemd-python can do this too, but would load all of libsystemd at each start, for three variables.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

FIRST = 3  # SD_LISTEN_FDS_START


def passed_socket(environment: Mapping[str, str], pid: int) -> socket.socket:
    """The only listening socket that was passed to the process `pid`. Raises OSError if there is none."""
    if environment.get("LISTEN_PID") != str(pid) or environment.get("LISTEN_FDS") != "1":
        raise OSError("no socket was passed; start it through its socket unit or with circleosd up")
    os.set_inheritable(FIRST, False)
    return socket.socket(fileno=FIRST)
