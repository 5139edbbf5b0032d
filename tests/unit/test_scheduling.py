"""Short turns on the CPU."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import subprocess
import sys

import pytest

from circleosd.scheduling import TURN

ASK = """
import ctypes, os, struct
from circleosd.scheduling import take_short_turns
os.nice(3)
take_short_turns()
attributes = ctypes.create_string_buffer(48)
assert ctypes.CDLL(None).syscall(315, 0, attributes, 48, 0) == 0
_, policy, _, nice, _, turn, _, _ = struct.unpack("=IIQiIQQQ", attributes.raw)
print(policy, nice, turn)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="asks the kernel by the number that x86-64 has for it")
def test_a_process_asks_for_short_turns_and_keeps_its_priority() -> None:
    attributes = ctypes.create_string_buffer(48)
    assert ctypes.CDLL(None).syscall(315, 0, attributes, 48, 0) == 0
    if struct.unpack("=IIQiIQQQ", attributes.raw)[5] == 0:
        pytest.skip("this kernel has no turns of one's own length")
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    assert done.stdout == f"{os.SCHED_OTHER} 3 {TURN}\n"
