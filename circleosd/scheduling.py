"""Short time slices on the CPU, so that processes with little to do need not wait for busy ones: sched_setattr(2).

Since Linux 6.12, a process may request the length of its slices (EEVDF). With the default of some milliseconds, a
spinning plugin could delay a waking process that long. Its share of the CPU stays the same.
"""

from __future__ import annotations

import ctypes
import os
import struct

TURN = 100_000  # nanoseconds, the shortest that the kernel grants
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}


def take_short_turns() -> None:
    """Request short time slices for this thread, and for processes and threads that it starts later."""
    number = _SCHED_SETATTR.get(os.uname().machine)
    if number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    # struct sched_attr: size, policy; flags; nice, priority; runtime, deadline, period
    attributes = struct.pack("=IIQiIQQQ", 48, os.SCHED_OTHER, 0, os.getpriority(os.PRIO_PROCESS, 0), 0, TURN, 0, 0)
    ctypes.CDLL(None).syscall(number, 0, attributes, 0)
