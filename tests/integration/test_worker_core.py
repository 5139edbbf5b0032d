"""Core plugins in a real worker: calls, instances, failures, host functions."""

from __future__ import annotations

import re
import select
import time
from contextlib import suppress
from typing import Any

import pytest

from circleosd.worker import frames
from circleosd.worker.instances import Instances
from circleosd.worker.wasi import WasiPlugin
from tests import PROJECT
from tests.core_text import HOST_CALLS, LOG, SPIN, core, wat
from tests.measuring import once_it_holds
from tests.worker_driver import CallFailed, WorkerEnded, interrupts_what_waited_for_its_instance, recovers, start

COUNTER = """
  (global $count (mut i32) (i32.const 0))
  (func (export "count") (param i32) (result i64)
    (global.set $count (i32.add (global.get $count) (i32.const 1)))
    (i32.store8 (i32.const 500) (i32.add (i32.const 48) (global.get $count)))
    (i64.or (i64.shl (i64.const 500) (i64.const 32)) (i64.const 1)))"""
HOST = LOG + HOST_CALLS
# Passes its payload on as a host call, and the answer back, errors as errors.
CALL = """
  (func (export "call") (param $len i32) (result i64) (local $status i32)
    (local.set $status (call $host_call (i32.const 1024) (local.get $len)))
    (drop (call $host_answer (i32.const 4096) (i32.const 60000)))
    (i64.or (i64.shl (i64.const 4096) (i64.const 32)) (i64.extend_i32_u (local.get $status))))
  (func (export "log") (param $len i32) (result i64)
    (call $log (i32.const 2) (i32.const 1024) (local.get $len)) (i64.const 0))"""


def reply(address: str, length: str, error: str = "0") -> str:
    """A handler `f` with that result."""
    packed = (
        f"(i64.or (i64.shl (i64.const {address}) (i64.const 32)) (i64.or (i64.const {length}) (i64.const {error})))"
    )
    return f'(func (export "f") (param $len i32) (result i64) {packed})'


def test_the_smallest_plugin_of_the_reference_works() -> None:
    text = (PROJECT / "plugins" / "ABI.md").read_text()
    found = re.search(r"### The smallest plugin\n\n((?:    .*\n)+)", text)
    assert found is not None
    with start(wat(found[1])) as worker:
        assert worker.ready().functions == ["handle"]
        assert worker.invoke("handle", "hällo") == "hällo"
        assert worker.invoke("handle", "x" * 65536) == "x" * 65536
        with pytest.raises(CallFailed, match="no room for a payload of 65537 bytes") as caught:
            worker.invoke("handle", "x" * 65537)
        assert caught.value.code == "limit"


def test_an_unknown_function_is_answered_with_those_there_are() -> None:
    with start(core()) as worker:
        worker.ready()
        with pytest.raises(CallFailed, match="has no function 'eco': it has echo, explode") as caught:
            worker.invoke("eco")
        assert caught.value.code == "not-found"


def test_fresh_instances_share_nothing_and_shared_ones_do() -> None:
    with start(core(COUNTER)) as fresh, start(core(COUNTER), instance="shared") as shared:
        fresh.ready()
        shared.ready()
        assert [fresh.invoke("count") for _ in range(3)] == ["1", "1", "1"]
        assert [shared.invoke("count") for _ in range(3)] == ["1", "2", "3"]


def test_no_byte_of_one_call_reaches_the_next() -> None:
    peek = """(func (export "peek") (param i32) (result i64)
        (i64.or (i64.shl (i64.const 1024) (i64.const 32)) (i64.const 6)))"""
    with start(core(peek)) as worker:
        worker.ready()
        for _ in range(5):
            worker.invoke("echo", "secret")
            assert worker.invoke("peek") == "\0" * 6


def test_a_trap_names_its_kind_and_the_functions_on_the_way() -> None:
    body = """(func $inner unreachable) (func $middle (call $inner))
      (func $outer (export "outer") (param i32) (result i64) (call $middle) (i64.const 0))"""
    with start(core(body)) as worker:
        worker.ready()
        with pytest.raises(CallFailed) as caught:
            worker.invoke("outer")
        assert caught.value.code == "plugin-failed"
        assert caught.value.message == "trap: wasm `unreachable` instruction executed"
        assert [line.split()[0] for line in caught.value.backtrace] == ["inner", "middle", "outer"]
        assert not caught.value.failed.restarted
        assert worker.invoke("echo", "still here") == "still here"


