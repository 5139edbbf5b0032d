"""Components in a real worker: the world's exports, its interfaces, WASI."""

from __future__ import annotations

import time
from typing import Any

import pytest

from circleosd.worker import frames
from tests.component_text import another, component
from tests.core_text import wat
from tests.measuring import once_it_holds
from tests.worker_driver import CallFailed, WorkerEnded, interrupts_what_waited_for_its_instance, recovers, start

RESULT = "(result (result {} (error string)))"
CAN = '(canon lower (func $h "{}") (memory $memory) (realloc $realloc))'
SERVICE = """(type $s' (record (field "name" string) (field "state" string) (field "description" string)))
  (export "service" (type $s (eq $s')))"""


def interface(name: str, function: str, parameters: str, result: str, types: str = "") -> str:
    """The import of one interface with one function, lowered as `$call`."""
    return f"""(import "circleosd:plugin/{name}@0.1.0" (instance $h {types}
        (export "{function}" (func {parameters} {result}))))
      (core func $call {CAN.format(function)})"""


# After a host call has left its result at 64: an error is returned as such, anything else as the body says.
def unless_error(body: str) -> str:
    return f"""(if (result i32) (i32.load8_u (i32.const 64))
      (then (call $error (i32.load (i32.const 68)) (i32.load (i32.const 72)))) (else {body}))"""


TEXT_IF_ANY = """(if (result i32) (i32.load8_u (i32.const 68))
  (then (call $ok (i32.load (i32.const 72)) (i32.load (i32.const 76))))
  (else (call $ok (i32.const 0) (i32.const 0))))"""
PAYLOAD = "(local.get $ptr) (local.get $len)"
NOTHING = "(call $ok (i32.const 0) (i32.const 0))"
AT_300 = "(call $ok (i32.const 300) (i32.const 1))"
FAILS = "(result (result (error string)))"
ONE = "(param i32 i32 i32)"


def test_a_component_answers_with_its_payload() -> None:
    with start(component()) as worker:
        ready = worker.ready()
        assert (ready.abi, ready.functions) == ("component", ["handle"])
        for payload in ("", "x", "größe ✓", "x" * 100_000):
            assert worker.invoke("handle", payload) == payload


def test_a_component_may_import_names_of_types_which_ask_nothing_of_the_host() -> None:
    used = f"""(import "circleosd:plugin/services@0.1.0" (instance $i {SERVICE}))
      (alias export $i "service" (type $service))
      (import "service" (type $used (eq $service)))"""
    with start(component(imports=used)) as worker:
        assert worker.ready().imports == ["circleosd:plugin/services@0.1.0"]
        assert worker.invoke("handle", "x") == "x"


def test_a_cached_component_is_not_compiled_again() -> None:
    with start(component()) as worker:
        worker.ready()
    with start(component(), worker.compiled) as second:
        second.ready()
        assert second.compiled == b""
        assert second.invoke("handle", "x") == "x"


def test_further_exports_of_handles_type_can_be_called_and_others_not() -> None:
    exports = (
        another("second", "second") + """(func (export "number") (result u32) (canon lift (core func $i "number")))"""
    )
    body = """(func (export "second") (param i32 i32) (result i32) (call $error (local.get 0) (local.get 1)))
      (func (export "number") (result i32) (i32.const 1))"""
    with start(component(body=body, exports=exports)) as worker:
        assert worker.ready().functions == ["handle", "second"]
        with pytest.raises(CallFailed) as caught:
            worker.invoke("second", "the plugin's own words")
        assert (caught.value.code, caught.value.message) == ("plugin-failed", "the plugin's own words")
        with pytest.raises(CallFailed, match="has no function 'number': it has handle, second"):
            worker.invoke("number")


def test_of_a_components_functions_those_that_can_be_called_are_counted() -> None:
    others = "".join(f'(func (export "f{n}") (canon lift (core func $i "nothing")))' for n in range(1000))
    with start(component(body='(func (export "nothing"))', exports=others)) as worker:
        assert worker.ready().functions == ["handle"]
    with (
        start(component(exports="".join(another(f"f{n}", "handle") for n in range(1000)))) as worker,
        pytest.raises(CallFailed, match="it has 1001 functions to call: at most 1000 are allowed") as caught,
    ):
        worker.ready()
    assert caught.value.code == "bad-request"


