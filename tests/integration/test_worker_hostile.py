"""Hostile wasm: whatever it tries, its caller gets a sentence, and the next call or worker works."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import textwrap
import time

import pytest

from circleosd.worker import frames
from tests import PROJECT
from tests.component_text import component
from tests.core_text import HOST_CALLS, SPIN, core, wat
from tests.measuring import once_it_holds
from tests.waiting import ended, wait_until
from tests.wasi_text import ECHO, command
from tests.wasm_binary import leb128
from tests.worker_driver import CallFailed, WorkerEnded, fails, start, still_works

PAGE = 65536


KEYS = '{"call":"kv.keys","args":{"prefix":""}}'


def request(text: str) -> str:
    """A data segment with the text, and `$ask`, which makes that host call and drops its result."""
    escaped = text.replace('"', '\\"')
    return f"""(data (i32.const 9000) "{escaped}")
      (func $ask (drop (call $host_call (i32.const 9000) (i32.const {len(text)}))))"""


ASK = request(KEYS) + '(func (export "ask") (param i32) (result i64) (call $ask) (i64.const 0))'


def test_a_call_just_within_its_time_is_not_cut_short_by_the_one_before() -> None:
    def slowly(call: str, args: dict[str, str]) -> bytes:
        time.sleep(0.4)  # two calls take longer than the time of one
        return frames.host_reply_body([])

    def ends() -> list[str]:
        with start(core(ASK, imports=HOST_CALLS), time=0.7, patient=False, granted=("kv",)) as worker:
            worker.answer = slowly
            worker.ready()
            try:
                return [worker.invoke("ask") for _ in range(4)]
            except (CallFailed, WorkerEnded) as exc:
                return [str(exc)]

    once_it_holds(ends, lambda ends: ends == [""] * 4)


def test_an_infinite_loop_of_host_calls_ends_at_its_time() -> None:
    loop = '(func (export "f") (param i32) (result i64) (loop $l (call $ask) (br $l)) unreachable)'
    for call, capability in (('{"call":"clock.now"}', "clock"), (KEYS, "kv")):
        with start(core(request(call) + loop, imports=HOST_CALLS), time=0.3, granted=(capability,)) as worker:
            worker.ready()
            assert fails(worker, "f").code == "timeout"
            still_works(worker)
            assert bool(worker.host_calls) == (capability == "kv")


def test_a_host_call_that_is_never_answered_ends_with_its_worker() -> None:
    with start(core(ASK, imports=HOST_CALLS), time=0.2, patient=False, granted=("kv",)) as worker:
        worker.ready()
        worker.send("ask")
        assert worker.receive().kind == frames.HOST_CALL
        with pytest.raises(WorkerEnded) as ended:
            worker.receive()
        assert ended.value.status == -14


def test_a_start_function_that_loops_refuses_the_plugin() -> None:
    with start(core("(func $begin (loop $l (br $l))) (start $begin)"), time=0.3) as worker:
        with pytest.raises(CallFailed) as caught:
            worker.ready()
        assert (caught.value.code, caught.value.message) == ("timeout", "took longer than 0.3 s")
        assert caught.value.backtrace[0].startswith("begin ")


def test_a_start_function_that_fails_later_fails_the_calls_it_concerns() -> None:
    # Whether an instance can be made depends on the host's answer: "y", or "n", which is 110.
    body = (
        request('{"call":"kv.get","args":{"key":"a"}}')
        + """
      (func $begin
        (call $ask)
        (drop (call $host_answer (i32.const 8000) (i32.const 3)))
        (if (i32.eq (i32.load8_u (i32.const 8001)) (i32.const 110)) (then unreachable)))
      (start $begin)"""
    )
    made = iter(["y", "y", "n", "n", "y", "y", "y", "y"])
    with start(core(body, imports=HOST_CALLS), granted=("kv",)) as worker:
        worker.answer = lambda call, args: frames.host_reply_body(next(made))
        worker.ready()
        still_works(worker)
        still_works(worker)
        assert fails(worker, "echo").message == "trap: wasm `unreachable` instruction executed"
        still_works(worker)


GROW = """(func (export "grow") (param i32) (result i64) (local $pages i32)
  (loop $l
    (if (i32.ne (memory.grow (i32.const 1)) (i32.const -1))
      (then (i32.store8 (i32.mul (i32.sub (memory.size) (i32.const 1)) (i32.const 65536)) (i32.const 1)) (br $l))))
  (i32.store (i32.const 100) (i32.const 0x30303030))
  (local.set $pages (memory.size))
  (i32.store8 (i32.const 102) (i32.add (i32.const 48) (i32.rem_u (local.get $pages) (i32.const 10))))
  (i32.store8 (i32.const 101)
    (i32.add (i32.const 48) (i32.rem_u (i32.div_u (local.get $pages) (i32.const 10)) (i32.const 10))))
  (i32.store8 (i32.const 100) (i32.add (i32.const 48) (i32.div_u (local.get $pages) (i32.const 100))))
  (i64.or (i64.shl (i64.const 100) (i64.const 32)) (i64.const 3)))"""


@pytest.mark.parametrize("instance", ["fresh", "shared"])
def test_memory_grows_to_its_limit_and_no_further(instance: str) -> None:
    with start(core(GROW), memory=100 * PAGE, instance=instance) as worker:
        worker.ready()
        assert [worker.invoke("grow") for _ in range(3)] == ["100"] * 3
        assert int(worker.status()["VmRSS"].split()[0]) < 45 * 1024
        still_works(worker)


def test_a_trap_at_the_memory_limit_says_so() -> None:
    body = """(func (export "f") (param i32) (result i64)
      (loop $l (br_if $l (i32.ne (memory.grow (i32.const 1)) (i32.const -1)))) unreachable)"""
    with start(core(body), memory=100 * PAGE) as worker:
        worker.ready()
        failed = fails(worker, "f")
        assert failed.code == "limit"
        assert failed.message.endswith("; its memory is at its limit of 6553600 bytes")


def test_a_trap_of_a_command_at_the_memory_limit_says_so_and_what_the_command_said() -> None:
    body = """(loop $l (br_if $l (i32.ne (memory.grow (i32.const 1)) (i32.const -1))))
      (drop (call $write (i32.const 2) (i32.const 5000) (i32.const 13))) unreachable"""
    with start(command(body, extra='(data (i32.const 5000) "out of memory")'), memory=100 * PAGE) as worker:
        worker.ready()
        failed = fails(worker, "handle")
        assert failed.code == "limit"
        assert failed.message.endswith(": out of memory; its memory is at its limit of 6553600 bytes")


@pytest.mark.parametrize(
    ("artifact", "message"),
    [
        (core(memory="200"), "memory has a minimum byte size of 13107200 which exceeds the limit of 6553600 bytes"),
        (core("(table 200000 funcref)"), "table index 0 has a minimum element size of 200000"),
        (core("(table 1 funcref)" * 9), "defined tables count of 9"),
        (command(ECHO, memory="200"), "memory has a minimum byte size of 13107200"),
        (component(memory="200"), "memory has a minimum byte size of 13107200"),
        (component(imports="(core module $a (memory 1))" + "(core instance (instantiate $a))" * 20), "memory count"),
        (
            component(imports="(core module $a (table 1 funcref))" + "(core instance (instantiate $a))" * 25),
            "table count",
        ),
        (component(imports="(core module $a)" + "(core instance (instantiate $a))" * 300), "instance count"),
    ],
)
def test_a_plugin_that_starts_beyond_its_limits_is_refused(artifact: bytes, message: str) -> None:
    with start(artifact, memory=100 * PAGE) as worker:
        with pytest.raises(CallFailed) as caught:
            worker.ready()
        assert caught.value.code == "limit"
        assert caught.value.message.startswith("needs more than its limits allow: ")
        assert message in caught.value.message


def test_many_memories_of_a_component_are_held_together() -> None:
    # Eight modules that grow a memory each, page by page, until they cannot.
    modules = "".join(
        f"""(core module $m{n} (memory (export "memory") 1)
          (func (export "grow") (loop $l
            (if (i32.ne (memory.grow (i32.const 1)) (i32.const -1)) (then
              (i32.store8 (i32.mul (i32.sub (memory.size) (i32.const 1)) (i32.const 65536)) (i32.const 1)) (br $l))))))
        (core instance $i{n} (instantiate $m{n})) (alias core export $i{n} "grow" (core func $grow{n}))"""
        for n in range(8)
    )
    names = tuple(f"grow{n}" for n in range(8))
    handle = "".join(f"(call ${name})" for name in names) + "(call $ok (local.get $ptr) (local.get $len))"
    with start(component(imports=modules, host=names, handle=handle), memory=32 << 20, time=20) as worker:
        worker.ready()
        resident = 0
        for _ in range(2):
            assert worker.invoke("handle", "x") == "x"
            resident = max(resident, int(worker.status()["VmHWM"].split()[0]))
        assert resident < (2 * 32 + 32 + 45) * 1024


def test_a_table_grows_to_its_limit_and_no_further() -> None:
    body = """(table $t 1 funcref)
      (func (export "f") (param i32) (result i64)
        (loop $l (br_if $l (i32.ne (table.grow $t (ref.null func) (i32.const 1000)) (i32.const -1))))
        (if (i32.gt_u (table.size $t) (i32.const 100000)) (then unreachable)) (i64.const 0))"""
    with start(core(body)) as worker:
        worker.ready()
        assert worker.invoke("f") == ""
        still_works(worker)


@pytest.mark.parametrize("instance", ["fresh", "shared"])
def test_deep_recursion_traps(instance: str) -> None:
    body = """(func $deeper (param i64) (result i64)
        (i64.add (call $deeper (i64.add (local.get 0) (i64.const 1))) (local.get 0)))
      (func (export "f") (param i32) (result i64) (call $deeper (i64.const 1)))"""
    for concurrency in (1, 3) if instance == "fresh" else (1,):
        with start(core(body), instance=instance, concurrency=concurrency) as worker:
            worker.ready()
            failed = fails(worker, "f")
            assert (failed.code, failed.message) == ("plugin-failed", "trap: call stack exhausted")
            assert failed.backtrace[0] == "deeper"  # where the stack ended is no place in the module
            assert failed.backtrace[1].startswith("deeper (offset ")
            assert len(failed.backtrace) < 20
            assert failed.backtrace[-1] == "…", "there were thousands, of which nobody knows the number"
            still_works(worker)


def test_a_function_name_of_a_megabyte_stays_out_of_the_backtrace() -> None:
    name = "x" * 1_000_000
    with start(
        core(f'(func ${name} unreachable) (func (export "f") (param i32) (result i64) (call ${name}) (i64.const 0))')
    ) as worker:
        worker.ready()
        assert len(fails(worker, "f").backtrace[0]) < 300


def test_an_error_message_of_megabytes_is_cut() -> None:
    body = """(func (export "f") (param i32) (result i64)
      (memory.fill (i32.const 0) (i32.const 101) (i32.const 1310720))
      (i64.const 0x80140000))"""
    with start(core(body, memory="20")) as worker:
        worker.ready()
        assert len(fails(worker, "f").message) < 70_000
        still_works(worker)


def test_a_module_of_50_megabytes_is_run_or_refused_and_leaves_no_memory_behind() -> None:
    data = os.urandom(50_000_000)
    small = core('(data (i32.const 65536) "PLACE")', memory="800")
    with_data = _with_data_segment(small, data)
    with start(with_data, memory=64 << 20) as worker:
        worker.ready()
        still_works(worker)
        compiled = worker.compiled
    with start(with_data, compiled, memory=64 << 20) as second:
        second.ready()
        still_works(second)
        assert second.compiled == b""


def _with_data_segment(module: bytes, data: bytes) -> bytes:
    """The module with the text PLACE of its data section replaced by `data`."""
    at = module.index(b"PLACE")
    start_of_section = module.rindex(b"\x0b", 0, module.rindex(b"\x01\x00\x41", 0, at))
    body = module[start_of_section + 2 : at - 1] + leb128(len(data)) + data
    rest = module[at + 5 :]
    return module[:start_of_section] + b"\x0b" + leb128(len(body)) + body + rest


COMPILE = """
    import mmap, os, sys
    from circleosd.worker import compiler, limits
    from circleosd.worker.failure import PluginFailure
    for name, value in {settings}.items():
        setattr(limits, name, value)
        setattr(compiler, name, value)
    limits.settle()
    fd = int(sys.argv[1])
    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as data:
        try:
            compiler.compile_in_child("module", data, deterministic=False)
        except PluginFailure as exc:
            print(exc.code, exc.message)
