"""WASI commands in a real worker: streams, exit status, and what they do not get."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import pytest

from circleosd.worker import frames
from circleosd.worker.limits import MOST_THREADS
from tests import PROJECT, worker_driver
from tests.core_text import wat
from tests.wasi_text import ECHO, SLEEP, command
from tests.worker_driver import CallFailed, WorkerEnded, start


@pytest.mark.parametrize("payload", ["", "x", "grüße\n", "x" * 65_537, "ä" * 500_000])
def test_the_payload_is_stdin_and_stdout_is_the_reply(payload: str) -> None:
    with start(command(ECHO)) as worker:
        ready = worker.ready()
        assert (ready.abi, ready.functions) == ("wasi", ["handle"])
        assert worker.invoke("handle", payload) == payload


def test_every_call_is_a_run_of_its_own() -> None:
    body = """(i32.store8 (i32.const 5000) (i32.add (i32.load8_u (i32.const 5000)) (i32.const 49)))
      (drop (call $write (i32.const 1) (i32.const 5000) (i32.const 1)))"""
    with start(command(body), instance="shared") as worker:
        worker.ready()
        assert [worker.invoke("handle") for _ in range(3)] == ["1", "1", "1"]


def test_it_has_one_function_and_takes_no_events() -> None:
    with start(command(ECHO)) as worker:
        worker.ready()
        with pytest.raises(CallFailed, match="a wasi command has only handle"):
            worker.invoke("_start")
        with pytest.raises(CallFailed, match="takes no events"):
            worker.wait_for(worker.send("topic", "", frames.EVENT))


def test_exit_status_0_is_success() -> None:
    with start(command(f"{ECHO} (call $exit (i32.const 0))")) as worker:
        worker.ready()
        assert worker.invoke("handle", "done") == "done"


def test_another_exit_status_fails_with_the_last_line_of_stderr() -> None:
    body = "(drop (call $write (i32.const 2) (i32.const 5000) (i32.const 19))) (call $exit (i32.const 3))"
    with start(command(body, extra='(data (i32.const 5000) "reading\\ncannot read")')) as worker:
        worker.ready()
        with pytest.raises(CallFailed) as caught:
            worker.invoke("handle")
        assert (caught.value.code, caught.value.message) == ("plugin-failed", "exited with status 3: cannot read")
        assert worker.logs == [(1, 1, "reading"), (1, 1, "cannot read")]


@pytest.mark.parametrize("status", [126, 255, -1])
def test_a_status_that_wasmtime_does_not_pass_on_is_an_exit_too(status: int) -> None:
    body = f"(drop (call $write (i32.const 2) (i32.const 5000) (i32.const 11))) (call $exit (i32.const {status}))"
    with start(command(body, extra='(data (i32.const 5000) "cannot read")')) as worker:
        worker.ready()
        with pytest.raises(CallFailed) as caught:
            worker.invoke("handle")
        assert caught.value.message == "exited with status above 125: cannot read"
        assert (caught.value.backtrace, caught.value.failed.reported) == ([], True)


def test_a_trap_is_reported_with_its_function() -> None:
    with start(command("(call $crash)", extra="(func $crash unreachable)")) as worker:
        worker.ready()
        with pytest.raises(CallFailed, match="trap: wasm `unreachable` instruction executed") as caught:
            worker.invoke("handle")
        assert caught.value.backtrace[0].startswith("crash ")


# What Go prints after the reason: every function of the stack, and below it where it was.
TRACE = """
goroutine 1 gp=0x2821c0 m=0 [running]:
sync.(*Mutex).lockSlow(0x28e040)
\t/usr/lib/go/src/sync/mutex.go:149 +0x2c
...20 frames elided...
main.main()
\t/home/zoe/main.go:28 +0xcd fp=0x2baeb8
created by runtime.gcenable in goroutine 1
\t/usr/lib/go/src/runtime/mgc.go:214 +0x6
"""


@pytest.mark.parametrize(
    "said",
    [
        "cannot read",
        "panicked:\ncannot read\nnote: read the manual\n",  # Rust
        "panicked:\ncannot read\n  left: 3\n right: 4\nnote: read the manual\n",
        "panicked:\ncannot read\nstack backtrace:\nnote: Some details are omitted\n",
        "cannot read\nCannot print stack trace: debug info unavailable for target\n",  # Zig
        "cannot read\nUnable to dump stack trace: not implemented for Wasm\n",
        f"cannot read\n[signal 0xb code=0x0 addr=0x0 pc=0x0]\n{TRACE}",
        f"panic: one [recovered]\n\tcannot read\n{TRACE}",
        f"{TRACE}cannot read\n",
        "cannot read\nlost sys.stderr\nthread '<unnamed>' (1) panicked at runtime/src/lib.rs:1293:29:\n"
        "Python function threw an unexpected exception\nnote: read the manual\n",
        "cannot read\nStack:\n  handle@hello.js:18:11\nRedirecting call to abort() to mozalloc_abort\n",  # SpiderMonkey
    ],
)
def test_a_trap_is_explained_by_the_last_line_of_stderr_that_gives_a_reason(said: str) -> None:
    body = f"(drop (call $write (i32.const 2) (i32.const 5000) (i32.const {len(said)}))) unreachable"
    with start(command(body, extra=f"(data (i32.const 5000) {json.dumps(said)})")) as worker:
        worker.ready()
        with pytest.raises(CallFailed) as caught:
            worker.invoke("handle")
        assert caught.value.code == "plugin-failed"
        assert caught.value.message == "trap: wasm `unreachable` instruction executed: cannot read"
        assert caught.value.backtrace


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("cannot connect to\n\tdb.example.org:5432\n", "db.example.org:5432"),
        ("there is no user\n  zoe@example.org\n", "zoe@example.org"),
        ("it begins\nthread 'main' (1) panicked at main.rs:2:5:\n\n", "thread 'main' (1) panicked at main.rs:2:5:"),
    ],
)
def test_what_a_program_says_itself_is_taken_for_no_stack_trace(said: str, reason: str) -> None:
    body = f"(drop (call $write (i32.const 2) (i32.const 5000) (i32.const {len(said)}))) (call $exit (i32.const 1))"
    with start(command(body, extra=f"(data (i32.const 5000) {json.dumps(said)})")) as worker:
        worker.ready()
        with pytest.raises(CallFailed, match=f"^plugin-failed: exited with status 1: {re.escape(reason)}$"):
            worker.invoke("handle")


def test_output_that_is_not_utf8_fails_with_the_place() -> None:
    body = "(drop (call $write (i32.const 1) (i32.const 5000) (i32.const 3)))"
    with start(command(body, extra='(data (i32.const 5000) "ab\\ff")')) as worker:
        worker.ready()
        with pytest.raises(CallFailed, match="gave a reply that is not UTF-8: invalid start byte at byte 2"):
            worker.invoke("handle")


def test_a_flood_of_output_ends_at_the_limit() -> None:
    flood = "(loop $l (drop (call $write (i32.const 1) (i32.const 1024) (i32.const 4096))) (br $l))"
    with start(command(flood), output=100_000, time=0.4) as worker:
        worker.ready()
        with pytest.raises(CallFailed, match="wrote more than its limit for output of 100000 bytes") as caught:
            worker.invoke("handle")
        assert caught.value.code == "limit"
        assert int(worker.status()["VmRSS"].split()[0]) < 45 * 1024


def test_the_limit_for_output_is_kept_to_the_byte() -> None:
    with start(command(ECHO), output=1000) as worker:
        worker.ready()
        assert worker.invoke("handle", "x" * 1000) == "x" * 1000
        with pytest.raises(CallFailed, match="wrote more than its limit for output of 1000 bytes"):
            worker.invoke("handle", "x" * 1001)


def test_a_message_without_the_end_of_its_line_is_logged_when_the_run_ends() -> None:
    body = "(drop (call $write (i32.const 2) (i32.const 5000) (i32.const 4)))"
    with start(command(body, extra='(data (i32.const 5000) "note")')) as worker:
        worker.ready()
        worker.invoke("handle")
        assert worker.logs == [(1, 1, "note")]


def test_runs_leave_no_memory_behind() -> None:
    payload = "x" * 1_000_000
    with start(command(ECHO)) as worker:
        worker.ready()

        def used_after(runs: int) -> int:
            """The worker's memory in KiB."""
            for _ in range(runs):
                assert worker.invoke("handle", payload) == payload
            return int(worker.status()["VmRSS"].split()[0])

        before = used_after(10)
        assert used_after(40) < before + 20 * 1024


