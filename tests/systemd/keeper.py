"""The process that keeps one test container: its overlay, its cgroups and its PID 1.

`container.Container` starts it, with the JSON of a `Spec` as argument. It lives in a mount namespace of its
own, so that the machine sees none of its mounts. Each line "boot" on standard input boots the container, and
is answered by a line on standard output: the PID of its systemd, or "cannot ...". When standard input closes
or its owner has ended, it kills the container, removes its cgroups and ends. When it is itself killed, the
kernel kills the container (PR_SET_PDEATHSIG), and the next keeper to start removes the cgroups.
"""

import ctypes
import dataclasses
import json
import os
import select
import shutil
import signal
import stat
import sys
import uuid
from pathlib import Path

from tests.systemd import cgroups

INIT = "/lib/systemd/systemd"
# Every Linux has this directory, and a tmpfs on it hides nothing that a container could be made of.
STORE = Path("/proc/fs")
DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
# The machine's own: CAP_SYS_MODULE, CAP_SYS_RAWIO, CAP_SYS_TIME, CAP_AUDIT_CONTROL, CAP_AUDIT_READ.
WITHHELD = (16, 17, 25, 30, 37)

# mount(2), umount2(2)
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND = 0x1, 0x2, 0x4, 0x8, 0x20, 0x1000
REC, PRIVATE, SHARED = 0x4000, 0x40000, 0x100000
QUIET = NOSUID | NODEV | NOEXEC
DETACH = 2
# unshare(2), setns(2)
NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEWPID, NEWNET = 0x20000000, 0x40000000
# prctl(2)
SET_PDEATHSIG, CAPBSET_DROP = 1, 24

_libc = ctypes.CDLL(None, use_errno=True)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What `Container` is asked for, and in `owner` the PID of the process that asks."""

    name: str
    lower: str
    binds: dict[str, str]
    unified: bool
    owner: int


def _call(function: str, *arguments: int | bytes | ctypes.c_ulong | None) -> None:
    if getattr(_libc, function)(*arguments) != 0:
        number = ctypes.get_errno()
        paths = " ".join(os.fsdecode(each) for each in arguments if isinstance(each, bytes))
        raise OSError(number, f"{function} {paths}: {os.strerror(number)}")


def _mount(source: str | Path, target: Path, kind: str = "none", flags: int = 0, options: str = "") -> None:
    if not target.exists():
        target.mkdir(parents=True)
    what, where = os.fsencode(source), os.fsencode(target)
    _call("mount", what, where, kind.encode(), ctypes.c_ulong(flags), options.encode())


def _bind_read_only(source: Path, target: Path) -> None:
    _mount(source, target, flags=BIND)
    _mount("none", target, flags=REMOUNT | BIND | RDONLY | NOSUID | NODEV)


def _open_store(leaf: str) -> None:
    """Leave the machine's mounts for a copy of them, with a tmpfs that lasts as long as this process."""
    _call("unshare", NEWNS)
    _mount("none", Path("/"), flags=PRIVATE | REC)
    _mount(leaf, STORE, "tmpfs", options="mode=755")
    for part in ("upper", "work", "root"):
        (STORE / part).mkdir()


def _enter_root(spec: Spec, leaf: str) -> None:
    """Make the overlay over `lower` this process's root; the machine's stays mounted on top of it, at "."."""
    root, upper, work = STORE / "root", STORE / "upper", STORE / "work"
    first_boot = not any(upper.iterdir())
    _mount(leaf, root, "overlay", options=f"lowerdir={spec.lower},upperdir={upper},workdir={work},index=off")
    os.chdir(root)
    _call("pivot_root", b".", b".")  # pivot_root(2), NOTES
    if first_boot:
        _forget_the_machine()


def _forget_the_machine() -> None:
    """Take out of the root file system what the machine has enabled, mounts, is called and has logged."""
    for directory in (Path("/etc/systemd/system"), Path("/var/log/journal")):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    for file in ("/etc/fstab", "/etc/machine-id", "/var/lib/dbus/machine-id"):
        Path(file).unlink(missing_ok=True)
    Path("/etc/fstab").touch()
    Path("/etc/machine-id").touch()  # missing, it would mean a first boot, which enables every preset


def _mount_cgroups(hierarchies: dict[str, Path]) -> None:
    top = cgroups.MOUNTED
    if not hierarchies:
        _mount("cgroup2", top, "cgroup2", QUIET)
        return
    _mount("tmpfs", top, "tmpfs", QUIET, "mode=755")
    for options, path in hierarchies.items():
        _mount("cgroup", path, "cgroup" if options else "cgroup2", QUIET, options)
        for controller in set(options.split(",")) - {path.name, "", "name=systemd"}:
            (top / controller).symlink_to(path.name)
    # Read-only, or systemd mounts the remaining hierarchies too, whose root in here is the machine's.
    _mount("tmpfs", top, "tmpfs", QUIET | REMOUNT | RDONLY, "mode=755")


def _mount_dev() -> None:
    dev = Path("/dev")
    _mount("tmpfs", dev, "tmpfs", NOSUID, "mode=755")
    for name, numbers in DEVICES.items():
        os.mknod(dev / name, stat.S_IFCHR | 0o666, os.makedev(*numbers))
        (dev / name).chmod(0o666)
    for name, target in {"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"}.items():
        (dev / name).symlink_to(f"/proc/self/fd{target}")
    _mount("tmpfs", dev / "shm", "tmpfs", NOSUID | NODEV, "mode=1777")
    _mount("devpts", dev / "pts", "devpts", NOSUID | NOEXEC, "newinstance,mode=620,ptmxmode=666,gid=5")
    (dev / "ptmx").symlink_to("pts/ptmx")


