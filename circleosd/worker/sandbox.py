"""What the worker gives up before plugin code runs: a second line of defense if systemd's sandbox is missing.

landlock(7): no file can be written, created or removed, and only the files of the interpreter and of the system's
libraries can be read; no TCP; no signals or abstract sockets beyond the process. seccomp(2): no other process, no
program, no socket, none of the calls that administer the machine. It also denies what Landlock leaves to processes of
the same uid: signals to, limits of and priorities of other processes, modes, owners, times, attributes and leases of
files, and memory that outlives the process. And it denies what would leave less for others: asynchronous I/O, which is
limited for the whole machine, and watches of files, which with PrivateUsers= count as root's. Either is skipped, and
reported as missing, if the kernel lacks it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from pathlib import Path
from typing import Final

# Directories and files that may be read, if they exist, besides the interpreter's own and this package's.
_READABLE: Final = (
    "/usr",
    "/lib",
    "/lib64",
    "/nix/store",
    "/gnu/store",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/dev/null",
    "/dev/zero",
    "/dev/urandom",
)

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ: Final = 1 << 2 | 1 << 3
_EXECUTE: Final = 1 << 0
_FILE_RIGHTS: Final = _EXECUTE | 1 << 2
# The rights known to each version of Landlock: all are handled, that is, denied except for _READABLE.
_FS_RIGHTS: Final = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_NET_RIGHTS: Final = 3
_SCOPES: Final = 3

_SET_MODE_FILTER: Final = 1
_CLONE_THREAD: Final = 0x10000
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_AT_NUMBER, _AT_ARCHITECTURE, _AT_FIRST, _AT_SECOND = 0, 4, 16, 24

# AUDIT_ARCH_…, and the numbers of the denied calls; None if the machine has no such call.
_MACHINES: Final = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_SECCOMP: Final = (317, 277)
_CLONE: Final = (56, 220)
_CLONE3: Final = (435, 435)
# Calls whose first argument is a process, which must be this one. For all except the signals, 0 also means this one.
_SELF_ONLY: Final = {
    "kill": (62, 129),
    "tgkill": (234, 131),
    "prlimit64": (302, 261),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
}
_ZERO_IS_SELF: Final = frozenset(_SELF_ONLY) - {"kill", "tgkill"}
# Calls with many commands. For one, all are allowed except F_SETOWN, F_SETSIG, F_SETOWN_EX and F_SETLEASE: with these,
# a descriptor sends signals to others, or keeps others from opening the file. For the other, few are allowed: TCGETS,
# TCGETS2, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX. File systems have commands that change any file of the same
# uid, and terminals have some that type on them.
_FCNTL: Final = ((72, 25), (8, 10, 15, 1024))
_IOCTL: Final = ((16, 29), (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451))
_REFUSED: Final[dict[str, tuple[int | None, int | None]]] = {
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "bind": (49, 200),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "setns": (308, 268),
    "unshare": (272, 97),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_setup": (206, 0),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "syslog": (103, 116),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "setpriority": (141, 140),
    "sched_setattr": (314, 274),  # also itself: GLib tries it on its first thread, and then relies on it on others
    "ioprio_set": (251, 30),
    "process_madvise": (440, 440),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "truncate": (76, 45),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
}


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def confine(artifact: int | None = None) -> list[str]:
    """Confines this thread and those that it starts, permanently; returns the names of the mechanisms used.

    `artifact` is that of a native plugin, an open file that may be opened again, and mapped for execution. What such a
    plugin may read besides is where its process has its memory: garbage collectors look for their stack there.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    used = []
    if version := _landlock_version(libc):
        _landlock(libc, version, artifact)
        used.append(f"landlock-{version}")
    if _seccomp(libc):
        used.append("seccomp")
    return used


def _landlock_version(libc: ctypes.CDLL) -> int:
    """The version of Landlock in the kernel; 0 for none."""
    version: int = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    # EPERM: an outer filter does not know the call.
    if version < 0 and ctypes.get_errno() in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
        return 0
    return _checked(version, "landlock")


