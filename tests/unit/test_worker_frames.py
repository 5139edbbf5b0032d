"""Framing and bodies between manager and worker: bytes in, values out."""

from __future__ import annotations

import json

import pytest

from circleosd.worker import frames
from circleosd.worker.frames import Failed, FrameError, Limits, Load, Ready
from circleosd.worker.host import CALLS

LOAD = Load(
    name="example",
    plugin_type="wasm",
    limits=Limits(memory=1 << 20, time=0.5, output=1000, concurrency=3),
    abi="core",
    instance="shared",
    deterministic=True,
    config={"greeting": "grüß dich"},
    granted=("kv", "events:mail"),
    precompiled=True,
)


def test_a_frame_is_body_length_kind_and_call_id_then_the_body() -> None:
    assert frames.encode(frames.RESULT, 7, b"hello") == b"\0\0\0\x05\x12\0\0\0\x07hello"


@pytest.mark.parametrize(("kind", "bound"), list(frames.TO_MANAGER.items()))
def test_a_frame_beyond_its_kinds_bound_is_refused(kind: int, bound: int) -> None:
    frames.check(kind, bound, frames.TO_MANAGER)
    with pytest.raises(FrameError, match="bound"):
        frames.check(kind, bound + 1, frames.TO_MANAGER)


def test_a_worker_cannot_send_what_only_a_manager_sends() -> None:
    for kind in frames.TO_WORKER:
        with pytest.raises(FrameError, match="unknown here"):
            frames.check(kind, 0, frames.TO_MANAGER)


def test_encoding_a_body_beyond_the_bound_fails() -> None:
    with pytest.raises(FrameError, match="bound"):
        frames.encode(frames.HOST_CALL, 1, bytes(frames.MAX_HOST_CALL + 1))


def test_a_load_request_survives_the_wire() -> None:
    assert frames.parse_load(frames.load_body(LOAD)) == LOAD


@pytest.mark.parametrize("change", [{"unknown": 1}, {"limits": None}, {"limits": {"storage": 1}}])
def test_a_load_request_with_an_unknown_field_or_without_limits_is_refused(change: dict[str, object]) -> None:
    value = frames.json_object(frames.load_body(LOAD))
    with pytest.raises(FrameError, match="load request"):
        frames.parse_load(frames.json_body({**value, **change}))


def test_function_and_payload_survive_the_wire() -> None:
    name, payload = frames.split_named(frames.named_body("händler", b"\0\xff payload"))
    assert (name, bytes(payload)) == ("händler", b"\0\xff payload")


@pytest.mark.parametrize("body", [b"", b"\0", b"\0\5abc", b"\0\1\xff"])
def test_a_call_without_a_readable_name_is_refused(body: bytes) -> None:
    with pytest.raises(FrameError):
        frames.split_named(body)


@pytest.mark.parametrize("name", ["", "x" * 129])
def test_a_name_of_no_or_too_many_bytes_is_not_sent(name: str) -> None:
    with pytest.raises(FrameError, match="name"):
        frames.named_body(name, b"")


def test_ready_and_failed_survive_the_wire() -> None:
    ready = Ready("core", ["handle", "größe"], ["circleosd.log"], None, ["seccomp"])
    failed = Failed("plugin-failed", "trap: …", ["explode (offset 0x89)"], restarted=True)
    assert frames.parse_ready(frames.ready_body(ready)) == ready
    assert frames.parse_failed(frames.failed_body(failed)) == failed


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"\xff",
        b"{}",
        b'{"code":"no-such-code","message":"","backtrace":[]}',
        b'{"code":"limit","message":5,"backtrace":[]}',
        b'{"code":"limit","message":"","backtrace":[5]}',
        b"[" * 100_000,
        b'{"code":"limit","message":"\\ud800","backtrace":[]}',
        b'{"code":"limit","message":"","backtrace":[' + b'"x",' * 5000 + b'"x"]}',
    ],
)
def test_what_a_taken_over_worker_reports_is_checked(body: bytes) -> None:
    with pytest.raises(FrameError):
        frames.parse_failed(body)
    with pytest.raises(FrameError):
        frames.parse_ready(body)