def test_a_handle_of_another_type_is_refused_with_both_types() -> None:
    text = """(component (core module $m (func (export "f") (result i32) i32.const 1))
      (core instance $i (instantiate $m))
      (func (export "handle") (result u32) (canon lift (core func $i "f"))))"""
    with start(wat(text)) as worker, pytest.raises(CallFailed) as caught:
        worker.ready()
    assert caught.value.message == ("it exports handle as func() -> …, not as func(string) -> result<string, string>")


def test_a_handle_of_the_asynchronous_abi_is_refused() -> None:
    text = """(component
      (core module $m
        (memory (export "memory") 1)
        (func (export "realloc") (param i32 i32 i32 i32) (result i32) unreachable)
        (func (export "handle") (param i32 i32) (result i32) unreachable)
        (func (export "callback") (param i32 i32 i32) (result i32) unreachable))
      (core instance $i (instantiate $m))
      (alias core export $i "memory" (core memory $memory))
      (alias core export $i "realloc" (core func $realloc))
      (alias core export $i "callback" (core func $callback))
      (func (export "handle") async (param "payload" string) (result (result string (error string)))
        (canon lift (core func $i "handle") (memory $memory) (realloc $realloc) async (callback $callback))))"""
    with start(wat(text)) as worker, pytest.raises(CallFailed) as caught:
        worker.ready()
    wanted = "func(string) -> result<string, string>"
    assert caught.value.message in (
        f"it exports handle as async {wanted}, not as {wanted}",
        # Wasmtime before 46.
        "it needs a feature that this host does not support: "
        "async component functions require the component model async feature (at offset 0xae)",
    )


HOOKS = """
  (global $inits (mut i32) (i32.const 0))
  (data (i32.const 300) "a description")
  (func (export "describe") (result i32)
    (i32.store (i32.const 32) (i32.const 300)) (i32.store (i32.const 36) (i32.const 13)) (i32.const 32))
  (func (export "init") (result i32)
    (global.set $inits (i32.add (global.get $inits) (i32.const 1)))
    (i32.store8 (i32.const 400) (i32.add (i32.const 48) (global.get $inits)))
    (i32.store8 (i32.const 16) (i32.const 0)) (i32.const 16))
  (func (export "on-event") (param i32 i32 i32 i32) (result i32)
    (i32.store8 (i32.const 401) (i32.load8_u (local.get 0)))
    (i32.store8 (i32.const 402) (i32.load8_u (local.get 2)))
    (i32.store8 (i32.const 16) (i32.const 0)) (i32.const 16))"""
LIFT = '(canon lift (core func $i "{}") (memory $memory) (realloc $realloc))'
HOOK_EXPORTS = f"""
  (func (export "describe") (result string) {LIFT.format("describe")})
  (func (export "init") (result (result (error string))) {LIFT.format("init")})
  (func (export "on-event") (param "topic" string) (param "payload" string) (result (result (error string)))
    {LIFT.format("on-event")})"""


@pytest.mark.parametrize("instance", ["fresh", "shared"])
def test_describe_init_and_on_event_are_called_when_they_are_there(instance: str) -> None:
    artifact = component(body=HOOKS, exports=HOOK_EXPORTS, handle="(call $ok (i32.const 400) (i32.const 3))")
    with start(artifact, instance=instance) as worker:
        ready = worker.ready()
        assert (ready.description, ready.functions) == ("a description", ["handle"])
        assert worker.invoke("handle") == "1\0\0"
        assert worker.wait_for(worker.send("topic", "payload", frames.EVENT)).body == b""
        assert worker.invoke("handle") == ("1tp" if instance == "shared" else "1\0\0")


def asking(**parts: Any) -> bytes:
    """A component whose `init` makes a host call, and fails if that does."""
    begin = """(func (export "init") (result i32)
      (call $call (i32.const 300) (i32.const 1) (i32.const 64))
      (i32.store8 (i32.const 16) (i32.load8_u (i32.const 64))) (i32.const 16))"""
    return component(
        imports=interface("kv", "get", '(param "key" string)', RESULT.format("(option string)")),
        host=(f"call {ONE}",),
        body=begin,
        exports=f'(func (export "init") {FAILS} {LIFT.format("init")})',
        **parts,
    )