def _landlock(libc: ctypes.CDLL, version: int, artifact: int | None) -> None:
    rights = _FS_RIGHTS[min(version, 5)]
    attributes = struct.pack("=Q", rights)
    if version >= 4:
        attributes += struct.pack("=Q", _NET_RIGHTS)
    if version >= 6:
        attributes += struct.pack("=Q", _SCOPES)
    ruleset = _checked(libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0), "landlock")
    try:
        for path in _readable_paths():
            try:
                descriptor = os.open(path, os.O_PATH)
            except OSError:
                continue
            try:
                allowed = _READ | _EXECUTE if os.path.isdir(path) else _FILE_RIGHTS
                _allow(libc, ruleset, descriptor, allowed)
            finally:
                os.close(descriptor)
        if artifact is not None:
            _allow(libc, ruleset, artifact, _FILE_RIGHTS)
            # It stays open: the kernel may forget a file of /proc that is not, and the rule with it.
            _allow(libc, ruleset, os.open("/proc/self/maps", os.O_PATH), _FILE_RIGHTS)
        _checked(libc.syscall(_RESTRICT_SELF, ruleset, 0), "landlock")
    finally:
        os.close(ruleset)


def _readable_paths() -> list[str]:
    package = str(Path(__file__).resolve().parent.parent)
    return sorted({*_READABLE, sys.prefix, sys.base_prefix, sys.exec_prefix, package} - {"/"})


def _allow(libc: ctypes.CDLL, ruleset: int, descriptor: int, rights: int) -> None:
    rule = struct.pack("=Qi", rights, descriptor)
    result = libc.syscall(_ADD_RULE, ruleset, 1, rule, 0)
    # EBADFD: a memfd or the like, which is outside the file hierarchy and not restricted.
    if result < 0 and ctypes.get_errno() != errno.EBADFD:
        _checked(result, "landlock")


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"cannot confine the worker: {what} failed")
    return result


def _seccomp(libc: ctypes.CDLL) -> bool:
    machine = _MACHINES.get(os.uname().machine)
    if machine is None:
        return False
    program = _filter(*machine, pid=os.getpid())
    header = _Program(len(program) // 8, program)
    result = libc.syscall(_SECCOMP[machine[1]], _SET_MODE_FILTER, 0, ctypes.byref(header))
    # EPERM: an outer filter does not allow filters; then that one has to suffice.
    if result != 0 and ctypes.get_errno() in (errno.ENOSYS, errno.EINVAL, errno.EPERM):
        return False
    _checked(result, "seccomp")
    return True


def _filter(architecture: int, column: int, *, pid: int) -> bytes:
    """The classic BPF program of seccomp(2), for a process with that id."""
    allow, refuse = _statement(_RETURN, _ALLOW), _statement(_RETURN, _ERRNO | errno.EPERM)
    program = [
        _statement(_LOAD, _AT_ARCHITECTURE),
        _jump(_EQUAL, architecture, 1, 0),
        _statement(_RETURN, _KILL),
        _statement(_LOAD, _AT_NUMBER),
    ]
    if column == 0:
        # The x32 numbers would be a second way to every call.
        program += [_jump(_AT_LEAST, 0x40000000, 0, 1), refuse]
    for numbers in _REFUSED.values():
        number = numbers[column]
        if number is not None:
            program += [_jump(_EQUAL, number, 0, 1), refuse]
    # A filter cannot see clone3's flags; without clone3, the C library uses clone.
    program += [_jump(_EQUAL, _CLONE3[column], 0, 1), _statement(_RETURN, _ERRNO | errno.ENOSYS)]
    program += _where(_CLONE[column], _AT_FIRST, [_jump(_ANY_BIT, _CLONE_THREAD, 0, 1), allow], refuse)
    for name, numbers in _SELF_ONLY.items():
        own = [pid, 0] if name in _ZERO_IS_SELF else [pid]
        passed = [step for value in own for step in (_jump(_EQUAL, value, 0, 1), allow)]
        program += _where(numbers[column], _AT_FIRST, passed, refuse)
    for (numbers, commands), then, otherwise in ((_FCNTL, refuse, allow), (_IOCTL, allow, refuse)):
        steps = [step for value in commands for step in (_jump(_EQUAL, value, 0, 1), then)]
        program += _where(numbers[column], _AT_SECOND, steps, otherwise)
    return b"".join([*program, allow])


def _where(number: int, place: int, steps: list[bytes], otherwise: bytes) -> list[bytes]:
    """For the system call with that number: load an argument, run the steps, and end with `otherwise`."""
    body = [_statement(_LOAD, place), *steps, otherwise]
    return [_jump(_EQUAL, number, 0, len(body)), *body]


def _statement(code: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, 0, 0, value)


def _jump(code: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