def test_a_shared_instance_starts_anew_after_a_trap_and_says_so() -> None:
    with start(core(COUNTER), instance="shared") as worker:
        worker.ready()
        assert [worker.invoke("count") for _ in range(2)] == ["1", "2"]
        with pytest.raises(CallFailed) as caught:
            worker.invoke("explode")
        assert caught.value.failed.restarted
        assert worker.invoke("count") == "1"


def test_a_plugins_own_error_is_its_message_and_keeps_a_shared_instance() -> None:
    body = COUNTER + reply("500", "1", "0x80000000")
    with start(core(body), instance="shared") as worker:
        worker.ready()
        worker.invoke("count")
        with pytest.raises(CallFailed) as caught:
            worker.invoke("f")
        assert (caught.value.code, caught.value.message) == ("plugin-failed", "1")
        assert caught.value.backtrace == []
        assert not caught.value.failed.restarted
        assert worker.invoke("count") == "2"


def test_a_shared_instance_outlives_a_payload_it_has_no_room_for_and_a_reply_that_is_refused() -> None:
    body = COUNTER + reply("500", "0x500000")
    with start(core(body), instance="shared") as worker:
        worker.ready()
        worker.invoke("count")
        for function, payload in (("echo", "x" * 65_537), ("f", "")):
            with pytest.raises(CallFailed) as caught:
                worker.invoke(function, payload)
            assert caught.value.code == "limit"
            assert not caught.value.failed.restarted
        assert worker.invoke("count") == "2"


@pytest.mark.parametrize("instance", ["fresh", "shared"])
@pytest.mark.parametrize(
    ("address", "length", "code", "message"),
    [
        ("131072", "1", "plugin-failed", "gave a reply outside its memory: 1 bytes at address 131072, of 131072 bytes"),
        ("131071", "2", "plugin-failed", "gave a reply outside its memory"),
        ("0xffffffff", "1", "plugin-failed", "gave a reply outside its memory"),
        ("0", "0x3fffff", "plugin-failed", "gave a reply outside its memory"),
        ("0", "0x40000000", "limit", "gave a reply of 1073741824 bytes: its limit for output is 4194304 bytes"),
        ("0", "0x7fffffff", "limit", "gave a reply of 2147483647 bytes"),
    ],
)
def test_a_reply_that_is_not_there_fails_the_call_alone(
    address: str, length: str, code: str, message: str, instance: str
) -> None:
    with start(core(reply(address, length)), instance=instance) as worker:
        worker.ready()
        for _ in range(2):
            with pytest.raises(CallFailed) as caught:
                worker.invoke("f", "x")
            assert caught.value.code == code
            assert caught.value.message.startswith(message)
        assert worker.invoke("echo", "fine") == "fine"


def test_the_limit_for_output_is_kept_to_the_byte() -> None:
    with start(core(), output=1000) as worker:
        worker.ready()
        assert worker.invoke("echo", "x" * 1000) == "x" * 1000
        with pytest.raises(
            CallFailed, match="gave a reply of 1001 bytes: its limit for output is 1000 bytes"
        ) as caught:
            worker.invoke("echo", "x" * 1001)
        assert caught.value.code == "limit"


def test_an_empty_reply_may_have_any_address() -> None:
    with start(core(reply("0xffffffff", "0"))) as worker:
        worker.ready()
        assert worker.invoke("f") == ""


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("\\ff", "invalid start byte at byte 0"),
        ("ab\\c3", "unexpected end of data at byte 2"),
        ("\\ed\\a0\\80", "invalid continuation byte at byte 0"),
        ("\\c0\\80", "invalid start byte at byte 0"),
        ("a\\f4\\90\\80\\80", "invalid continuation byte at byte 1"),
    ],
)
@pytest.mark.parametrize("error", ["0", "0x80000000"])
def test_a_reply_that_is_not_utf8_fails_with_the_place(data: str, reason: str, error: str) -> None:
    length = str(len(re.findall(r"\\..|.", data)))
    with start(core(f'(data (i32.const 9000) "{data}")' + reply("9000", length, error))) as worker:
        worker.ready()
        with pytest.raises(CallFailed) as caught:
            worker.invoke("f")
        assert caught.value.code == "plugin-failed"
        assert caught.value.message == f"gave a reply that is not UTF-8: {reason}"


