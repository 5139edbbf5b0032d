"""Who acted: the caller as policy knows it, and what the kernel tells of its process.

Names of files and control groups need not be UTF-8, and whoever acts may choose them: bytes that are not are escaped.
"""

from __future__ import annotations

import os
import re
from typing import Any

from circleosd.policy import Caller


def actor(caller: Caller) -> dict[str, Any]:
    """Who acted, as a row keeps it. What /proc says of a process that has already ended is None.

    `unit` is the innermost systemd unit, `login` the login session of logind (sd_pid_get_session(3)), which is told by
    the outermost: units within that have names that a user's own manager chose.
    """
    peer = caller.peer
    there = _is_of(peer.pid, peer.uid)
    groups = _control_groups(peer.pid) if there else []
    units = [name for name in groups if name.endswith((".service", ".scope"))]
    login = re.fullmatch(r"session-(\w+)\.scope", units[0]) if units else None
    return {
        "uid": peer.uid,
        "gid": peer.gid,
        "pid": peer.pid,
        "exe": _executable(peer.pid) if there else None,
        "unit": units[-1] if units else None,
        "login": login[1] if login else None,
        "user": caller.user,
        "session": caller.session,
        "plugin": caller.plugin,
    }


def _link(path: str) -> str | None:
    try:
        return os.readlink(os.fsencode(path)).decode("utf-8", "backslashreplace")
    except OSError:  # the process is gone, or not ours to look at
        return None


def _executable(pid: int) -> str | None:
    """The program of a process; of another user's process only its name is ours to read, which is put in brackets."""
    if path := _link(f"/proc/{pid}/exe"):
        return path
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
            return f"[{comm.read().rstrip()}]"
    except OSError:
        return None


def _control_groups(pid: int) -> list[str]:
    """The names on a process's way down the control groups (cgroups(7)), outermost first."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="backslashreplace") as lines:
            paths = [line.rstrip("\n").split(":", 2)[2] for line in lines]
    except OSError:
        return []
    return [part for path in paths for part in path.split("/")]


def _is_of(pid: int, uid: int) -> bool:
    """Whether a process has this uid; if not, the number is another process's by now (proc_pid_status(5))."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as status:
            uids = next((line.split()[1:] for line in status if line.startswith("Uid:")), [])
    except OSError:
        return False
    return str(uid) in uids
