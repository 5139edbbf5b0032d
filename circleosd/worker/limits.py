"""Limits of the worker process itself, whatever runs in it: memory, descriptors, files, timers, and compilation.

setrlimit(2), setitimer(2) and prctl(2). Memory is limited by RLIMIT_DATA, which counts writable memory; RLIMIT_AS would
count the address space that Wasmtime only reserves.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import struct
from typing import Final, Literal

# How long after `limits.time` a call that could not be interrupted ends with the process. The caller's own deadline
# must be later.
GRACE: Final = 0.5

# Limit for compiling one module; a Python component of 18 MB takes 16 s on two cores.
COMPILE_SECONDS: Final = 120.0
# Less than the unit has (MemoryMax=): its limit would end the worker too, without an explanation.
COMPILE_MEMORY: Final = 1 << 30

# The exit status of a worker that is out of memory. A native plugin, in the same process, may also end it with a status
# of its own: hardly this one.
NO_MEMORY: Final = 100 + errno.ENOMEM

# A host may have more CPUs than the unit may have threads (TasksMax=), or than their stacks fit into memory.
MOST_THREADS: Final = 16

MAX_DESCRIPTORS: Final = 64
# Python's own growth during calls: buffers of a few payloads, stacks of threads.
HEADROOM: Final = 32 << 20
# A native plugin's libraries, and the address space that malloc reserves for threads.
MAPPED: Final = 256 << 20

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
_LINUX_CAPABILITY_VERSION_3: Final = 0x20080522
_PAGE: Final = resource.getpagesize()


def hard_deadline(seconds: float) -> float:
    """How many seconds after its start a running call's worker is killed."""
    return seconds + GRACE


def settle() -> None:
    """Limits that apply from the start: no core dump, few descriptors, no privileges now or later."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NOFILE, MAX_DESCRIPTORS)
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_PR_SET_NO_NEW_PRIVS, 1), (_PR_SET_DUMPABLE, 0)):
        if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "cannot confine the worker: prctl failed")
    # capset(2): without capabilities, root is a user like any other, and cannot raise its limits again.
    header = struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    if libc.capset(header, bytes(24)) != 0:
        raise OSError(ctypes.get_errno(), "cannot confine the worker: capset failed")
    # Payloads come and go in megabytes: returning their pages each time would cost more than a call.
    _tune_malloc({_M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 8 << 20})
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})


def forget_environment() -> None:
    """Keep only locale and time zone of the environment.

    The rest comes from whoever ran `circleosd up`, or from their systemd manager, and is not for plugins to read.
    """
    kept = {name: value for name, value in os.environ.items() if name in ("LANG", "TZ") or name.startswith("LC_")}
    os.environ.clear()
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
        begin, end = file.read().rpartition(")")[2].split()[47:49]  # env_start, env_end; proc(5)
    ctypes.memset(int(begin), 0, int(end) - int(begin))
    os.environ.update(kept)


def bound_threads() -> int:
    """Limit the threads that Wasmtime uses to compile, and for WASI, by default one per CPU; return how many."""
    most = min(len(os.sched_getaffinity(0)), MOST_THREADS)
    os.environ.update(RAYON_NUM_THREADS=str(most), TOKIO_WORKER_THREADS=str(most))
    return most


def bound_compilation() -> None:
    """Limits for the child process that compiles one module; SIGALRM, SIGXCPU or an abort ends it.

    It also ends with its worker.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    signal.setitimer(signal.ITIMER_REAL, COMPILE_SECONDS)
    # The compiler runs on several threads.
    _lower(resource.RLIMIT_CPU, int(4 * COMPILE_SECONDS) + 1)
    _lower(resource.RLIMIT_DATA, COMPILE_MEMORY)


def bound_memory(extra: int) -> None:
    """From now on, the process may have `extra` bytes more writable memory than it has."""
    _lower(resource.RLIMIT_DATA, _statm("data") + extra + HEADROOM)


def bound_mappings(extra: int) -> None:
    """The same for all mappings: RLIMIT_DATA does not count shared ones."""
    _lower(resource.RLIMIT_AS, _statm("size") + extra + HEADROOM + MAPPED)


def share_one_heap() -> None:
    """Make all threads allocate from one heap.

    Otherwise, each would keep freed memory of payloads in its own heap, taken from the plugin's memory, and reserve
    address space for it.
    """
    _tune_malloc({_M_ARENA_MAX: 1})


def forbid_files() -> None:
    """Forbid extending files: a write past the end fails with EFBIG (Python ignores SIGXFSZ)."""
    _lower(resource.RLIMIT_FSIZE, 0)


def forbid_timers() -> None:
    """Forbid new timers (timer_create(2)) and queued signals.

    The kernel counts them per user, and those in a user namespace also for its creator: under systemd, for root.
    """
    _lower(resource.RLIMIT_SIGPENDING, 0)


def forbid_processes() -> None:
    """Forbid new processes and threads, except for root, for whom the kernel does not count them."""
    _lower(resource.RLIMIT_NPROC, 0)


def _statm(of: Literal["size", "data"]) -> int:
    """The value `size` or `data` in /proc/pid/statm (proc(5)) of this process, in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[{"size": 0, "data": 5}[of]]) * _PAGE


def _tune_malloc(parameters: dict[int, int]) -> None:
    """Set parameters of the C library's allocator, if it has any (mallopt(3))."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter, value in parameters.items():
            libc.mallopt(parameter, value)


def _lower(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))
