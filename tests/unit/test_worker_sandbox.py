"""The system call filter, decided as the kernel would: seccomp(2)'s classic BPF, interpreted."""

from __future__ import annotations

import errno
import struct

import pytest

from circleosd.worker import sandbox

PID = 4711
ALLOW, KILL = 0x7FFF0000, 0x80000000
EPERM, ENOSYS = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
# openat, read, mmap, futex, prlimit64 (lowering limits): what an interpreter needs.
ORDINARY = {"x86_64": (257, 0, 9, 202, 302), "aarch64": (56, 63, 222, 98, 261)}


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
def test_descriptors_send_no_signals_and_type_on_no_terminal(machine: str) -> None:
    column = MACHINES[machine][1]
    for numbers, commands in sandbox._COMMANDS.values():
        for command in commands:
            assert decide(machine, numbers[column], 0, second=command) == EPERM
        assert decide(machine, numbers[column], 0, second=1) == ALLOW  # F_GETFD


def test_another_architectures_calls_end_the_process() -> None:
    assert decide("x86_64", 0, architecture=0x40000003) == KILL
    assert decide("x86_64", 0x40000000 | 59) == EPERM
