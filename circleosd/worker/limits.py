"""What bounds the worker process itself, whatever runs in it: time, memory, descriptors, files, timers.

setrlimit(2), setitimer(2) and prctl(2). Memory is bounded by RLIMIT_DATA, which counts what is writable;
RLIMIT_AS would count the address space that Wasmtime only reserves.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import threading
import time
from typing import Final, Literal

# How long after `limits.time` a call that could not be interrupted ends with the process. A caller's own
# deadline must be later.
GRACE: Final = 0.5

# One module may take that to compile; a Python component of 18 MB takes 16 s on two cores.
COMPILE_SECONDS: Final = 120.0
# Less than the unit has (MemoryMax=), whose limit would end the worker too, and nobody could say why.
COMPILE_MEMORY: Final = 1 << 30

MAX_DESCRIPTORS: Final = 64
# Python's own growth while it serves: buffers of a few payloads, stacks of threads.
HEADROOM: Final = 32 << 20
# A native plugin's libraries, and the address space that malloc reserves for threads.
MAPPED: Final = 256 << 20

# The clock of interruption: so many ticks are a call's time. A store may see one more, for a tick may come
# late from the call before; so a call ends between its time and a tick later.
TICKS: Final = 20
STORE_TICKS: Final = TICKS + 1

_SIGEV_THREAD: Final = 2
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
_LINUX_CAPABILITY_VERSION_3: Final = 0x20080522
_PAGE: Final = resource.getpagesize()


def hard_deadline(seconds: float) -> float:
    """Seconds after its start at which a call's worker is gone if the call still runs."""
    return seconds + GRACE


def settle() -> None:
    """Bounds that hold from the first moment: no core dump, few descriptors, no privileges, now or later."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NOFILE, MAX_DESCRIPTORS)
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_PR_SET_NO_NEW_PRIVS, 1), (_PR_SET_DUMPABLE, 0)):
        if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "cannot confine the worker: prctl failed")
    # capset(2): root without capabilities is a user like others, and cannot raise its limits again.
    header = struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    if libc.capset(header, bytes(24)) != 0:
        raise OSError(ctypes.get_errno(), "cannot confine the worker: capset failed")
    # Payloads come and go in pieces of megabytes: giving their pages back each time costs more than a call.
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 8 << 20)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})


def forget_environment() -> None:
    """Of the environment, locale and time zone stay. The rest is what somebody typed `circleosd up` with, or has in the
    own systemd manager, and need not be for plugins to read.
    """
    kept = {name: value for name, value in os.environ.items() if name in ("LANG", "TZ") or name.startswith("LC_")}
    os.environ.clear()
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
        begin, end = file.read().rpartition(")")[2].split()[47:49]  # env_start, env_end; proc(5)
    ctypes.memset(int(begin), 0, int(end) - int(begin))
    os.environ.update(kept)


def bound_compilation() -> None:
    """Bounds for the child process that compiles one module; SIGALRM, SIGXCPU or an abort ends it.

    It ends with its worker, too.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    signal.setitimer(signal.ITIMER_REAL, COMPILE_SECONDS)
    # The compiler runs on several threads.
    _lower(resource.RLIMIT_CPU, int(4 * COMPILE_SECONDS) + 1)
    _lower(resource.RLIMIT_DATA, COMPILE_MEMORY)


def bound_memory(extra: int) -> None:
    """From now on the process may have `extra` bytes of writable memory more than it has."""
    _lower(resource.RLIMIT_DATA, _statm("data") + extra + HEADROOM)


def bound_mappings(extra: int) -> None:
    """The same for what it maps at all: RLIMIT_DATA does not count memory that is mapped to be shared."""
    _lower(resource.RLIMIT_AS, _statm("size") + extra + HEADROOM + MAPPED)


def forbid_files() -> None:
    """No file can be extended any more: a write past its end fails with EFBIG (Python ignores SIGXFSZ)."""
    _lower(resource.RLIMIT_FSIZE, 0)