def test_a_message_without_end_is_logged_in_pieces() -> None:
    write = f"(drop (call $write (i32.const 2) (i32.const 1024) (i32.const {frames.MAX_LOG})))"
    with start(command(write * 3)) as worker:
        worker.ready()
        worker.invoke("handle")
        assert len(worker.logs) == 3


def test_a_flood_of_messages_is_cut_off() -> None:
    flood = "(loop $l (drop (call $write (i32.const 2) (i32.const 1024) (i32.const 60000))) (br $l))"
    with start(command(flood, extra=f'(data (i32.const 1024) "{"line" * 10}\\n")'), time=0.4) as worker:
        worker.ready()
        with pytest.raises(CallFailed, match="took longer than"):
            worker.invoke("handle")
        assert sum(len(text) for _, _, text in worker.logs) < 300_000
        assert worker.logs[-1][2] == "further log messages of this call were dropped"


def test_a_loop_is_interrupted() -> None:
    with start(command("(loop $l (br $l))"), time=0.3) as worker:
        worker.ready()
        with pytest.raises(CallFailed, match=r"took longer than 0.3 s"):
            worker.invoke("handle")


def test_a_blocking_sleep_ends_with_its_worker_soon_after_the_time() -> None:
    with start(command(SLEEP), time=0.3, patient=False) as worker:
        worker.ready()
        began = time.monotonic()
        with pytest.raises(WorkerEnded) as ended:
            worker.invoke("handle")
        assert ended.value.status == -14
        assert 0.7 < time.monotonic() - began < 8  # ten times what it may take