def test_instances_that_fail_to_begin_take_no_place_of_later_ones() -> None:
    with start(asking(), granted=("kv",)) as worker:
        recovers(worker, "handle", "its init failed")


def test_each_instance_that_is_made_for_loading_has_the_time_of_a_call() -> None:
    def slowly(call: str, args: dict[str, str]) -> bytes:
        time.sleep(0.8)
        return frames.host_reply_body("made")

    def end() -> str:
        with start(asking(), granted=("kv",), time=1.0, patient=False) as worker:
            worker.answer = slowly
            try:
                assert worker.ready().functions == ["handle"]
                return worker.invoke("handle", "x")
            except (CallFailed, WorkerEnded, ConnectionError) as failed:
                return str(failed)

    once_it_holds(end, lambda end: end == "x")


def test_a_call_that_has_to_wait_for_its_instance_is_interrupted_when_both_took_its_time() -> None:
    spins = "(loop $again (br_if $again (i32.eq (local.get $len) (i32.const 4))))"  # with the payload "spin"
    artifact = asking(handle=f"{spins} (call $ok (local.get $ptr) (local.get $len))")
    interrupts_what_waited_for_its_instance(artifact, "handle", "handle", "spin")


@pytest.mark.parametrize(("length", "says"), [(0, "failed without a message"), (20, "x" * 20)])
def test_an_error_is_told_as_the_plugin_words_it_whatever_its_limit_for_output(length: int, says: str) -> None:
    with start(component(handle=f"(call $error (local.get $ptr) (i32.const {length}))"), output=10) as worker:
        worker.ready()
        with pytest.raises(CallFailed) as caught:
            worker.invoke("handle", "x" * 20)
        assert (caught.value.code, caught.value.message) == ("plugin-failed", says)
        assert caught.value.failed.reported


def test_a_reply_above_the_limit_for_output_costs_a_shared_instance_nothing() -> None:
    with start(component(), instance="shared", output=10) as worker:
        worker.ready()
        with pytest.raises(CallFailed, match="its limit for output is 10 bytes") as caught:
            worker.invoke("handle", "x" * 11)
        assert not caught.value.failed.restarted
        assert worker.invoke("handle", "x" * 10) == "x" * 10


def test_each_call_of_a_shared_instance_has_all_the_fuel() -> None:
    half = """(loop $l (local.set $len (i32.add (local.get $len) (i32.const 1)))
        (br_if $l (i32.lt_u (local.get $len) (i32.const 150000))))
      (call $ok (local.get $ptr) (i32.const 1))"""
    with start(component(handle=half), instance="shared", deterministic=True, time=0.01) as worker:
        worker.ready()
        assert [worker.invoke("handle", "x") for _ in range(4)] == ["x"] * 4


def test_a_long_description_is_cut_between_two_characters() -> None:
    body = f"""(data (i32.const 4000) "x{"é" * 3000}")
      (func (export "describe") (result i32)
        (i32.store (i32.const 32) (i32.const 4000)) (i32.store (i32.const 36) (i32.const 6001)) (i32.const 32))"""
    exports = f'(func (export "describe") (result string) {LIFT.format("describe")})'
    with start(component(body=body, exports=exports)) as worker:
        assert worker.ready().description == "x" + "é" * 2047


def test_an_init_that_fails_refuses_the_plugin_with_its_words() -> None:
    body = """(data (i32.const 300) "no database")
      (func (export "init") (result i32) (call $error (i32.const 300) (i32.const 11)))"""
    exports = f'(func (export "init") (result (result (error string))) {LIFT.format("init")})'
    with start(component(body=body, exports=exports)) as worker, pytest.raises(CallFailed) as caught:
        worker.ready()
    assert (caught.value.code, caught.value.message) == ("plugin-failed", "its init failed: no database")


