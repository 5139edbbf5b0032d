"""Boot a root file system as a throw-away container with systemd as PID 1.

Nothing but root, systemd and util-linux is needed. The container has namespaces and cgroups of its own, and
no network but its loopback; what it writes goes to a tmpfs that lasts, over reboots, until it is closed. The
work is done by a `keeper`, a process that ends with the one that made the `Container`, however that ends.
"""

import dataclasses
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.systemd import cgroups, keeper

CAP_SYS_ADMIN = 21
UNIFIED_ONLY = 258  # the first systemd that knows cgroup version 2 alone
POWER_OFF = signal.SIGRTMIN + 4  # systemd(1), "Signals"
COMMANDS = "commands"  # the part of a container's cgroups that `Container.run` uses
BOOTED = ("running", "degraded")
NEEDED = {
    keeper.INIT.lstrip("/"): "systemd",
    "usr/share/dbus-1/system.conf": "dbus",
    "usr/lib/polkit-1/polkitd": "polkitd",
}
ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "LOGNAME": "root",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "USER": "root",
}
# On the machine: join the cgroups listed in $0, which systemd may have removed, then the namespaces.
ENTER = """
for group in $0; do
    until [ -d "$group" ] || mkdir "$group" && echo $$ >"$group/cgroup.procs"; do
        [ $((tries += 1)) -lt 10 ] || exit 125
    done
done
exec nsenter "$@"
"""
# Inside: become the user $0 as a login would, with the runtime directory that a login or lingering has made.
BECOME = """
uid=$(id -u "$0") && gid=$(id -g "$0") || exit 125
[ ! -d "/run/user/$uid" ] || set -- XDG_RUNTIME_DIR="/run/user/$uid" "$@"
exec setpriv --reuid "$uid" --regid "$gid" --init-groups --reset-env env LANG=C.UTF-8 "$@"
"""


class BootError(Exception):
    """The container did not boot, or did not end; the message holds what systemd said."""