def test_there_are_no_files_and_no_directories() -> None:
    # Tries descriptors 3 to 9 as directories, and opens "x" below each; writes the number of successes.
    body = """(local $fd i32) (local $found i32)
      (local.set $fd (i32.const 3))
      (loop $l
        (if (i32.eqz (call $prestat (local.get $fd) (i32.const 64)))
          (then (local.set $found (i32.add (local.get $found) (i32.const 1)))))
        (if (i32.eqz (call $open (local.get $fd) (i32.const 0) (i32.const 5000) (i32.const 1) (i32.const 1)
              (i64.const 0) (i64.const 0) (i32.const 0) (i32.const 64)))
          (then (local.set $found (i32.add (local.get $found) (i32.const 1)))))
        (local.set $fd (i32.add (local.get $fd) (i32.const 1)))
        (br_if $l (i32.lt_u (local.get $fd) (i32.const 10))))
      (i32.store8 (i32.const 5001) (i32.add (i32.const 48) (local.get $found)))
      (drop (call $write (i32.const 1) (i32.const 5001) (i32.const 1)))"""
    with start(command(body, extra='(data (i32.const 5000) "x")')) as worker:
        worker.ready()
        assert worker.invoke("handle") == "0"


def test_the_environment_is_the_configuration_if_granted() -> None:
    body = """(drop (call $environ_sizes (i32.const 64) (i32.const 68)))
      (drop (call $environ (i32.const 3000) (i32.const 5000)))
      (drop (call $write (i32.const 1) (i32.const 5000) (i32.load (i32.const 68))))"""
    config = {"GREETING": "grüß dich", "SECOND": "2"}
    with (
        start(command(body), config=config, granted=("config",)) as granted,
        start(command(body), config=config) as denied,
    ):
        granted.ready()
        denied.ready()
        assert sorted(granted.invoke("handle").split("\0")) == ["", "GREETING=grüß dich", "SECOND=2"]
        assert denied.invoke("handle") == ""


