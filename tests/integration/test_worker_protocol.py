"""A worker process and its manager: loading, serving, hanging up."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from typing import Any, Final

import pytest

from circleosd.worker import frames
from circleosd.worker.frames import Load
from tests import PROJECT
from tests.component_text import component
from tests.core_text import HOST_CALLS, LOG, SPIN, core
from tests.native_source import native
from tests.waiting import SECONDS
from tests.wasi_text import ECHO, command
from tests.worker_driver import CallFailed, Worker, WorkerEnded, start

MOST: Final[dict[str, Any]] = {"time": 1e9, "memory": 2**48, "concurrency": 64, "output": frames.MAX_PAYLOAD}


def test_a_worker_reports_its_compilation_before_ready_and_serves() -> None:
    imports = '(import "circleosd" "log" (func (param i32 i32 i32)))'
    with start(core(imports=imports), forked=False) as worker:
        kinds: list[int] = []
        while not kinds or kinds[-1] != frames.READY:
            frame = worker.receive()
            kinds.append(frame.kind)
        assert kinds == [frames.COMPILED, frames.READY]
        ready = frames.parse_ready(frame.body)
        assert (ready.abi, ready.functions, ready.imports) == ("core", ["echo", "explode"], ["circleosd.log"])
        assert worker.invoke("echo", "hello") == "hello"


def test_a_precompiled_plugin_is_not_compiled_again() -> None:
    with start(core()) as worker:
        worker.ready()
    with start(core(), worker.compiled) as second:
        second.ready()
        assert second.compiled == b""
        assert second.invoke("echo", "hello") == "hello"


@pytest.mark.parametrize("precompiled", [b"", b"not a compilation", b"\x7fELF" + bytes(1000)])
def test_an_unusable_compilation_is_replaced(precompiled: bytes) -> None:
    with start(core(), precompiled) as worker:
        worker.ready()
        assert worker.compiled
        assert worker.invoke("echo", "hello") == "hello"


def test_a_compilation_that_needs_what_the_cpu_lacks_is_replaced() -> None:
    with start(core()) as worker:
        worker.ready()
    assert worker.compiled
    # It lists the features of CPUs, each with whether the code may use it; now it may use all of them.
    wanting = re.sub(rb"(has_[a-z0-9_]+\x02)\0", lambda found: found[1] + b"\1", worker.compiled)
    if wanting == worker.compiled:
        pytest.skip("this CPU has every feature")
    with start(core(), wanting) as second:
        second.ready()
        assert second.compiled
        assert second.invoke("echo", "hello") == "hello"


def test_a_compilation_for_the_other_mode_is_replaced() -> None:
    with start(core()) as worker:
        worker.ready()
    with start(core(), worker.compiled, deterministic=True) as second:
        second.ready()
        assert second.compiled


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("artifact", [core, component, lambda: command(ECHO)], ids=["core", "component", "wasi"])
def test_a_worker_takes_the_most_that_settings_may_allow(artifact: Callable[[], bytes], deterministic: bool) -> None:
    with start(artifact(), deterministic=deterministic, **MOST) as worker:
        assert worker.invoke(worker.ready().functions[0], "hello") == "hello"


def test_the_worker_of_a_native_plugin_takes_the_most_that_settings_may_allow() -> None:
    with start(native(""), plugin_type="native", **MOST) as worker:
        assert worker.invoke(worker.ready().functions[0], "hello") == "hello"


def test_a_refused_plugin_is_reported_and_the_worker_ends_in_peace() -> None:
    with start(b"no plugin") as worker:
        with pytest.raises(CallFailed, match="is not WebAssembly") as caught:
            worker.ready()
        assert caught.value.code == "bad-request"
        with pytest.raises(WorkerEnded) as ended:
            worker.receive()
        assert (ended.value.status, worker.errors) == (0, "")


def test_a_worker_whose_manager_hangs_up_ends_with_status_0_and_silently() -> None:
    worker = start(core(), forked=False)
    worker.ready()
    assert worker.close() == 0
    assert worker.errors == ""


def test_a_worker_whose_manager_vanishes_during_a_call_ends_soon() -> None:
    worker = start(core(SPIN), time=0.3)
    worker.ready()
    worker.send("spin")
    began = time.monotonic()
    assert worker.close() == 0
    assert time.monotonic() - began < 8  # ten times what it may take


TALKATIVE = """
  (func (export "say") (param $len i32) (result i64)
    (call $log (i32.const 1) (i32.const 1024) (local.get $len))
    (i64.const 0))
  (func (export "ask") (param $len i32) (result i64)
    (drop (call $host_call (i32.const 1024) (local.get $len)))
    (i64.const 0))"""
ASKED = '{"call":"kv.keys","args":{"prefix":""}}'


@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("function", ["echo", "explode", "say", "ask"])
def test_a_worker_of_whom_nobody_takes_anything_any_more_ends_silently(function: str, concurrency: int) -> None:
    with start(core(TALKATIVE, imports=LOG + HOST_CALLS), concurrency=concurrency, granted=("kv",)) as worker:
        worker.ready()
        worker.connection.shutdown(socket.SHUT_RD)
        worker.send(function, ASKED)
        assert worker.process.wait(SECONDS) == 0
    assert worker.errors == ""


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_worker_whose_manager_vanishes_before_it_has_read_a_host_call_ends_silently(concurrency: int) -> None:
    worker = start(core(TALKATIVE, imports=LOG + HOST_CALLS), concurrency=concurrency, granted=("kv",))
    worker.ready()
    worker.send("ask", ASKED)
    assert select.select([worker.connection], [], [], 20)[0]
    assert worker.close() == 0
    assert worker.errors == ""


def test_calls_that_are_sent_at_once_are_answered_in_turn_under_their_ids() -> None:
    with start(core()) as worker:
        worker.ready()
        sent = [(worker.send("echo", f"payload {number}"), f"payload {number}") for number in range(200)]
        for call_id, payload in sent:
            assert bytes(worker.wait_for(call_id).body).decode() == payload


@pytest.mark.parametrize("size", [0, 1, 4087, 65_535, 65_536, 65_537, 70_000, 1 << 20])
def test_payloads_of_any_size_come_back_whole(size: int) -> None:
    artifact = core(memory="20", room=1 << 20)
    payload = ("0123456789abcdef" * (size // 16 + 1))[:size]
    with start(artifact) as worker:
        worker.ready()
        assert worker.invoke("echo", payload) == payload


def test_a_payload_that_is_not_utf8_is_refused_before_the_plugin_sees_it() -> None:
    with start(core()) as worker:
        worker.ready()
        with pytest.raises(CallFailed, match="the payload is not UTF-8: invalid start byte at byte 2") as caught:
            worker.invoke("echo", b"ab\xff")
        assert caught.value.code == "bad-request"
        assert worker.invoke("echo", "ä") == "ä"


@pytest.mark.parametrize(
    "sent",
    [
        frames.encode(frames.INVOKE, 1, frames.named_body("echo", b"")),
        frames.HEADER.pack(1 << 31, frames.LOAD, 0),
        frames.HEADER.pack(0, 99, 0),
        frames.encode(frames.LOAD, 0, b"{}"),
        frames.encode(frames.LOAD, 0, b"[" * 100_000),
        b"\0\0\0\5\1",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_a_peer_that_does_not_begin_with_a_load_request_is_left(sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        script = (
            "import socket; from circleosd.worker.main import serve; from circleosd.worker.channel import Channel;"
            f"serve(Channel(socket.socket(fileno={theirs.fileno()})))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script], cwd=PROJECT, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE
        )
        theirs.close()
        ours.sendall(sent)
        ours.shutdown(socket.SHUT_WR)
        errors = process.communicate(timeout=SECONDS)[1].decode()
    assert process.returncode == 1
    assert "circleosd.worker.frames.FrameError: " in errors


def test_a_load_request_without_its_descriptor_ends_the_worker() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendmsg(
            [frames.encode(frames.LOAD, 0, frames.load_body(Load("example", "wasm", precompiled=True)))],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [os.open("/dev/null", os.O_RDONLY)]))],
        )
        script = (
            "import socket; from circleosd.worker.main import serve; from circleosd.worker.channel import Channel;"
            f"serve(Channel(socket.socket(fileno={theirs.fileno()})))"
        )
        process = subprocess.run(
            [sys.executable, "-c", script], cwd=PROJECT, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, check=False
        )
    assert process.returncode == 1
    assert b"1 descriptors came with the load request, not 2" in process.stderr


@pytest.mark.parametrize("environment", [{}, {"LISTEN_FDS": "1"}, {"LISTEN_FDS": "1", "LISTEN_PID": "1"}])
def test_a_worker_that_was_passed_no_socket_says_so(environment: dict[str, str]) -> None:
    script = "import sys; from circleosd.worker.main import main; sys.exit(main('example'))"
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, env=environment, capture_output=True, check=False
    )
    assert process.returncode == 1
    assert process.stderr.decode().startswith("cannot serve the plugin example: no socket was passed")


def test_an_event_goes_to_the_plugins_event_handler() -> None:
    handler = '(func (export "on_event") (param $len i32) (result i64) (call $echo (local.get $len)))'
    with start(core(handler)) as worker, start(core()) as deaf:
        worker.ready()
        frame = worker.wait_for(worker.send("mail", 'text with "quotes"', frames.EVENT))
        assert bytes(frame.body) == b'{"topic":"mail","payload":"text with \\"quotes\\""}'
        deaf.ready()
        with pytest.raises(CallFailed, match="has no function 'on_event'"):
            deaf.wait_for(deaf.send("mail", "text", frames.EVENT))


def test_a_small_plugins_worker_stays_small() -> None:
    with start(core()) as worker:
        worker.ready()
    with start(core(), worker.compiled, forked=False) as second:
        second.ready()
        for _ in range(200):
            second.invoke("echo", "hello")
        assert int(second.status()["VmRSS"].split()[0]) < 45 * 1024


def test_nothing_runs_in_a_worker_between_calls() -> None:
    with start(core()) as worker:
        worker.ready()
        worker.invoke("echo", "hello")
        before = _switches(worker)
        time.sleep(0.7)
        assert _switches(worker) == before


def _switches(worker: Worker) -> list[str]:
    """How often each thread was put on a CPU; waits until the last call's work is done."""
    tasks = f"/proc/{worker.process.pid}/task"
    while True:
        states = []
        for task in sorted(os.listdir(tasks)):
            with open(f"{tasks}/{task}/status", encoding="ascii") as file:
                lines = file.read().splitlines()
            states.append([line for line in lines if line.startswith(("State", "voluntary", "nonvoluntary"))])
        if all(state[0].split()[1] == "S" for state in states):
            return [line for state in states for line in state]
        time.sleep(0.01)


def test_an_idle_worker_ends_when_it_is_asked_to() -> None:
    worker = start(core())
    worker.ready()
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(SECONDS) == -signal.SIGTERM
    worker.close()
