"""Limits the time of a call: it is interrupted by the ticks of a clock, or else ends with its process (SIGALRM).

timer_create(2) and setitimer(2).
"""

from __future__ import annotations

import ctypes
import math
import signal
import threading
import time
from typing import Final

from circleosd.worker.limits import GRACE, hard_deadline

# The clock of interruption: a call's time has at least so many ticks, none of them so long that the process ends first.
LEAST_TICKS: Final = 20
LONGEST_TICK: Final = GRACE / 2

_SIGEV_THREAD: Final = 2


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


def ticks(seconds: float) -> int:
    """How many ticks the time of a call has.

    A store may see one more, because a tick of the previous call may come late; so a call ends between its time and one
    tick later. If the machine is so busy that several ticks come late, it ends that much earlier.
    """
    return max(LEAST_TICKS, math.ceil(seconds / LONGEST_TICK))


class Ticker:
    """Calls a C function with one pointer periodically while it is started: timer_create(2).

    The C library does this on its own thread, without the interpreter, which may be busy or waiting.
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
        # Started for every call: ctypes handles numbers in half the time of objects.
        self._set = libc["timer_settime"]
        self._set.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        self._number, self._on_at, self._off_at = self._timer.value, *map(ctypes.addressof, (self._on, self._off))

    def start(self) -> None:
        """The first tick comes after one interval."""
        self._set(self._number, 0, self._on_at, None)

    def stop(self) -> None:
        """A tick already on its way may still come."""
        self._set(self._number, 0, self._off_at, None)


class Watch:
    """Ends calls that take too long: first with ticks, which advance an epoch, then with SIGALRM.

    SIGALRM has its default action: the process ends, even if it hangs in a system call.
    """

    def __init__(self, seconds: float, tick: tuple[int, int] | None) -> None:
        """`tick`: the addresses of a C function and of its argument."""
        self._hard = hard_deadline(seconds)
        self._ticker = Ticker(seconds / ticks(seconds), *tick) if tick is not None else None
        self._extend_at = 0.0

    def begin(self) -> None:
        """A call starts."""
        if self._ticker is not None:
            self._ticker.start()
        signal.setitimer(signal.ITIMER_REAL, self._hard)
        self._extend_at = time.monotonic() + GRACE / 4

    def extend(self) -> None:
        """The call is over; something short follows before `end`."""
        if time.monotonic() > self._extend_at:
            self.begin()

    def end(self) -> None:
        """Nothing is running any more."""
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        if self._ticker is not None:
            self._ticker.stop()


class SharedWatch(Watch):
    """A watch for concurrent calls: the hard deadline is that of the oldest one."""

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