def test_the_room_for_a_call_like_the_last_one_is_asked_for_before_it_comes() -> None:
    body = """(data (i32.const 64) "asked")
      (func $where (result i32) (call $log (i32.const 1) (i32.const 64) (i32.const 5)) (i32.const 1024))"""
    with start(core(body, buffer="(call $where)", imports=HOST)) as worker:
        worker.ready()
        for payload in ("four", "five", "longer"):
            assert worker.invoke("echo", payload) == payload
        assert [log[0] for log in worker.logs][:4] == [1, 1 | frames.PREPARING, 2 | frames.PREPARING, 3]


@pytest.mark.parametrize("address", ["131072", "131070", "-1", "-2147483648"])
def test_a_buffer_outside_memory_fails_the_call_alone(address: str) -> None:
    with start(core(buffer=f"(i32.const {address})")) as worker:
        worker.ready()
        with pytest.raises(CallFailed, match="gave a buffer outside its memory: 4 bytes at address") as caught:
            worker.invoke("echo", "text")
        assert caught.value.code == "plugin-failed"


def test_initialize_runs_once_in_each_instance_before_any_call() -> None:
    body = COUNTER + '(func (export "_initialize") (global.set $count (i32.const 5)))'
    with start(core(body)) as fresh, start(core(body), instance="shared") as shared:
        fresh.ready()
        shared.ready()
        assert [fresh.invoke("count") for _ in range(2)] == ["6", "6"]
        assert [shared.invoke("count") for _ in range(2)] == ["6", "7"]


def test_host_calls_reach_the_manager_and_their_answers_the_plugin() -> None:
    stored: dict[str, str] = {}

    def answer(call: str, args: dict[str, str]) -> bytes:
        if call == "kv.set":
            stored[args["key"]] = args["value"]
            return frames.host_reply_body(None)
        return frames.host_reply_body(stored.get(args["key"]))

    with start(core(CALL, imports=HOST), granted=("kv",)) as worker:
        worker.answer = answer
        worker.ready()
        assert worker.invoke("call", '{"call":"kv.get","args":{"key":"a"}}') == "null"
        assert worker.invoke("call", '{"call":"kv.set","args":{"key":"a","value":"grün"}}') == "null"
        assert worker.invoke("call", '{"call":"kv.get","args":{"key":"a"}}') == '"grün"'
        with pytest.raises(CallFailed) as caught:
            worker.invoke("call", '{"call":"events.emit","args":{"topic":"mail","payload":""}}')
        assert caught.value.message == "denied: this plugin has not been granted the capability events:mail"
        assert [call for call, _ in worker.host_calls] == ["kv.get", "kv.set", "kv.get"]


def test_the_answer_that_the_host_keeps_is_its_instances_alone() -> None:
    body = """(func (export "kept") (param i32) (result i64)
      (i64.or (i64.shl (i64.const 4096) (i64.const 32))
              (i64.extend_i32_u (call $host_answer (i32.const 4096) (i32.const 60000)))))"""
    module = core(CALL + body, imports=HOST)
    for instance, kept in (("fresh", ""), ("shared", "bad-request: no host call 'secret'")):
        with start(module, instance=instance) as worker:
            worker.ready()
            with pytest.raises(CallFailed, match="'secret'"):
                worker.invoke("call", '{"call":"secret"}')
            assert worker.invoke("kept") == kept


def test_calls_that_arrive_during_a_host_call_wait_for_their_turn() -> None:
    with start(core(CALL, imports=HOST), granted=("kv",)) as worker:
        worker.ready()
        first = worker.send("call", '{"call":"kv.keys","args":{"prefix":""}}')
        assert worker.receive().kind == frames.HOST_CALL
        second = worker.send("echo", "second")
        worker.connection.sendall(frames.encode(frames.HOST_REPLY, first, frames.host_reply_body(["a"])))
        assert bytes(worker.wait_for(first).body) == b'["a"]'
        assert bytes(worker.wait_for(second).body) == b"second"


def test_log_messages_carry_their_call_and_level() -> None:
    with start(core(CALL, imports=HOST)) as worker:
        worker.ready()
        worker.invoke("echo")
        worker.invoke("log", "Grüße")
        assert worker.logs == [(2, 2, "Grüße")]


