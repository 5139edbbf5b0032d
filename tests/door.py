"""Requests as other Unix users, over the real sockets. Needs root; imports nothing beyond the standard library.

As a program, `python3 door.py RUNTIME_DIR`, it reads requests from standard input and prints the replies, each one JSON
line; so a test on a booted machine can have many answered with one command. A request is `[UID, SERVICE, {…}]`.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import socket
import sys
from collections.abc import Iterator
from typing import Any

Asked = tuple[int, str, dict[str, Any]]


@contextlib.contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """Be another user: SO_PEERCRED tells the effective ids of who connects (unix(7))."""
    if uid == os.geteuid():
        yield
        return
    groups, gid = os.getgroups(), os.getegid()
    try:
        known = pwd.getpwuid(uid)
        os.initgroups(known.pw_name, known.pw_gid)
        os.setegid(known.pw_gid)
    except KeyError:  # a uid without a name will do
        os.setgroups([])
        os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(gid)
        os.setgroups(groups)


def answer(runtime: str, asked: Asked, timeout: float = 30.0) -> dict[str, Any]:
    """Send one request and return the first reply."""
    uid, service, request = asked
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        with acting_as(uid):
            sock.connect(f"{runtime}/{service}.sock")
        sock.sendall(json.dumps(request).encode() + b"\n")
        with sock.makefile("rb") as replies:
            reply: dict[str, Any] = json.loads(replies.readline())
    return reply


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(sys.argv[1], json.loads(line))), flush=True)
