"""Who acted: the caller as policy knows it, and what the kernel reports about its process.

Names of files and control groups need not be UTF-8, and the actor may choose them: invalid bytes are escaped.
"""

from __future__ import annotations

import os
import re
from typing import Any

from circleosd.policy import Caller


def actor(caller: Caller) -> dict[str, Any]:
    """The actor in the form stored in a row. Fields that /proc no longer has, because the process has ended, are None.

    `unit` is the innermost systemd unit, after the outermost one if that is another, as in
    `user@1000.service/sshd.service`: the names of the units within it are chosen by its owner. `login` is the login
    session of logind (sd_pid_get_session(3)), taken from the outermost unit.
    """
    peer = caller.peer
    there = _is_of(peer.pid, peer.uid)
    groups = _control_groups(peer.pid) if there else []
    # A process is in the same units in each hierarchy, or only in the outer ones (cgroups(7)).
    units = [*dict.fromkeys(name for name in groups if name.endswith((".service", ".scope")))]
    login = re.fullmatch(r"session-(\w+)\.scope", units[0]) if units else None
    return {
        "uid": peer.uid,
        "gid": peer.gid,
        "pid": peer.pid,
        "exe": _executable(peer.pid) if there else None,
        "unit": "/".join(dict.fromkeys((units[0], units[-1]))) if units else None,
        "login": login[1] if login else None,
        "user": caller.user,
        "session": caller.session,
        "plugin": caller.plugin,
    }


def _link(path: str) -> str | None:
    try:
        return os.readlink(os.fsencode(path)).decode("utf-8", "backslashreplace")
    except OSError:  # the process is gone, or we may not inspect it
        return None


def _executable(pid: int) -> str | None:
    """The program of a process. For a process of another user, we can read only its name, which is put in brackets."""
    if path := _link(f"/proc/{pid}/exe"):
        return path
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
            return f"[{comm.read().rstrip()}]"
    except OSError:
        return None


def _control_groups(pid: int) -> list[str]:
    """The names of the control groups that contain a process (cgroups(7)), outermost first."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="backslashreplace") as lines:
            paths = [line.rstrip("\n").split(":", 2)[2] for line in lines]
    except OSError:
        return []
    return [part for path in paths for part in path.split("/")]


def _is_of(pid: int, uid: int) -> bool:
    """Whether a process has this uid; if not, its pid now belongs to another process (proc_pid_status(5))."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as status:
            uids = next((line.split()[1:] for line in status if line.startswith("Uid:")), [])
    except OSError:
        return False
    return str(uid) in uids