def test_what_an_instance_logs_before_its_call_is_of_the_preparation_for_it() -> None:
    made = """(data (i32.const 64) "made")
      (func (export "_initialize") (call $log (i32.const 1) (i32.const 64) (i32.const 4)))"""
    with start(core(made, imports=HOST)) as worker:
        worker.ready()
        for _ in range(3):
            worker.invoke("echo")
        assert [log[0] for log in worker.logs][:3] == [0, 1 | frames.PREPARING, 2 | frames.PREPARING]
        assert {log[1:] for log in worker.logs} == {(1, "made")}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("(call $log (i32.const 0) (i32.const 131070) (i32.const 3))", "log: 3 bytes at address 131070 lie outside"),
        ("(call $log (i32.const 0) (i32.const 0) (i32.const -1))", "log: 4294967295 bytes at address 0 lie outside"),
        ("(drop (call $host_call (i32.const -1) (i32.const 1)))", "host_call: 1 bytes at address 4294967295 lie"),
        ("(drop (call $host_call (i32.const 0) (i32.const 200000)))", "host_call: 200000 bytes at address 0 lie"),
        (
            "(drop (call $host_call (i32.const 0) (i32.const 0))) (drop (call $host_answer (i32.const -9)"
            " (i32.const 10)))",
            "host_answer: 10 bytes at address 4294967287 lie outside memory",
        ),
    ],
)
def test_a_host_function_given_what_is_outside_memory_traps(call: str, message: str) -> None:
    with start(core(f'(func $bad (export "f") (param i32) (result i64) {call} (i64.const 0))', imports=HOST)) as worker:
        worker.ready()
        with pytest.raises(CallFailed) as caught:
            worker.invoke("f")
        assert caught.value.message.startswith(message)
        assert caught.value.backtrace[0].startswith("bad ")
        assert worker.invoke("echo", "fine") == "fine"


def test_a_message_that_is_not_utf8_is_logged_with_replacements() -> None:
    body = """(data (i32.const 9000) "a\\ffb")
      (func (export "f") (param i32) (result i64)
        (call $log (i32.const 99) (i32.const 9000) (i32.const 3))
        (call $log (i32.const -1) (i32.const 9000) (i32.const 1)) (i64.const 0))"""
    with start(core(body, imports=HOST)) as worker:
        worker.ready()
        worker.invoke("f")
        assert worker.logs == [(1, 3, "a\ufffdb"), (1, 3, "a")]


def test_what_a_deterministic_plugin_computes_does_not_depend_on_the_machine() -> None:
    """Of a NaN it sees no bits but those of the one; what relaxed SIMD leaves to the machine is the same everywhere."""
    body = """(func (export "f") (param $len i32) (result i64) (local $nan f32)
        (local.set $nan (f32.add (f32.const nan:0x200000) (f32.convert_i32_u (local.get $len))))
        (if (i32.ne (i32.reinterpret_f32 (local.get $nan)) (i32.const 0x7fc00000)) (then unreachable))
        (if (i32x4.extract_lane 0 (i32x4.relaxed_trunc_f32x4_s (f32x4.splat (local.get $nan)))) (then unreachable))
        (i64.const 0))"""
    with start(core(body), deterministic=True) as worker:
        worker.ready()
        assert worker.invoke("f", "x") == ""


@pytest.mark.parametrize("instance", ["fresh", "shared"])
def test_a_deterministic_plugin_runs_out_of_fuel_at_the_same_place(instance: str) -> None:
    body = """(global $n (mut i32) (i32.const 0))
      (func (export "spin") (param i32) (result i64)
        (loop $l (i32.store (i32.const 0) (i32.add (i32.load (i32.const 0)) (i32.const 1))) (br $l)) unreachable)"""
    with start(core(body), deterministic=True, instance=instance, time=0.1) as worker:
        worker.ready()
        backtraces = set()
        for _ in range(2):
            with pytest.raises(CallFailed) as caught:
                worker.invoke("spin")
            assert caught.value.code == "limit"
            assert caught.value.message == "used up its fuel of 20000000 units (time = 0.1 s)"
            backtraces.add(tuple(caught.value.backtrace))
        assert len(backtraces) == 1
        assert worker.invoke("echo", "fine") == "fine"