def _mount_all(hierarchies: dict[str, Path], binds: dict[str, int]) -> None:
    """Mount what systemd expects: cgroup hierarchies, or version 2 alone; and `binds`, from descriptors."""
    _mount("proc", Path("/proc"), "proc", QUIET)
    for knobs in (Path("/proc/sys"), Path("/proc/sysrq-trigger")):  # they are the machine's
        if knobs.exists():
            _bind_read_only(knobs, knobs)
    _mount("sysfs", Path("/sys"), "sysfs", QUIET | RDONLY)
    _mount_cgroups(hierarchies)
    _mount_dev()
    _mount("tmpfs", Path("/run"), "tmpfs", NOSUID | NODEV, "mode=755")
    _mount("tmpfs", Path("/tmp"), "tmpfs", NOSUID | NODEV, "mode=1777")
    generators = Path("/run/systemd/system-generators")
    generators.mkdir(parents=True)
    # What /etc/rc?.d starts is what the machine has enabled, too.
    (generators / "systemd-sysv-generator").symlink_to("/dev/null")
    for target, descriptor in binds.items():
        _bind_read_only(Path(f"/proc/self/fd/{descriptor}"), Path(target))


def _become_init(spec: Spec, leaf: str) -> None:
    """Turn this process, the first of a new PID namespace, into the container's systemd."""
    _call("prctl", SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # Before systemd starts: in a root cgroup, it would move every process of the machine into its own.
    hierarchies = cgroups.hierarchies()
    for top in hierarchies.values():
        (top / leaf / "cgroup.procs").write_text("0")
    _call("unshare", NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWNET)
    os.umask(0o022)
    boot_id = STORE / "boot_id"
    boot_id.write_text(f"{uuid.uuid4()}\n")
    binds = {target: os.open(source, os.O_PATH) for source, target in spec.binds.items()}
    binds["/proc/sys/kernel/random/boot_id"] = os.open(boot_id, os.O_PATH)  # journalctl --boot goes by it
    _enter_root(spec, leaf)
    _mount_all({} if spec.unified else hierarchies, binds)
    _call("umount2", b".", DETACH)
    os.chdir("/")
    _mount("none", Path("/"), flags=SHARED | REC)  # LoadCredential= fails without
    for capability in WITHHELD:
        _call("prctl", CAPBSET_DROP, capability, 0, 0, 0)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(2, 1)
    command = ["systemd", "--system", "--unit=multi-user.target", "--show-status=no"]
    if not spec.unified:
        # systemd 256 uses version 1 only if the kernel's command line says so; in here, that is PID 1's.
        command += ["systemd.unified_cgroup_hierarchy=0", "SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1"]
    os.execve(INIT, command, {"container": cgroups.PREFIX})


class _Keeper:
    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._leaf = cgroups.leaf_name(spec.name, os.getpid())
        self._owner = os.pidfd_open(spec.owner)
        self._pid = 0  # of the container's systemd; 0: not running
        self._init = -1  # a pidfd of the same
        _open_store(self._leaf)

    def serve(self) -> None:
        """Obey standard input until it closes or the owner dies; the container ends with it."""
        try:
            while True:
                running = [self._init] if self._pid else []
                ready, _, _ = select.select([0, self._owner, *running], [], [])
                if self._init in ready:
                    self._bury()
                if self._owner in ready or (0 in ready and not os.read(0, 64)):
                    return
                if 0 in ready:
                    try:
                        answer = str(self._boot())
                    except OSError as error:
                        answer = f"cannot boot {self._spec.lower}: {error}"
                    os.write(1, f"{answer}\n".encode())
        finally:
            if self._pid:
                signal.pidfd_send_signal(self._init, signal.SIGKILL)
            self._bury()

    def _bury(self) -> None:
        """Reap the container's systemd, which ends after all others there, and remove its cgroups."""
        if self._pid:
            os.waitpid(self._pid, 0)
            os.close(self._init)
            self._pid, self._init = 0, -1
        for top in cgroups.hierarchies().values():
            cgroups.remove(top / self._leaf)

    def _boot(self) -> int:
        """Start the container's systemd and return its PID once it has its own root. Raises OSError."""
        for top in cgroups.hierarchies().values():
            (top / self._leaf).mkdir()
        report, tell = os.pipe()  # both close at the exec
        with open("/proc/self/ns/pid", "rb") as own:
            _call("unshare", NEWPID)
            pid = os.fork()
            if pid == 0:
                try:
                    _become_init(self._spec, self._leaf)
                except BaseException as error:  # noqa: BLE001  # told to the parent, whatever it is
                    os.write(tell, (str(error) or repr(error)).encode())
                finally:
                    os._exit(1)
            _call("setns", own.fileno(), NEWPID)
        os.close(tell)
        self._pid, self._init = pid, os.pidfd_open(pid)
        with open(report, "rb") as end:
            problem = end.read().decode()
        if problem:
            self._bury()
            raise OSError(problem)
        return pid


if __name__ == "__main__":
    cgroups.sweep()
    _Keeper(Spec(**json.loads(sys.argv[1]))).serve()