@pytest.mark.parametrize(
    "change",
    [
        {"functions": []},
        {"functions": [""]},
        {"functions": ["f"] * 1001},
        {"functions": ["f" * 129]},
        {"functions": ["\ud800"]},
        {"description": "\udfff"},
        {"description": 5},
        {"description": "d" * 4097},
        {"imports": ["i" * 2000]},
        {"imports": ["i"] * 2000},
    ],
)
def test_what_a_taken_over_worker_says_of_its_plugin_is_bounded_text(change: dict[str, object]) -> None:
    ready = Ready("native", ["handle"], [], "fine", ["seccomp"])
    assert frames.parse_ready(json.dumps(ready._asdict()).encode()) == ready
    with pytest.raises(FrameError):
        frames.parse_ready(json.dumps(ready._asdict() | change).encode())


@pytest.mark.parametrize(("level", "counts_as"), [(0, 0), (3, 3), (4, 3), (99, 3), (-1, 3), (-(1 << 31), 3)])
def test_a_level_that_there_is_not_counts_as_an_error(level: int, counts_as: int) -> None:
    assert frames.parse_log(frames.log_body(level, "text")) == (counts_as, "text")


def test_a_long_log_message_is_cut_at_a_characters_end() -> None:
    level, text = frames.parse_log(frames.log_body(7, "ü" * frames.MAX_LOG))
    assert level == 3
    assert text.endswith("ü…")
    assert len(text.encode()) <= frames.MAX_LOG


def test_text_that_utf8_cannot_hold_does_not_stop_a_log_message() -> None:
    assert frames.parse_log(frames.log_body(0, "a\udcffb"))[1] == "a?b"


@pytest.mark.parametrize("body", [b"", b"\x04text"], ids=["nothing", "another level"])
def test_a_log_message_of_no_level_is_refused(body: bytes) -> None:
    with pytest.raises(FrameError, match="no valid level"):
        frames.parse_log(body)


def test_a_host_calls_answer_survives_the_wire() -> None:
    assert frames.parse_host_reply(frames.host_reply_body({"a": ["ä"]})) == (True, {"a": ["ä"]})
    assert frames.parse_host_reply(frames.host_error_body("denied", "no")) == (False, "denied: no")


@pytest.mark.parametrize("text", ["", "a", "\0", '"', "\\", "ü", "😀", "\u2028", "\x7f"])
@pytest.mark.parametrize("call", list(CALLS))
def test_every_host_call_with_any_text_survives_the_wire(call: str, text: str) -> None:
    for count in (1, 100_000):
        args = dict.fromkeys(CALLS[call].arguments, text * count)
        assert frames.parse_host_call(frames.json_body({"call": call, "args": args})) == (call, args)


@pytest.mark.parametrize(
    "body",
    [
        '{"call":"kv.get","args":{' + ",".join(f'"{number}":"a long value"' for number in range(1000)) + "}}",
        '{"call":"kv.get","args":{' + ",".join(['"key":"a"'] * 1000) + "}}",
        '{"call":"kv.get","args":{"key":"a"},"more":[' + ",".join(["[]"] * 1000) + "]}",
        '{"call":"kv.get","args":{"key":"a"}' + " " * 1000 + "}",
        '{"call":"' + "x" * 1000 + '","args":{}}',
    ],
    ids=["arguments", "duplicates", "members", "spaces", "name"],
)
def test_a_host_call_with_more_than_a_call_and_its_arguments_is_refused(body: str) -> None:
    with pytest.raises(FrameError, match="more than a call and its arguments"):
        frames.parse_host_call(body.encode())


def test_a_host_call_with_other_than_text_arguments_is_refused() -> None:
    assert frames.parse_host_call(b'{"call":"kv.get","args":{"key":"a"}}') == ("kv.get", {"key": "a"})
    for body in (b'{"call":1,"args":{}}', b'{"call":"kv.get","args":[]}', b'{"call":"kv.get","args":{"key":1}}'):
        with pytest.raises(FrameError):
            frames.parse_host_call(body)