def test_calls_run_side_by_side_when_the_limits_say_so() -> None:
    with start(core(CALL, imports=HOST), granted=("kv",), concurrency=3) as worker:
        worker.ready()
        waiting = [worker.send("call", '{"call":"kv.keys","args":{"prefix":""}}') for _ in range(3)]
        held = [worker.receive() for _ in waiting]
        assert sorted(frame.call_id for frame in held) == waiting
        assert {frame.kind for frame in held} == {frames.HOST_CALL}
        late = worker.send("echo", "late")
        for call_id in reversed(waiting):
            answer = frames.host_reply_body([str(call_id)])
            worker.connection.sendall(frames.encode(frames.HOST_REPLY, call_id, answer))
        results = {frame.call_id: bytes(frame.body) for frame in (worker.receive() for _ in range(4))}
        assert results == {**{call_id: b'["%d"]' % call_id for call_id in waiting}, late: b"late"}


def test_instances_that_are_made_side_by_side_each_get_the_answers_to_their_own_host_calls() -> None:
    body = r"""(data (i32.const 64) "{\"call\":\"kv.get\",\"args\":{\"key\":\"k\"}}")
      (global $status (mut i32) (i32.const 0))
      (func (export "_initialize")
        (global.set $status (call $host_call (i32.const 64) (i32.const 36)))
        (drop (call $host_answer (i32.const 4096) (i32.const 60000))))
      (func (export "got") (param i32) (result i64)
        (i64.or (i64.shl (i64.const 4096) (i64.const 32)) (i64.extend_i32_u (global.get $status))))"""
    with start(core(body, imports=HOST), granted=("kv",), concurrency=2) as worker:
        worker.answer = lambda call, args: frames.host_reply_body("loaded")

        def asked() -> int:
            frame = worker.receive()
            assert frame.kind == frames.HOST_CALL
            return frame.call_id

        def give(call_id: int, value: str) -> None:
            worker.connection.sendall(frames.encode(frames.HOST_REPLY, call_id, frames.host_reply_body(value)))

        worker.ready()
        assert worker.invoke("got") == '"loaded"'
        first = asked()
        call_id = worker.send("got")  # it comes to the other thread, and there is no instance for it
        assert asked() == call_id
        give(call_id, "in the call")
        assert bytes(worker.wait_for(call_id).body) == b'"in the call"'
        second = asked()
        assert len({0, first, second}) == 3
        give(second, "second")
        assert worker.invoke("got") == '"second"'
        asked()
        give(first, "first")
        assert worker.invoke("got") == '"first"'


def test_a_call_that_has_to_wait_for_its_instance_is_interrupted_when_both_took_its_time() -> None:
    body = r"""(data (i32.const 64) "{\"call\":\"kv.get\",\"args\":{\"key\":\"k\"}}")
      (func (export "_initialize") (drop (call $host_call (i32.const 64) (i32.const 36))))"""
    interrupts_what_waited_for_its_instance(core(body + SPIN, imports=HOST), "echo", "spin")


def test_a_deterministic_call_that_has_to_wait_for_its_instance_has_all_its_fuel() -> None:
    burn = """(local.set $n (i32.const 1000000))
      (loop $l (br_if $l (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))"""
    body = rf"""(data (i32.const 64) "{{\"call\":\"kv.get\",\"args\":{{\"key\":\"k\"}}}}")
      (func (export "_initialize") (local $n i32) {burn})
      (func (export "f") (param i32) (result i64) (local $n i32)
        (drop (call $host_call (i32.const 64) (i32.const 36))) {burn} (i64.const 0))"""
    limits: dict[str, Any] = {"concurrency": 2, "time": 0.04}  # fuel for one and a half of these loops
    with start(core(body, imports=HOST), granted=("kv",), deterministic=True, **limits) as worker:
        worker.ready()
        calls = [worker.send("f"), worker.send("f")]
        asked = [worker.receive().call_id for _ in calls]  # so the second had no instance that was made before
        assert {*asked} == {*calls}
        for call in calls:
            worker.connection.sendall(frames.encode(frames.HOST_REPLY, call, frames.host_reply_body("v")))
        assert [worker.receive().kind for _ in calls] == [frames.RESULT] * 2


@pytest.mark.parametrize("when", ["at the beginning", "for room"])
def test_instances_that_fail_before_their_call_take_no_place_of_later_ones(when: str) -> None:
    body = r"""(data (i32.const 64) "{\"call\":\"kv.get\",\"args\":{\"key\":\"k\"}}")
      (func $ask (result i32)
        (if (i32.lt_s (call $host_call (i32.const 64) (i32.const 36)) (i32.const 0)) (then unreachable))
        (i32.const 1024))"""
    if when == "for room":
        artifact = core(body, imports=HOST, buffer="(call $ask)")
    else:
        artifact = core(body + '(func (export "_initialize") (drop (call $ask)))', imports=HOST)
    with start(artifact, granted=("kv",)) as worker:
        recovers(worker, "echo", "unreachable")


