"""Host calls as plugin code makes them: what is granted, what is answered, what is passed on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from circleosd.worker import frames
from circleosd.worker.frames import LOG, Buffer, Load
from circleosd.worker.host import CALLS, LOG_BUDGET, Host, is_covered, needed_capability


class Manager:
    """Remembers what the worker sends, and answers host calls with their own arguments."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int, bytes]] = []
        self.asked: list[tuple[int, Any]] = []
        self.reply: bytes | None = None

    def send(self, kind: int, call_id: int, body: Buffer) -> None:
        self.sent.append((kind, call_id, bytes(body)))

    def ask(self, call_id: int, body: Buffer) -> Buffer:
        request = json.loads(bytes(body))
        self.asked.append((call_id, request))
        return self.reply if self.reply is not None else frames.host_reply_body(request["args"])


def host(manager: Manager, *granted: str, config: dict[str, str] | None = None) -> Host:
    return Host(Load("example", "wasm", granted=granted, config=config or {}), manager.send, manager.ask)


def test_a_granted_call_goes_to_the_manager_under_its_calls_id() -> None:
    manager = Manager()
    tested = host(manager, "kv")
    tested.begin(17)
    assert tested.call_json(b'{"call":"kv.get","args":{"key":"a"}}') == (True, b'{"key":"a"}')
    assert manager.asked == [(17, {"call": "kv.get", "args": {"key": "a"}})]


@pytest.mark.parametrize(("length", "fits"), [(500_000, True), (600_000, False)])
def test_a_request_is_as_long_as_its_json(length: int, fits: bool) -> None:
    manager = Manager()
    manager.reply = frames.host_reply_body(None)
    answer = host(manager, "kv").call("kv.set", {"key": "a", "value": '"' * length})
    assert answer == ((True, None) if fits else (False, "limit: a host call may have at most 1048576 bytes as JSON"))
    assert len(manager.asked) == fits


@pytest.mark.parametrize("call", sorted(CALLS))
def test_a_call_that_was_not_granted_names_its_capability_and_reaches_nobody(call: str) -> None:
    manager = Manager()
    args = {name: f"the-{name}" for name in CALLS[call].arguments}
    ok, answer = host(manager, "nothing").call_json(json.dumps({"call": call, "args": args}).encode())
    assert not ok
    capability = needed_capability(call, args)
    assert answer.decode() == f"denied: this plugin has not been granted the capability {capability}"
    assert manager.asked == []


def test_a_capability_holds_for_the_named_object_only() -> None:
    granted = ("services:restart:nginx", "events:*")
    assert is_covered("services:restart:nginx", granted)
    assert not is_covered("services:restart:sshd", granted)
    assert not is_covered("services:read", granted)
    assert is_covered("events:mail", granted)
    assert is_covered("services:restart:a:b", ("services:restart:*",))
    assert not is_covered("kv", ("*", "kv:*"))


def test_configuration_is_answered_here_and_only_if_granted() -> None:
    manager = Manager()
    config = {"b": "2", "a": "1"}
    granted, denied = host(manager, "config", config=config), host(manager, config=config)
    assert granted.call_json(b'{"call":"config.get","args":{"key":"a"}}') == (True, b'"1"')
    assert granted.call_json(b'{"call":"config.get","args":{"key":"c"}}') == (True, b"null")
    assert granted.call_json(b'{"call":"config.keys"}') == (True, b'["a","b"]')
    assert granted.config == config
    assert not denied.call_json(b'{"call":"config.keys"}')[0]
    assert denied.config == {}
    assert manager.asked == []


def test_the_clock_goes_forward() -> None:
    tested = host(Manager(), "clock")
    times = [int(tested.call_json(b'{"call":"clock.monotonic"}')[1]) for _ in range(3)]
    assert times == sorted(times)
    assert int(tested.call_json(b'{"call":"clock.now"}')[1]) > 1_600_000_000_000


@pytest.mark.parametrize("request_text", [b"[]", b"null", b"5", b'{"method":"kv.get"}', b'{"call":["kv.get"]}'])
def test_a_call_without_a_name_is_told_what_it_lacks(request_text: bytes) -> None:
    answer = host(Manager(), "kv").call_json(request_text)
    assert answer == (False, b'bad-request: the host call is not a JSON object with a "call"')


@pytest.mark.parametrize(
    "request_text",
    [
        b"",
        b"\xff",
        '{"call":"config.keys"}'.encode("utf-16-le"),
        b"[]",
        b"null",
        b"5",
        b'{"call":"format.disk"}',
        b'{"call":["kv.get"]}',
        b'{"call":"kv.get"}',
        b'{"call":"kv.get","args":[]}',
        b'{"call":"clock.now","args":[]}',
        b'{"call":"clock.now","args":0}',
        b'{"call":"kv.get","args":{"key":5}}',
        b'{"call":"kv.get","args":{"key":"a","more":"b"}}',
        b'{"call":"kv.get","args":{"key":"\\ud800"}}',
        b"[" * 50_000,
        b'{"call":' + b"1" * 5000 + b"}",
    ],
)
def test_a_malformed_call_is_answered_not_raised(request_text: bytes) -> None:
    manager = Manager()
    ok, answer = host(manager, "kv").call_json(request_text)
    assert not ok
    assert answer.startswith(b"bad-request: ")
    assert manager.asked == []


@pytest.mark.parametrize("reply", [b"", b"[]", b"\xff", b"{}"])
def test_an_unreadable_answer_of_the_manager_is_an_error_to_the_plugin(reply: bytes) -> None:
    manager = Manager()
    manager.reply = reply
    ok, answer = host(manager, "kv").call_json(b'{"call":"kv.keys","args":{"prefix":""}}')
    assert not ok
    assert answer.startswith(b"internal: ")


def test_a_call_too_large_for_its_frame_is_an_error_to_the_plugin() -> None:
    manager = Manager()
    ok, answer = host(manager, "kv").call("kv.set", {"key": "a", "value": "x" * frames.MAX_HOST_CALL})
    assert (ok, str(answer).partition(":")[0]) == (False, "limit")
    assert manager.asked == []


def test_a_call_that_logs_too_much_is_cut_off_with_one_line_and_the_next_may_log_again() -> None:
    manager = Manager()
    tested = host(manager)
    tested.begin(1)
    for _ in range(200):
        tested.log(1, "x" * 4000)
    logged = sum(len(body) for _, _, body in manager.sent)
    assert LOG_BUDGET <= logged < LOG_BUDGET + 5000
    assert b"dropped" in manager.sent[-1][2]
    tested.begin(2)
    for _ in range(10_000):
        tested.log(1, "")
    # 256 KiB, of which each takes at least 128 bytes, and the line that says so
    assert sum(call == 2 for _, call, _ in manager.sent) == 2048 + 1
    tested.begin(3)
    tested.log(1, "again")
    assert manager.sent[-1] == (LOG, 3, b"\1again")