"""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"COMPILE_SECONDS": 0.001}, "limit compiling it took longer than 0.001 s"),
        (
            {"COMPILE_MEMORY": 40 << 20},
            "limit compiling it needs more than 41943040 bytes of memory",
        ),
    ],
)
def test_a_module_that_is_hard_to_compile_is_refused_by_its_limits(settings: dict[str, float], message: str) -> None:
    operations = "(local.set 0 (i64.mul (i64.add (local.get 0) (i64.const 7)) (local.get 0)))" * 30_000
    bomb = wat("(module " + f"(func (param i64) (result i64) {operations} (local.get 0))" * 4 + ")")
    descriptor = os.memfd_create("bomb")
    os.write(descriptor, bomb)
    try:
        script = textwrap.dedent(COMPILE.format(settings=settings))
        process = subprocess.run(
            [sys.executable, "-c", script, str(descriptor)],
            cwd=PROJECT, pass_fds=[descriptor], capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    finally:
        os.close(descriptor)
    assert process.stdout.strip() == message, process.stderr


def test_a_compilation_ends_with_its_worker() -> None:
    operations = "(local.set 0 (i64.mul (i64.add (local.get 0) (i64.const 7)) (local.get 0)))" * 30_000
    worker = start(core("".join(f"(func (param i64) (result i64) {operations} (local.get 0))" for _ in range(4))))
    children = f"/proc/{worker.process.pid}/task/{worker.process.pid}/children"
    while not (child := _read(children).strip()):
        time.sleep(0.005)
    worker.process.kill()
    worker.close()
    wait_until(lambda: ended(int(child)))


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def mutations(count: int) -> list[bytes]:
    randomness = random.Random(20260722)
    samples = [core(SPIN + GROW), command(ECHO), component()]
    result = []
    for number in range(count):
        data = bytearray(samples[number % len(samples)])
        match randomness.randrange(4):
            case 0:
                del data[randomness.randrange(8, len(data)) :]
            case 1:
                at = randomness.randrange(len(data))
                data[at : at + randomness.randrange(1, 9)] = randomness.randbytes(randomness.randrange(9))
            case _:
                for _ in range(randomness.randrange(1, 4)):
                    data[randomness.randrange(len(data))] ^= 1 << randomness.randrange(8)
        result.append(bytes(data))
    return result


def test_damaged_modules_are_refused_with_a_sentence_or_run_within_their_limits() -> None:
    outcomes = {"refused": 0, "ran": 0}
    for data in mutations(300):
        with start(data, memory=8 << 20, time=0.2, output=1000) as worker:
            try:
                functions = worker.ready().functions
            except CallFailed as exc:
                functions = []
                outcomes["refused"] += 1
                sentence = exc.message
                assert re.fullmatch(r"[a-z].{9,}[^\s]", sentence, re.S), data.hex()
            for name in functions:
                try:
                    worker.invoke(name, "payload")
                except CallFailed as exc:
                    sentence = exc.message
                    assert len(sentence) > 8, data.hex()
            outcomes["ran"] += bool(functions)
        assert (worker.process.poll(), worker.errors) == (0, ""), data.hex()
    assert outcomes["refused"] > 100
    assert outcomes["ran"] > 15