def why_not(lower: str = "/") -> str | None:
    """Why no container of `lower` can run here; None if one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "booting a container needs root on Linux"
    if Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]:
        return "booting a container needs the machine's root, not that of a user namespace"
    capabilities = re.search(r"^CapEff:\s*(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if capabilities is None or not int(capabilities[1], 16) >> CAP_SYS_ADMIN & 1:
        return "booting a container needs CAP_SYS_ADMIN, which this root lacks"
    for path, package in NEEDED.items():
        if not Path(lower, path).exists():
            return f"there is no {package} in {lower} (no {path}); install it there"
    if not shutil.which("nsenter"):
        return "there is no nsenter; install util-linux"
    hierarchies = cgroups.hierarchies()
    if "" not in hierarchies or (not cgroups.unified() and "name=systemd" not in hierarchies):
        return f"the cgroup hierarchies that systemd needs are not mounted below {cgroups.MOUNTED}"
    for top in hierarchies.values():
        if not os.access(top, os.W_OK):
            return f"{top} is read-only: no cgroup can be made for a container"
    return None


def systemd_version(lower: str) -> int:
    """The version of the systemd in a root file system, by the name of its library; 0 if there is none."""
    usr = Path(lower, "usr")
    libraries = [
        *usr.glob("lib*/systemd/libsystemd-shared-*"),
        *usr.glob("lib*/*/systemd/libsystemd-shared-*"),
    ]
    found = [re.search(r"libsystemd-shared-(\d+)", library.name) for library in libraries]
    return max((int(match[1]) for match in found if match), default=0)


def leftovers(name: str) -> list[str]:
    """What there is of the containers called `name`: a line for each process, cgroup and visible mount."""
    label = cgroups.label(name)
    found = [f"cgroup {path}" for path in cgroups.leaves(name)]
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    found += [f"mount {line}" for line in mounts if label in line]
    for process in Path("/proc").glob("[0-9]*"):
        for file in ("cmdline", "cgroup", "mountinfo"):
            try:
                text = (process / file).read_bytes()
            except (OSError, ProcessLookupError):
                break  # it has ended
            if label.encode() in text:
                found.append(f"process {process.name} ({file})")
                break
    return found


class Container:
    """A root file system and the systemd that boots on it, as often as wanted; a context manager.

    `name` is of lower-case letters, digits and hyphens. `lower` is a directory, which stays as it is. `binds`
    maps directories of the machine to where they appear inside, read-only. `unified`: whether systemd sees
    cgroup version 2 alone; None: if the machine has, or its systemd knows, no other. What the container's
    state forbids raises BootError.
    """

    def __init__(
        self,
        name: str,
        lower: str = "/",
        binds: Mapping[str, str] | None = None,
        *,
        unified: bool | None = None,
    ) -> None:
        if not re.fullmatch(r"[a-z0-9-]+", name):
            raise ValueError(f"not a container's name: {name!r}")
        lower = str(Path(lower).absolute())
        if re.search(r"[,:\\]", lower):
            raise ValueError(f"overlayfs takes no comma, colon or backslash: {lower!r}")
        if unified is None:
            unified = cgroups.unified() or systemd_version(lower) >= UNIFIED_ONLY
        absolute = {str(Path(source).absolute()): target for source, target in (binds or {}).items()}
        spec = keeper.Spec(name, lower, absolute, unified, os.getpid())
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (close() closes it)
        self._keeper = subprocess.Popen(
            [sys.executable, "-E", "-S", "-m", keeper.__name__, json.dumps(dataclasses.asdict(spec))],
            cwd=Path(keeper.__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        self._pid = 0
        self._init: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def booted(self) -> bool:
        """Whether its systemd runs; it may still be booting, or on its way down."""
        return self._init is not None and not self._ends_within(0)

    def boot(self, timeout: float = 90) -> str:
        """Boot, and return systemd's state: "running", or "degraded" when a unit has failed."""
        deadline = time.monotonic() + timeout
        if self.booted:
            raise BootError(f"container {self.name} is running already")
        self._forget()
        assert self._keeper.stdin
        assert self._keeper.stdout
        try:
            os.write(self._keeper.stdin.fileno(), b"boot\n")
            answer = self._keeper.stdout.readline().decode().strip()
        except BrokenPipeError:
            answer = ""
        if not answer.isdigit():
            raise BootError(answer or f"cannot boot {self.name}: its keeper has ended{self._printed()}")
        self._pid = int(answer)
        try:
            self._init = os.pidfd_open(self._pid)
        except ProcessLookupError:
            raise BootError(f"container {self.name} ended as soon as it began{self._printed()}") from None
        state = "not reachable"
        while (left := deadline - time.monotonic()) > 0 and self.booted:
            try:
                state = self.run(["systemctl", "is-system-running"], timeout=left).stdout.strip() or state
            except subprocess.TimeoutExpired:
                break
            if state in BOOTED:
                return state
            self._ends_within(0.02)
        how = f"is {state} after {timeout:g} s" if self.booted else "has ended while booting"
        raise BootError(f"container {self.name} {how}{self._printed()}")

    def run(
        self,
        argv: Sequence[str],
        input: str | bytes = b"",
        timeout: float | None = 60,
        user: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, by its PATH, as root or as `user`, in "/" and with a clean environment.

        It is over when everything that holds its output has closed it. After `timeout` seconds, or by an
        exception, its process group is killed; subprocess.TimeoutExpired has the output so far, as bytes.
        """
        if not self.booted:
            raise BootError(f"container {self.name} is not running")
        leaf = cgroups.leaf_name(self.name, self._keeper.pid)
        groups = [f"{top}/{leaf}/{COMMANDS}" for top in cgroups.hierarchies().values()]
        namespaces = [f"--{kind}" for kind in ("mount", "uts", "ipc", "net", "pid", "cgroup")]
        enter = ["/bin/sh", "-c", ENTER, " ".join(groups), f"--target={self._pid}", *namespaces, "--"]
        become = ["/bin/sh", "-c", BECOME, user] if user else []
        with subprocess.Popen(
            [*enter, *become, *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            start_new_session=True,
        ) as process:
            try:
                given = input.encode() if isinstance(input, str) else input
                output, errors = process.communicate(given, timeout)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(
            list(argv), process.returncode, output.decode(errors="replace"), errors.decode(errors="replace")
        )

    def shutdown(self, timeout: float = 120) -> None:
        """Have systemd power off, and wait. The next boot finds what was written, but for /run and /tmp."""
        self._end(POWER_OFF, timeout)

    def crash(self) -> None:
        """Kill every process at once, as a power failure would, except that all that was written is kept."""
        self._end(signal.SIGKILL, 30)

    def close(self) -> None:
        """End the container for good, and remove every trace of it, with what it has written."""
        if self._log.closed:
            return
        self._forget()
        self._keeper.communicate(timeout=60)
        printed = self._printed()
        self._log.close()
        if self._keeper.returncode != 0:
            raise BootError(f"cannot remove container {self.name} wholly{printed}")

    def _end(self, number: int, timeout: float) -> None:
        if self._init is None:
            raise BootError(f"container {self.name} is not running")
        if not self._ends_within(0):
            signal.pidfd_send_signal(self._init, number)
        if not self._ends_within(timeout):
            raise BootError(f"container {self.name} still runs after {timeout:g} s{self._printed()}")
        self._forget()

    def _ends_within(self, seconds: float) -> bool:
        return self._init is None or bool(select.select([self._init], [], [], seconds)[0])

    def _forget(self) -> None:
        if self._init is not None:
            os.close(self._init)
            self._init = None

    def _printed(self) -> str:
        self._log.seek(0)
        text = self._log.read().decode(errors="replace").strip()
        return f"; it printed:\n{text[-4000:]}" if text else ""