def test_an_export_of_a_hooks_name_and_another_type_is_left_alone() -> None:
    body = '(func (export "init") (param i32) unreachable) (func (export "on-event") (result i32) unreachable)'
    exports = """(func (export "init") (param "way" u32) (canon lift (core func $i "init")))
      (func (export "on-event") (result u32) (canon lift (core func $i "on-event")))"""
    with start(component(body=body, exports=exports)) as worker:
        assert worker.ready().functions == ["handle"]
        expected = "it exports on-event as func() -> …, not as func(string, string) -> result<_, string>"
        assert worker.logs == [(0, 2, f"gets no events: {expected}")]  # and nothing of init
        assert worker.invoke("handle", "x") == "x"
        with pytest.raises(CallFailed, match="takes no events"):
            worker.wait_for(worker.send("topic", "payload", frames.EVENT))


def test_a_component_without_on_event_takes_none() -> None:
    with start(component()) as worker:
        worker.ready()
        with pytest.raises(CallFailed, match="takes no events") as caught:
            worker.wait_for(worker.send("topic", "payload", frames.EVENT))
        assert caught.value.code == "not-found"


@pytest.mark.parametrize("instance", ["fresh", "shared"])
def test_a_trap_is_reported_with_its_function_and_the_next_call_works(instance: str) -> None:
    handle = "(if (local.get $len) (then (unreachable))) (call $ok (i32.const 0) (i32.const 0))"
    with start(component(handle=handle), instance=instance) as worker:
        worker.ready()
        for _ in range(3):
            with pytest.raises(CallFailed) as caught:
                worker.invoke("handle", "x")
            assert caught.value.message == "trap: wasm `unreachable` instruction executed"
            assert caught.value.backtrace[0].startswith("handle ")
            assert caught.value.failed.restarted == (instance == "shared")
            assert worker.invoke("handle", "") == ""


