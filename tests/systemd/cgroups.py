"""The cgroups of test containers: a leaf of their own in each hierarchy, named after their keeper."""

import contextlib
import errno
import os
import signal
import time
from pathlib import Path

PREFIX = "circleosd-test"
MOUNTED = Path("/sys/fs/cgroup")
# What systemd controls by cgroup version 1, with version 2 ("") and its own hierarchy to track processes.
WANTED = frozenset({"", "name=systemd", "memory", "pids", "cpu", "devices"})


def hierarchies() -> dict[str, Path]:
    """Where each hierarchy that systemd wants is mounted, by mount options; "" is version 2 (cgroups(7))."""
    if unified():
        return {"": MOUNTED}
    options = [line.split(":")[1] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    paths = {found: MOUNTED / (found.removeprefix("name=") or "unified") for found in options}
    return {found: path for found, path in paths.items() if WANTED & set(found.split(",")) and path.is_dir()}


def unified() -> bool:
    """Whether this machine has version 2 alone."""
    return (MOUNTED / "cgroup.controllers").exists()


def label(name: str) -> str:
    """What everything of the containers called `name` is marked with."""
    return f"{PREFIX}.{name}."


def leaf_name(name: str, keeper: int) -> str:
    """What the leaves of a container are called, `keeper` being the PID of the process that keeps it."""
    return f"{label(name)}{_pid_namespace()}.{keeper}.{_start_time(keeper)}"


def leaves(name: str = "*") -> list[Path]:
    """The leaves that there are now of containers called `name`, in every hierarchy."""
    return sorted(path for top in hierarchies().values() for path in top.glob(f"{label(name)}*"))


def sweep() -> None:
    """Remove every leaf whose keeper is dead, and kill what runs in it. Raises OSError, as `remove` does."""
    for leaf in leaves():
        namespace, keeper, started = leaf.name.split(".")[-3:]
        if namespace == _pid_namespace() and _start_time(int(keeper)) != started:
            remove(leaf)


def remove(top: Path, patience: float = 10.0) -> None:
    """Kill what runs in a cgroup and below, and remove it. Raises OSError after `patience` seconds."""
    deadline = time.monotonic() + patience
    while top.is_dir():
        for directory, _, _ in os.walk(top, topdown=False):
            try:
                _kill_all(Path(directory))
                os.rmdir(directory)
            except OSError as error:
                gone = error.errno in (errno.ENOENT, errno.ENODEV)
                if not gone and (error.errno != errno.EBUSY or time.monotonic() > deadline):
                    raise
        time.sleep(0.005)


def _kill_all(cgroup: Path) -> None:
    for pid in map(int, (cgroup / "cgroup.procs").read_text().split()):
        if pid > 0:  # 0 stands for a process of a PID namespace that is not below ours; to kill(2), for our group
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _pid_namespace() -> str:
    return str(os.stat("/proc/self/ns/pid").st_ino)


def _start_time(pid: int) -> str | None:
    """When a process started, in clock ticks of uptime; None if it has ended (proc_pid_stat(5))."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]