def forbid_timers() -> None:
    """No further timer (timer_create(2)), and no signal that waits in a queue.

    The kernel counts them for each user, and those in a user namespace for its maker too: under systemd, for root.
    """
    _lower(resource.RLIMIT_SIGPENDING, 0)


def forbid_processes() -> None:
    """No further process or thread, except for root, for whom the kernel does not count them."""
    _lower(resource.RLIMIT_NPROC, 0)


def _statm(of: Literal["size", "data"]) -> int:
    """Bytes of this process's memory that /proc/pid/statm (proc(5)) gives as `size` or as `data`."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[{"size": 0, "data": 5}[of]]) * _PAGE


def _lower(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


class _SignalEvent(ctypes.Structure):
    """`struct sigevent` of 64-bit Linux, with the members of SIGEV_THREAD."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    )


class _TimerSpec(ctypes.Structure):
    """`struct itimerspec` of 64-bit Linux."""

    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


class Ticker:
    """Calls a C function with one pointer, every so many seconds while it is started: timer_create(2).

    The C library does it on a thread of its own, without the interpreter, which may be busy or waiting.
    """

    def __init__(self, interval: float, function: int, argument: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        event = _SignalEvent(value=argument, notify=_SIGEV_THREAD, function=function)
        self._timer = ctypes.c_void_p()
        if libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)) != 0:
            raise OSError(ctypes.get_errno(), "cannot make a timer")
        seconds, nanoseconds = divmod(int(interval * 1e9), 1_000_000_000)
        self._on = _TimerSpec(seconds, nanoseconds, seconds, nanoseconds)
        self._off = _TimerSpec(0, 0, 0, 0)
        # Started for every call: ctypes takes numbers in half the time that objects cost it.
        self._set = libc["timer_settime"]
        self._set.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        self._number, self._on_at, self._off_at = self._timer.value, *map(ctypes.addressof, (self._on, self._off))

    def start(self) -> None:
        """The first tick is one interval away."""
        self._set(self._number, 0, self._on_at, None)

    def stop(self) -> None:
        """A tick that is on its way may still come."""
        self._set(self._number, 0, self._off_at, None)


class Watch:
    """Ends what takes too long: first by ticks, which move an epoch on, then by SIGALRM.

    SIGALRM has its default action: the process ends, even if it hangs in a system call.
    """

    def __init__(self, seconds: float, tick: tuple[int, int] | None) -> None:
        """`tick`: the addresses of a C function and of its argument."""
        self._hard = hard_deadline(seconds)
        self._ticker = Ticker(seconds / TICKS, *tick) if tick is not None else None
        self._extend_at = 0.0

    def begin(self) -> None:
        """A call starts."""
        if self._ticker is not None:
            self._ticker.start()
        signal.setitimer(signal.ITIMER_REAL, self._hard)
        self._extend_at = time.monotonic() + GRACE / 2

    def extend(self) -> None:
        """The call is over, and something short follows before `end`."""
        if time.monotonic() > self._extend_at:
            self.begin()

    def end(self) -> None:
        """Nothing runs any more."""
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        if self._ticker is not None:
            self._ticker.stop()


class SharedWatch(Watch):
    """A watch for calls that run side by side: the hard deadline is that of the oldest of them."""

    def __init__(self, seconds: float, tick: tuple[int, int] | None) -> None:
        super().__init__(seconds, tick)
        self._lock = threading.Lock()
        self._deadlines: dict[int, float] = {}

    def begin(self) -> None:
        with self._lock:
            if not self._deadlines and self._ticker is not None:
                self._ticker.start()
            self._deadlines[threading.get_ident()] = time.monotonic() + self._hard
            self._arm()

    def extend(self) -> None:
        self.begin()

    def end(self) -> None:
        with self._lock:
            del self._deadlines[threading.get_ident()]
            self._arm()
            if not self._deadlines and self._ticker is not None:
                self._ticker.stop()

    def _arm(self) -> None:
        remaining = min(self._deadlines.values()) - time.monotonic() if self._deadlines else 0.0
        signal.setitimer(signal.ITIMER_REAL, max(remaining, 0.001) if self._deadlines else 0.0)