@pytest.mark.parametrize(
    ("handle", "code", "message"),
    [
        ("(call $ok (i32.const 0) (i32.const 0x7fffffff))", "plugin-failed", "string"),
        ("(call $ok (i32.const -8) (i32.const 16))", "plugin-failed", "string"),
        ("(i32.const -16)", "plugin-failed", "pointer"),
        ("(i32.const 3)", "plugin-failed", "pointer"),
        ("(call $area (i32.const 7) (i32.const 0) (i32.const 0))", "plugin-failed", "discriminant"),
        (f"(i32.store8 (i32.const 300) (i32.const 255)) {AT_300}", "plugin-failed", "utf-8"),
        ("(loop $l (br $l)) unreachable", "timeout", "took longer than 0.3 s"),
        ("(call $ok (i32.const 1024) (i32.const 600000))", "limit", "gave a reply of 600000 bytes: its limit"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("instance", ["fresh", "shared"])
def test_a_bad_reply_fails_the_call_alone(handle: str, code: str, message: str, instance: str) -> None:
    handle = f"(if (result i32) (local.get $len) (then {handle}) (else (call $ok (i32.const 0) (i32.const 0))))"
    with start(component(handle=handle), time=0.3, output=500_000, instance=instance) as worker:
        worker.ready()
        for _ in range(2):
            with pytest.raises(CallFailed) as caught:
                worker.invoke("handle", "x")
            assert caught.value.code == code
            assert message in caught.value.message
            assert worker.invoke("handle", "") == ""


def test_a_host_call_brings_an_optional_text() -> None:
    stored = {"here": "wert ✓"}
    with start(calling("kv.get"), granted=("kv",)) as worker:
        worker.answer = lambda call, args: frames.host_reply_body(stored.get(args["key"]))
        assert worker.ready().imports == ["circleosd:plugin/kv@0.1.0"]
        assert worker.invoke("handle", "here") == "wert ✓"
        assert worker.invoke("handle", "not here") == ""
        assert worker.host_calls == [("kv.get", {"key": "here"}), ("kv.get", {"key": "not here"})]


def test_an_interface_that_was_not_granted_is_linked_and_says_what_is_missing() -> None:
    with start(calling("kv.get")) as worker:
        worker.ready()
        with pytest.raises(CallFailed) as caught:
            worker.invoke("handle", "here")
        assert caught.value.message == "denied: this plugin has not been granted the capability kv"
        assert worker.host_calls == []


NGINX = {"name": "nginx", "state": "active", "description": "a web server"}
NEXT = "(i32.load (i32.add (i32.load (i32.const 68)) (i32.const {})))"
CALLS = {
    "kv.get": (
        interface("kv", "get", '(param "key" string)', RESULT.format("(option string)")),
        ONE, PAYLOAD, TEXT_IF_ANY, "wert ✓", "wert ✓",
    ),
    "kv.set": (
        interface("kv", "set", '(param "key" string) (param "value" string)', "(result (result (error string)))"),
        "(param i32 i32 i32 i32 i32)", f"{PAYLOAD} {PAYLOAD}", f"(call $ok {PAYLOAD})", None, "payload",
    ),
    "kv.delete": (
        interface("kv", "delete", '(param "key" string)', RESULT.format("bool")),
        ONE, PAYLOAD, "(call $ok (local.get $ptr) (i32.load8_u (i32.const 68)))", True, "p",
    ),
    "kv.keys": (
        interface("kv", "keys", '(param "prefix" string)', RESULT.format("(list string)")),
        ONE, PAYLOAD, f"(call $ok {NEXT.format(8)} {NEXT.format(12)})", ["a", "zweiter ✓"], "zweiter ✓",
    ),
    "services.status": (
        interface("services", "status", '(param "name" string)', RESULT.format("$s"), SERVICE),
        ONE, PAYLOAD, "(call $ok (i32.load (i32.const 76)) (i32.load (i32.const 80)))", NGINX, "active",
    ),
    "services.list": (
        interface("services", "list", "", RESULT.format("(list $s)"), SERVICE),
        "(param i32)", "", f"(call $ok {NEXT.format(40)} {NEXT.format(44)})", [NGINX, NGINX], "a web server",
    ),
    "services.restart": (
        interface("services", "restart", '(param "name" string)', "(result (result (error string)))"),
        ONE, PAYLOAD, f"(call $ok {PAYLOAD})", None, "payload",
    ),
    "events.emit": (
        interface("events", "emit", '(param "topic" string) (param "payload" string)', FAILS),
        "(param i32 i32 i32 i32 i32)", f"{PAYLOAD} {PAYLOAD}", f"(call $ok {PAYLOAD})", None, "payload",
    ),
}  # fmt: skip


GRANTED = ("kv", "services:read", "services:restart:payload", "events:*")


def calling(call: str) -> bytes:
    """A component that makes that call and answers with what it brings."""
    imports, parameters, arguments, then, _, _ = CALLS[call]
    return component(
        imports=imports,
        host=(f"call {parameters}",),
        handle=f"(call $call {arguments} (i32.const 64)) {unless_error(then)}",
    )


def test_an_answer_of_another_type_fails_the_call_alone() -> None:
    with start(calling("kv.keys"), granted=GRANTED) as worker:
        answers = iter((["a", 5], ["a", "b"]))
        worker.answer = lambda call, args: frames.host_reply_body(next(answers))
        worker.ready()
        with pytest.raises(CallFailed, match="plugin-failed: internal fault of the worker in a host function"):
            worker.invoke("handle", "payload")
        assert worker.invoke("handle", "payload") == "b"


@pytest.mark.parametrize("call", list(CALLS))
def test_each_host_call_takes_and_brings_its_types(call: str) -> None:
    data, reply = CALLS[call][4:]
    artifact = calling(call)
    with start(artifact, granted=GRANTED) as worker, start(artifact, granted=GRANTED) as refused:
        worker.answer = lambda call, args: frames.host_reply_body(data)
        worker.ready()
        assert worker.invoke("handle", "payload") == reply
        assert worker.host_calls[0][0] == call
        assert set(worker.host_calls[0][1].values()) <= {"payload"}
        refused.answer = lambda call, args: frames.host_error_body("conflict", "not now")
        refused.ready()
        with pytest.raises(CallFailed, match=r"^plugin-failed: conflict: not now$"):
            refused.invoke("handle", "payload")


def test_the_clock_and_the_configuration_are_answered_in_the_worker() -> None:
    clock = component(
        imports=interface("clock", "now", "", RESULT.format("u64")),
        host=("call (param i32)",),
        handle="""(call $call (i32.const 64)) (i64.store (i32.const 300) (i64.load (i32.const 72)))
          (if (i64.lt_u (i64.load (i32.const 300)) (i64.const 1600000000000)) (then unreachable))
          (call $ok (i32.const 0) (i32.const 0))""",
    )
    config = component(
        imports=interface("config", "get", '(param "key" string)', RESULT.format("(option string)")),
        host=(f"call {ONE}",),
        handle=f"(call $call {PAYLOAD} (i32.const 64)) {unless_error(TEXT_IF_ANY)}",
    )
    with start(clock, granted=("clock",)) as first, start(config, granted=("config",), config={"a": "ä"}) as second:
        first.ready()
        assert first.invoke("handle") == ""
        second.ready()
        assert second.invoke("handle", "a") == "ä"
        assert first.host_calls == second.host_calls == []


def logs(text: str, memory: str = "17") -> bytes:
    """A component that logs what is at an address, `text`, as a warning."""
    types = """(type $l' (enum "debug" "info" "warning" "error")) (export "level" (type $l (eq $l')))"""
    return component(
        imports=interface("log", "write", '(param "level" $l) (param "message" string)', "", types),
        host=("call (param i32 i32 i32)",),
        handle=f"(call $call (i32.const 2) {text}) (call $ok (i32.const 0) (i32.const 0))",
        memory=memory,
    )


def test_a_text_of_most_of_the_memory_is_cut_in_the_log_and_too_long_for_a_host_call() -> None:
    long = "(i32.const 65536) (i32.const 40000000)"
    with start(logs(long, memory="700")) as worker:
        worker.ready()
        assert worker.invoke("handle") == ""
        assert [(level, len(text.encode())) for _, level, text in worker.logs] == [(2, frames.MAX_LOG)]
    artifact = component(
        imports=interface("kv", "get", '(param "key" string)', RESULT.format("(option string)")),
        host=(f"call {ONE}",),
        handle=f"(call $call {long} (i32.const 64)) {unless_error(TEXT_IF_ANY)}",
        memory="700",
    )
    with start(artifact, granted=("kv",)) as worker:
        worker.ready()
        with pytest.raises(CallFailed, match="limit: a host call may have at most 1048576 bytes as JSON"):
            worker.invoke("handle")


def test_a_reply_of_almost_all_of_the_memory_is_told_to_be_too_long() -> None:
    with start(component(memory="1000", handle="(call $ok (i32.const 65536) (i32.const 65000000))")) as worker:
        worker.ready()
        for _ in range(2):
            with pytest.raises(CallFailed, match="gave a reply of 65000000 bytes") as caught:
                worker.invoke("handle")
            assert caught.value.code == "limit"


def test_log_messages_carry_call_and_level() -> None:
    with start(logs(PAYLOAD)) as worker:
        worker.ready()
        worker.invoke("handle", "Grüße")
        assert worker.logs == [(1, 2, "Grüße")]


OTHER_TYPES = {
    "number for text": (
        '(param "key" u64)', RESULT.format("(option string)"), "(param i64 i32)", "(i64.const 77) (i32.const 64)"
    ),
    "one too few": ("", RESULT.format("(option string)"), "(param i32)", "(i32.const 64)"),
    "one too many": (
        '(param "key" string) (param "more" u64)', RESULT.format("(option string)"),
        "(param i32 i32 i64 i32)", f"{PAYLOAD} (i64.const -1) (i32.const 64)",
    ),
    "no result": ('(param "key" string)', "", "(param i32 i32)", PAYLOAD),
    "another result": ('(param "key" string)', RESULT.format("u32"), ONE, f"{PAYLOAD} (i32.const 64)"),
    "a bare result": ('(param "key" string)', "(result u64)", "(param i32 i32) (result i64)", f"{PAYLOAD} drop"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(OTHER_TYPES))
def test_a_host_function_imported_with_another_type_fails_the_call_alone(case: str) -> None:
    parameters, result, core_type, arguments = OTHER_TYPES[case]
    call = f"(call $call {arguments})" if not arguments.endswith("drop") else f"(drop (call $call {PAYLOAD}))"
    artifact = component(
        imports=interface("kv", "get", parameters, result),
        host=(f"call {core_type}",),
        handle=f"(if (local.get $len) (then {call})) (call $ok (i32.const 0) (i32.const 0))",
    )
    with start(artifact, granted=("kv",)) as worker:
        worker.answer = lambda call, args: frames.host_reply_body("x")
        worker.ready()
        with pytest.raises(CallFailed) as caught:
            worker.invoke("handle", "x")
        assert caught.value.code == "plugin-failed"
        assert "type" in caught.value.message
        assert worker.invoke("handle", "") == ""


POLL = """
  (import "wasi:io/poll@0.2.0" (instance $poll
    (export "pollable" (type $p (sub resource)))
    (export "[method]pollable.block" (func (param "self" (borrow $p))))))
  (alias export $poll "pollable" (type $pollable))
  (import "wasi:clocks/monotonic-clock@0.2.0" (instance $clock
    (export "pollable" (type $p (eq $pollable)))
    (export "subscribe-duration" (func (param "when" u64) (result (own $p))))))
  (core func $block (canon lower (func $poll "[method]pollable.block")))
  (core func $subscribe (canon lower (func $clock "subscribe-duration")))"""
SLEEP = component(
    imports=POLL,
    host=("block (param i32)", "subscribe (param i64) (result i32)"),
    # As many milliseconds as the payload has bytes.
    handle=f"""(call $block (call $subscribe (i64.mul (i64.const 1000000) (i64.extend_i32_u (local.get $len)))))
      (call $ok {PAYLOAD})""",
)


@pytest.mark.parametrize("instance", ["fresh", "shared"])
def test_what_a_component_does_after_its_return_belongs_to_the_call(instance: str) -> None:
    after = """(alias core export $i "after" (core func $after))
      (func (export "freed") (param "payload" string) (result (result string (error string)))
        (canon lift (core func $i "handle") (memory $memory) (realloc $realloc) (post-return $after)))"""
    body = '(func (export "after") (param i32) (if (i32.load8_u (i32.const 16)) (then unreachable)))'
    handle = "(call $area (local.get $len) (i32.const 0) (i32.const 0))"  # an error, and a trap, for one byte
    with start(component(handle=handle, body=body, exports=after), instance=instance) as worker:
        worker.ready()
        for _ in range(2):
            assert worker.invoke("freed") == ""
            with pytest.raises(CallFailed) as caught:
                worker.invoke("freed", "x")
            assert caught.value.message == "trap: wasm `unreachable` instruction executed"


def test_an_import_of_wasi_that_is_not_there_is_named() -> None:
    imports = '(import "wasi:cli/nothing@0.2.0" (instance (export "f" (func))))'
    with start(component(imports=imports)) as worker, pytest.raises(CallFailed) as caught:
        worker.ready()
    assert "imports instance `wasi:cli/nothing@0.2.0`" in caught.value.message
    assert "\n" not in caught.value.message


def test_wasi_is_there_for_components_that_import_it() -> None:
    with start(SLEEP) as worker:
        worker.ready()
        assert worker.invoke("handle", "x" * 20) == "x" * 20


def test_a_component_that_blocks_in_wasi_beyond_its_time_ends_with_its_worker() -> None:
    with start(SLEEP, time=0.3, patient=False) as worker:
        worker.ready()
        with pytest.raises(WorkerEnded) as ended:
            worker.invoke("handle", "x" * 60_000)
        assert ended.value.status == -14


ENVIRONMENT = component(
    imports="""
      (import "wasi:cli/environment@0.2.0" (instance $env
        (export "get-environment" (func (result (list (tuple string string)))))))
      (core func $get (canon lower (func $env "get-environment") (memory $memory) (realloc $realloc)))""",
    host=("get (param i32)",),
    handle="""(call $get (i32.const 64))
      (if (result i32) (i32.load (i32.const 68))
        (then (call $ok (i32.load (i32.add (i32.load (i32.const 64)) (i32.const 8)))
                        (i32.load (i32.add (i32.load (i32.const 64)) (i32.const 12)))))
        (else (call $ok (i32.const 0) (i32.const 0))))""",
)


def test_a_components_environment_is_its_configuration_if_granted() -> None:
    config = {"GREETING": "grüß dich"}
    with start(ENVIRONMENT, config=config, granted=("config",)) as granted, start(ENVIRONMENT, config=config) as denied:
        granted.ready()
        denied.ready()
        assert granted.invoke("handle") == "grüß dich"
        assert denied.invoke("handle") == ""


OUTPUTS = """
  (import "wasi:io/error@0.2.0" (instance $error (export "error" (type (sub resource)))))
  (alias export $error "error" (type $failure))
  (import "wasi:io/streams@0.2.0" (instance $streams
    (export "error" (type $e (eq $failure)))
    (type $s' (variant (case "last-operation-failed" (own $e)) (case "closed")))
    (export "stream-error" (type $s (eq $s')))
    (export "output-stream" (type $o (sub resource)))
    (export "[method]output-stream.blocking-write-and-flush"
      (func (param "self" (borrow $o)) (param "contents" (list u8)) (result (result (error $s)))))))
  (alias export $streams "output-stream" (type $stream))
  (import "wasi:cli/stdout@0.2.0" (instance $stdout
    (export "output-stream" (type $o (eq $stream)))
    (export "get-stdout" (func (result (own $o))))))
  (import "wasi:cli/stderr@0.2.0" (instance $stderr
    (export "output-stream" (type $o (eq $stream)))
    (export "get-stderr" (func (result (own $o))))))
  (import "wasi:cli/exit@0.2.0" (instance $exit (export "exit" (func (param "status" (result))))))
  (core func $out (canon lower (func $stdout "get-stdout")))
  (core func $err (canon lower (func $stderr "get-stderr")))
  (core func $exit' (canon lower (func $exit "exit")))
  (core func $write (canon lower (func $streams "[method]output-stream.blocking-write-and-flush")
    (memory $memory)))"""
OUTPUTS_HOST = ("out (result i32)", "err (result i32)", "exit' (param i32)", "write (param i32 i32 i32 i32)")


def test_what_a_component_writes_to_stderr_is_logged_by_line() -> None:
    handle = f"(call $write (call $err) {PAYLOAD} (i32.const 64)) {NOTHING}"
    with start(component(imports=OUTPUTS, host=OUTPUTS_HOST, handle=handle)) as worker:
        worker.ready()
        worker.invoke("handle", "first line\nsecond ✓")
        assert worker.logs == [(1, 1, "first line"), (1, 1, "second ✓")]


def test_a_component_that_exits_has_failed_with_its_last_line_of_stderr() -> None:
    handle = f"""(call $write (call $err) {PAYLOAD} (i32.const 64))
      (call $write (call $out) (local.get $ptr) (i32.const 3) (i32.const 64)) (call $exit' (i32.const 1)) unreachable"""
    with start(component(imports=OUTPUTS, host=OUTPUTS_HOST, handle=handle)) as worker:
        worker.ready()
        with pytest.raises(CallFailed) as caught:
            worker.invoke("handle", "all is lost")
        assert worker.logs == [(1, 1, "all"), (1, 1, "all is lost")]
    assert caught.value.message == "exited with status 1: all is lost"


def test_a_component_that_traps_has_failed_with_its_last_line_of_stderr() -> None:
    handle = f"(call $write (call $err) {PAYLOAD} (i32.const 64)) unreachable"
    with start(component(imports=OUTPUTS, host=OUTPUTS_HOST, handle=handle)) as worker:
        worker.ready()
        with pytest.raises(CallFailed) as caught:
            worker.invoke("handle", "all is lost\nnote: read the manual")
    assert caught.value.message == "trap: wasm `unreachable` instruction executed: all is lost"


@pytest.mark.parametrize("said", ["", "\tmain.go:5"], ids=["silence", "a stack trace"])
def test_a_shared_component_that_gives_no_reason_is_not_given_the_words_of_an_earlier_call(said: str) -> None:
    handle = f"""(if (local.get $len) (then (call $write (call $err) {PAYLOAD} (i32.const 64))))
      (if (i32.or (i32.eqz (local.get $len)) (i32.eq (i32.load8_u (local.get $ptr)) (i32.const 9)))
        (then (call $exit' (i32.const 1)))) {NOTHING}"""
    with start(component(imports=OUTPUTS, host=OUTPUTS_HOST, handle=handle), instance="shared") as worker:
        worker.ready()
        worker.invoke("handle", "almost\ndone")
        with pytest.raises(CallFailed) as caught:
            worker.invoke("handle", said)
    assert caught.value.message == "exited with status 1"