def test_a_call_that_takes_too_long_does_not_end_the_one_beside_it() -> None:

    def ends() -> list[str]:
        with start(core(SPIN + CALL, imports=HOST), granted=("kv",), concurrency=2, time=1.0, patient=False) as worker:
            worker.ready()
            worker.send("spin")
            time.sleep(0.5)
            waiting = worker.send("call", '{"call":"kv.keys","args":{"prefix":""}}')
            received = [worker.receive(), worker.receive()]
            worker.connection.sendall(frames.encode(frames.HOST_REPLY, waiting, frames.host_reply_body([])))
            with suppress(WorkerEnded):
                received.append(worker.receive())
            return [bytes(frame.body).decode() for frame in received]

    asked, spinning, _ = once_it_holds(ends, lambda ends: ends[2:] == ["[]"])
    assert "kv.keys" in asked
    assert "took longer than 1 s" in spinning


def test_many_calls_side_by_side_are_all_answered() -> None:
    with start(core(), concurrency=4) as worker:
        worker.ready()
        sent = {worker.send("echo", f"payload {number}"): f"payload {number}".encode() for number in range(400)}
        received: dict[int, bytes] = {}
        while len(received) < len(sent):
            frame = worker.receive()
            received[frame.call_id] = bytes(frame.body)
        assert received == sent


class TakenMeanwhile(list[Any]):
    """What was in it when one thread looked, another one took."""

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize("kind", [Instances, WasiPlugin])
def test_two_threads_may_clear_away_after_their_calls_at_once(kind: Any) -> None:
    cleared = kind.__new__(kind)
    cleared._spent, cleared._ready = TakenMeanwhile(), ["the next call's"]
    cleared.prepare()


def test_two_workers_do_not_wait_for_each_other() -> None:
    with start(core(SPIN), time=300) as busy, start(core()) as other:
        busy.ready()
        other.ready()
        busy.send("spin")
        assert other.invoke("echo", "x") == "x"
        assert not select.select([busy.connection], [], [], 0)[0], "it does not spin any more"
        busy.process.kill()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("(tag $e) (func (throw $e))", "exceptions"),
        ("(type $f (func)) (func (param (ref null $f)))", "function references"),
        ("(func (result i64 i64) (i64.add128 (i64.const 1) (i64.const 1) (i64.const 1) (i64.const 1)))", "wide arithm"),
        ("(func (drop (ref.i31 (i32.const 1))))", "gc"),
        ("(func (drop (i32.atomic.load (i32.const 0))))", "threads"),
    ],
)
def test_a_feature_that_the_reference_does_not_promise_is_refused_by_name(body: str, reason: str) -> None:
    with start(core(body)) as worker, pytest.raises(CallFailed, match=f"does not support: .*{reason}"):
        worker.ready()


@pytest.mark.parametrize(("memory", "reason"), [("i64 2", "64-bit memory"), ("2 4 shared", "shared memory")])
def test_a_memory_that_the_reference_does_not_promise_is_refused(memory: str, reason: str) -> None:
    with start(core(memory=memory)) as worker, pytest.raises(CallFailed, match=reason):
        worker.ready()


def test_the_name_of_an_export_is_not_taken_for_a_feature() -> None:
    code = core('(func (export "feature")) (func (export "futures"))').replace(b"futures", b"feature")
    with start(code) as worker, pytest.raises(CallFailed, match="it does not compile: duplicate export name `feature`"):
        worker.ready()


@pytest.mark.parametrize(("parameters", "said"), [("i32", []), ("i32 i32", ["gets no events"])])
def test_an_on_event_of_another_type_is_not_called_and_the_log_says_so(parameters: str, said: list[str]) -> None:
    handlers = f"""(func (export "f") (param i32) (result i64) i64.const 0)
      (func (export "on_event") (param {parameters}) (result i64) i64.const 0)"""
    with start(core(handlers)) as worker:
        assert ("on_event" in worker.ready().functions) == (not said)
        assert [message.partition(":")[0] for _, _, message in worker.logs] == said
