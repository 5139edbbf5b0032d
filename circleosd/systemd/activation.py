"""Sockets that the service manager passes to a service (sd_listen_fds(3))."""

from __future__ import annotations

import socket

from systemd.daemon import listen_fds

from circleosd.errors import Unavailable


def listening_socket() -> socket.socket:
    """The one listening Unix socket that this process was started with. Raises `Unavailable` if there is none."""
    descriptors = listen_fds(True)
    if len(descriptors) != 1:
        raise Unavailable(
            "no socket was passed to this service; start it by systemctl start circleosd.target, or by circleosd up"
        )
    return socket.socket(fileno=descriptors[0])
