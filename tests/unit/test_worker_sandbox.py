"""The system call filter, decided as the kernel would: seccomp(2)'s classic BPF, interpreted."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
import termios
from pathlib import Path
from typing import Any, cast

import pytest

from circleosd.worker import sandbox

PID = 4711
ALLOW, KILL = 0x7FFF0000, 0x80000000
EPERM, ENOSYS = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
# openat, read, mmap, futex, prlimit64 (lowering limits): what an interpreter needs.
ORDINARY = {"x86_64": (257, 0, 9, 202, 302), "aarch64": (56, 63, 222, 98, 261)}
HEADERS = {"x86_64": "x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}  # below /usr/include
REFUSED = """
fork vfork execve execveat ptrace process_vm_readv process_vm_writev tkill rt_sigqueueinfo rt_tgsigqueueinfo
pidfd_send_signal pidfd_getfd socket socketpair connect bind mount umount2 pivot_root chroot open_tree
move_mount fsopen fsconfig fsmount mount_setattr setns unshare open_by_handle_at bpf perf_event_open userfaultfd
io_uring_setup io_setup inotify_init inotify_init1 fanotify_init keyctl add_key request_key init_module
finit_module delete_module kexec_load kexec_file_load syslog reboot swapon swapoff acct quotactl sethostname
setdomainname settimeofday clock_settime adjtimex clock_adjtime setpriority ioprio_set process_madvise
migrate_pages move_pages truncate chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes
futimesat utimensat setxattr lsetxattr fsetxattr setxattrat removexattr lremovexattr fremovexattr removexattrat
file_setattr shmget shmat shmctl semget semop semctl semtimedop msgget msgsnd msgrcv msgctl mq_open mq_unlink
"""


def decide(machine: str, number: int, argument: int = 0, architecture: int | None = None, second: int = 0) -> int:
    """What the filter returns for one system call on that machine."""
    own, column = MACHINES[machine]
    data = struct.pack("=iIQQQQQQQ", number, architecture or own, 0, argument, second, 0, 0, 0, 0)
    program = sandbox._filter(own, column, pid=PID)
    instructions = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        code, if_true, if_false, value = instructions[at]
        at += 1
        if code == 0x20:
            accumulator = int.from_bytes(data[value : value + 4], "little")
        elif code == 0x06:
            return int(value)
        else:
            taken = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            at += if_true if taken else if_false


@pytest.mark.parametrize("machine", list(MACHINES))
def test_every_call_that_is_listed_is_refused_and_ordinary_ones_are_not(machine: str) -> None:
    column = MACHINES[machine][1]
    for numbers in sandbox._REFUSED.values():
        number = numbers[column]
        if number is not None:
            assert decide(machine, number) == EPERM
    for number in ORDINARY[machine]:
        assert decide(machine, number) == ALLOW


@pytest.mark.parametrize("machine", list(MACHINES))
def test_calls_have_the_numbers_of_the_kernels_headers(machine: str) -> None:
    header = Path("/usr/include") / HEADERS[machine]
    if not header.exists():
        pytest.skip(f"there is no {header} (linux-libc-dev)")
    found = dict(re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", header.read_text(), re.MULTILINE))
    numbers = {name: int(number) for name, number in found.items()}
    known = [name for name in REFUSED.split() if name in numbers]
    assert len(known) > 70  # the headers may be older than some, and not every machine has every call
    assert [name for name in known if decide(machine, numbers[name]) != EPERM] == []
    for name in sandbox._SELF_ONLY:
        assert decide(machine, numbers[name], PID) == ALLOW
        assert decide(machine, numbers[name], 1) == EPERM
    assert decide(machine, numbers["fcntl"], 0, second=8) == EPERM  # F_SETOWN
    assert decide(machine, numbers["ioctl"], 0, second=0x5412) == EPERM  # TIOCSTI
    assert decide(machine, numbers["clone"], 17) == EPERM
    assert decide(machine, numbers["clone3"]) == ENOSYS


@pytest.mark.parametrize("machine", list(MACHINES))
def test_threads_may_be_made_and_processes_not(machine: str) -> None:
    clone = sandbox._CLONE[MACHINES[machine][1]]
    assert decide(machine, clone, 0x10000 | 0x100) == ALLOW
    assert decide(machine, clone, 17) == EPERM
    assert decide(machine, 435) == ENOSYS


@pytest.mark.parametrize("machine", list(MACHINES))
def test_signals_limits_and_turns_are_those_of_the_process_itself(machine: str) -> None:
    for name, numbers in sandbox._SELF_ONLY.items():
        number = numbers[MACHINES[machine][1]]
        assert decide(machine, number, PID) == ALLOW
        assert decide(machine, number, 0) == (EPERM if "kill" in name else ALLOW), name
        assert decide(machine, number, 1) == EPERM
        assert decide(machine, number, 0xFFFFFFFF) == EPERM


@pytest.mark.parametrize("machine", list(MACHINES))
def test_descriptors_send_no_signals_and_keep_nobody_from_a_file(machine: str) -> None:
    fcntl = sandbox._FCNTL[0][MACHINES[machine][1]]
    for command in (8, 10, 15, 1024):  # F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE
        assert decide(machine, fcntl, 0, second=command) == EPERM
    assert decide(machine, fcntl, 0, second=1) == ALLOW  # F_GETFD


@pytest.mark.parametrize("machine", list(MACHINES))
def test_descriptors_type_on_no_terminal_and_change_no_file(machine: str) -> None:
    ioctl = sandbox._IOCTL[0][MACHINES[machine][1]]
    # TIOCSTI, TIOCLINUX, FIOSETOWN, SIOCSPGRP, FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR, BTRFS_IOC_SNAP_DESTROY
    for command in (0x5412, 0x541C, 0x8901, 0x8902, 0x40086602, 0x401C5820, 0x5000940F):
        assert decide(machine, ioctl, 0, second=command) == EPERM
    for command in (termios.TCGETS, termios.FIONREAD, termios.FIONBIO, termios.FIOCLEX):
        assert decide(machine, ioctl, 0, second=command) == ALLOW


def test_another_architectures_calls_end_the_process() -> None:
    assert decide("x86_64", 0, architecture=0x40000003) == KILL
    assert decide("x86_64", 0x40000000 | 59) == EPERM


class Kernel:
    """A kernel with Landlock that fails the system call of one number."""

    def __init__(self, failing: int = 0, why: int = errno.EINVAL) -> None:
        self.failing = failing
        self.why = why
        self.handled: tuple[int, ...] = ()  # the rights that a rule set denies: to files, to the network, the scopes
        self.calls: list[int] = []

    def syscall(self, number: int, *arguments: Any) -> int:
        self.calls.append(number)
        if number == self.failing:
            ctypes.set_errno(self.why)
            return -1
        if number != 444:  # landlock_create_ruleset
            return 0
        attributes, size, _ = arguments
        self.handled = struct.unpack(f"={size.value // 8}Q", attributes)
        return os.open("/dev/null", os.O_RDONLY)


@pytest.mark.parametrize(
    ("version", "handled"),
    [
        (1, (0x1FFF,)),
        (2, (0x3FFF,)),  # REFER
        (3, (0x7FFF,)),  # TRUNCATE
        (4, (0x7FFF, 3)),  # BIND_TCP, CONNECT_TCP
        (5, (0xFFFF, 3)),  # IOCTL_DEV
        (6, (0xFFFF, 3, 3)),  # abstract sockets, signals
        (9, (0xFFFF, 3, 3)),
    ],
)
def test_each_version_of_landlock_is_asked_for_all_that_it_knows_and_no_more(
    version: int, handled: tuple[int, ...]
) -> None:
    kernel = Kernel()
    sandbox._landlock(cast(ctypes.CDLL, kernel), version, None)
    assert kernel.handled == handled
    assert kernel.calls[-1] == 446  # landlock_restrict_self


@pytest.mark.parametrize("failing", [444, 445, 446])
def test_a_worker_that_cannot_be_confined_does_not_go_on(failing: int) -> None:
    with pytest.raises(OSError, match="cannot confine the worker: landlock failed"):
        sandbox._landlock(cast(ctypes.CDLL, Kernel(failing)), 2, None)


@pytest.mark.parametrize("why", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
def test_a_kernel_without_landlock_has_none(why: int) -> None:
    assert sandbox._landlock_version(cast(ctypes.CDLL, Kernel(444, why))) == 0


@pytest.mark.parametrize("why", [errno.ENOMEM, errno.EINVAL])
def test_a_kernel_that_cannot_tell_whether_it_has_landlock_is_not_taken_for_one_without(why: int) -> None:
    with pytest.raises(OSError, match="cannot confine the worker: landlock failed"):
        sandbox._landlock_version(cast(ctypes.CDLL, Kernel(444, why)))