def test_the_one_argument_is_the_plugins_name() -> None:
    body = """(drop (call $args_sizes (i32.const 64) (i32.const 68)))
      (drop (call $args (i32.const 3000) (i32.const 5000)))
      (drop (call $write (i32.const 1) (i32.const 5000) (i32.load (i32.const 68))))"""
    with start(command(body), name="greeter") as worker:
        worker.ready()
        assert worker.invoke("handle") == "greeter\0"


@pytest.mark.parametrize("name", ["format_disk", "fd_write"])
def test_an_import_that_preview_1_does_not_have_or_has_with_another_type_is_refused_by_name(name: str) -> None:
    text = f"""(module (import "wasi_snapshot_preview1" "{name}" (func)) (memory (export "memory") 1)
      (func (export "_start")))"""
    with start(wat(text)) as worker, pytest.raises(CallFailed, match=name) as caught:
        worker.ready()
    assert caught.value.code == "bad-request"


def test_runs_side_by_side_do_not_mix_their_streams() -> None:
    with start(command(ECHO), concurrency=4) as worker:
        worker.ready()
        sent = {worker.send("handle", f"{number}" * 1000): f"{number}" * 1000 for number in range(40)}
        received: dict[int, str] = {}
        while len(received) < len(sent):
            frame = worker.receive()
            received[frame.call_id] = bytes(frame.body).decode()
        assert {key: received[key] for key in sent} == sent


@pytest.mark.parametrize("concurrency", [1, 4])
def test_payload_and_reply_may_be_larger_than_the_memory(concurrency: int) -> None:
    payload = b"x" * frames.MAX_PAYLOAD
    with start(command(ECHO), memory=2 << 20, output=len(payload), concurrency=concurrency, time=60) as worker:
        worker.ready()
        for _ in range(5):
            for _ in range(concurrency):
                worker.send("handle", payload)
            for _ in range(concurrency):
                assert worker.receive().body == payload


def test_fuel_holds_a_deterministic_command() -> None:
    with start(command("(loop $l (br $l))"), deterministic=True, time=0.1) as worker:
        worker.ready()
        with pytest.raises(CallFailed, match="used up its fuel") as caught:
            worker.invoke("handle")
        assert caught.value.code == "limit"


MANY_CPUS = "import os; os.sched_getaffinity = lambda _: range(512)\n"
COMPILING = f"""{MANY_CPUS}
from circleosd.worker import engine, limits
limits.bound_threads()
engine.compile_code("module", bytes.fromhex(input()), deterministic=False)
print(len(os.listdir("/proc/self/task")))
"""


def test_on_a_host_of_many_cpus_wasmtime_takes_no_more_threads_than_the_unit_of_a_worker_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_driver, "_START", MANY_CPUS + worker_driver._START)
    with start(command(ECHO), forked=False) as worker:
        worker.ready()
        assert worker.invoke("handle", "x") == "x"
        assert MOST_THREADS <= len(os.listdir(f"/proc/{worker.process.pid}/task")) <= 2 * MOST_THREADS
    compiling = [sys.executable, "-c", COMPILING]
    module = command(ECHO).hex()
    done = subprocess.run(compiling, cwd=PROJECT, input=module, capture_output=True, text=True, check=True)
    assert int(done.stdout) == 1 + MOST_THREADS
