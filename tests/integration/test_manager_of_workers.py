"""The manager's side of a worker, against a peer that sends what it likes."""

from __future__ import annotations

import asyncio
import os
import select
import selectors
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Semaphore
from typing import Any, TypeVar

import pytest

from circleosd.config import PluginSettings
from circleosd.errors import Limit, PluginFailed, Timeout
from circleosd.plugins.cause import Cause
from circleosd.plugins.compiled import Compiled
from circleosd.plugins.failures import BrokeProtocol, WorkerGone
from circleosd.plugins.manifest import Capability, Manifest
from circleosd.plugins.plugin import Plugin
from circleosd.plugins.runner import Runners
from circleosd.plugins.store import Record
from circleosd.plugins.voice import Voice
from circleosd.plugins.workers import GRACE, HostCalls, Worker
from circleosd.worker import frames
from circleosd.worker.channel import Channel
from circleosd.worker.frames import (
    COMPILED,
    HOST_CALL,
    LOG,
    MAX_LOG,
    PREPARING,
    READY,
    RESULT,
    Abi,
    Limits,
    Load,
    Ready,
)
from circleosd.worker.host import LOG_BUDGET
from tests.waiting import SECONDS, until

T = TypeVar("T")

READY_FRAME = frames.encode(READY, 0, frames.ready_body(Ready("core", ["handle"], [], None, [])))
USUAL = Limits()
QUESTION = frames.json_body({"call": "kv.keys", "args": {"prefix": ""}})


class Sink:
    """Keeps a compilation."""

    def __init__(self) -> None:
        self.data = b""
        self.complete = False

    def write(self, data: memoryview) -> None:
        self.data += bytes(data)

    def finish(self) -> None:
        self.complete = True


async def failing(plugin: Plugin) -> None:
    """No plugin fails."""
    raise AssertionError


async def refuse(call: str, args: dict[str, str], cause: Cause) -> bytes:
    """Answers no host call: none may come."""
    raise AssertionError


class Asked:
    """Answers host calls with null, and remembers what they followed from."""

    def __init__(self) -> None:
        self.causes: list[Cause] = []

    async def __call__(self, call: str, args: dict[str, str], cause: Cause) -> bytes:
        self.causes.append(cause)
        return frames.host_reply_body(None)


def run(
    directory: Path,
    peer: Callable[[Channel], None],
    manage: Callable[[Worker, str], Awaitable[T]],
    host_calls: HostCalls = refuse,
    concurrency: int = 1,
) -> T:
    """What `manage` makes of a worker, at the path that it is given too, whose process is played by `peer`."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            channel = Channel(connection)
            _, descriptors = channel.receive_first()
            for descriptor in descriptors:
                os.close(descriptor)
            try:
                peer(channel)
                while channel.receive():
                    pass
            except (BrokenPipeError, ConnectionResetError, frames.FrameError):
                pass  # the manager has had enough

    async def managed() -> T:
        worker = Worker("example", host_calls, concurrency, Voice("example"))
        try:
            return await manage(worker, path)
        finally:
            worker.close()

    path = str(directory / "worker.sock")
    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor() as threads:
        listener.bind(path)
        listener.listen()
        served = threads.submit(serve)
        try:
            return asyncio.run(managed())
        finally:
            served.result(SECONDS)


def load(directory: Path, sent: bytes, sink: Sink) -> Ready:
    """What the manager makes of a worker that answers a load request with `sent`."""
    return run(
        directory,
        lambda channel: channel._socket.sendall(sent),
        lambda worker, path: worker.load(path, Load("example", "wasm"), [0], 10, sink),
    )


@pytest.mark.parametrize("code", [b"native code", b"x" * 200_000])
def test_the_compilation_that_comes_first_is_kept(tmp_path: Path, code: bytes) -> None:
    sink = Sink()
    sent = frames.encode(COMPILED, 0, code)
    assert load(tmp_path, sent + READY_FRAME, sink).functions == ["handle"]
    assert (sink.data, sink.complete) == (code, True)


def test_a_worker_that_needed_no_compilation_leaves_none(tmp_path: Path) -> None:
    sink = Sink()
    load(tmp_path, frames.encode(COMPILED, 0) + READY_FRAME, sink)
    assert (sink.data, sink.complete) == (b"", False)


@pytest.mark.parametrize("first", [b"", b"native code"])
def test_a_second_compilation_breaks_the_protocol_for_plugin_code_may_have_made_it(
    tmp_path: Path, first: bytes
) -> None:
    sink = Sink()
    sent = frames.encode(COMPILED, 0, first) + frames.encode(COMPILED, 0, b"made up") + READY_FRAME
    with pytest.raises(PluginFailed, match="a compilation that nobody is waiting for"):
        load(tmp_path, sent, sink)
    assert sink.data == first


def test_a_plugin_that_is_not_loaded_in_time_is_told_which_time(tmp_path: Path) -> None:
    with pytest.raises(Timeout, match=r"^example cannot be loaded: took longer than 0.1 s \(plugins.load_time\)$"):
        run(tmp_path, lambda _: None, lambda worker, path: worker.load(path, Load("example", "wasm"), [0], 0.1, None))


def loaded(channel: Channel) -> None:
    """The worker's part of a load."""
    channel.send(READY, 0, frames.ready_body(Ready("core", ["handle"], [], None, [])))


def run_loaded(
    directory: Path,
    peer: Callable[[Channel], None],
    manage: Callable[[Worker], Awaitable[T]],
    host_calls: HostCalls = refuse,
    concurrency: int = 1,
    limits: Limits = USUAL,
) -> T:
    """The same of a worker that has loaded a plugin of WebAssembly."""

    def behind_a_load(channel: Channel) -> None:
        loaded(channel)
        peer(channel)

    async def with_a_load(worker: Worker, path: str) -> T:
        await worker.load(path, Load("example", "wasm", limits), [0], 10, None)
        return await manage(worker)

    return run(directory, behind_a_load, with_a_load, host_calls, concurrency)


def called(channel: Channel) -> int:
    """The id of the next call."""
    frame = channel.receive()
    assert frame is not None
    return frame.call_id


async def call(worker: Worker, seconds: float = 5, depth: int = 0, caller: str | None = None) -> bytes:
    return bytes(await worker.call(frames.INVOKE, "handle", b"", seconds, Cause(depth, caller)))


async def why_lost(worker: Worker) -> str:
    """Why a call is the last of a worker that is disconnected; nothing if it succeeds."""
    try:
        await call(worker)
    except BrokeProtocol as broke:
        return str(broke)
    return ""


@pytest.mark.parametrize(
    ("plugin_type", "number", "allowed"),
    [
        ("wasm", 0, False),
        ("wasm", 1, False),
        ("wasm", 1 | PREPARING, True),
        ("native", 0, False),
        ("native", 1 | PREPARING, False),
    ],
)
@pytest.mark.parametrize(("kind", "body"), [(HOST_CALL, QUESTION), (LOG, b"\1text")], ids=["ask", "log"])
def test_a_loaded_worker_asks_and_logs_for_a_call_or_to_prepare_the_next_of_wasm(
    tmp_path: Path, plugin_type: frames.PluginType, number: int, allowed: bool, kind: int, body: bytes
) -> None:
    def peer(channel: Channel) -> None:
        abi: frames.Abi = "core" if plugin_type == "wasm" else "native"
        channel.send(READY, 0, frames.ready_body(Ready(abi, ["handle"], [], None, [])))
        channel.send(RESULT, called(channel), b"")
        channel.send(kind, number, body)
        channel.send(RESULT, called(channel), b"")

    async def manage(worker: Worker, path: str) -> str:
        await worker.load(path, Load("example", plugin_type), [0], 10, None)
        await call(worker)
        return await why_lost(worker)

    lost = run(tmp_path, peer, manage, Asked())
    assert "outside a call" in lost if not allowed else not lost


def test_a_worker_that_asks_more_at_once_than_its_calls_and_preparations_can_is_ended(tmp_path: Path) -> None:
    def peer(channel: Channel) -> None:
        number = called(channel)
        for _ in range(4):
            channel.send(HOST_CALL, number, QUESTION)
        channel.send(RESULT, number, b"")

    async def never(call: str, args: dict[str, str], cause: Cause) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    assert "too many at once" in run_loaded(tmp_path, peer, why_lost, never)


@pytest.mark.parametrize("reads", [True, False])
def test_a_worker_that_asks_without_reading_the_replies_is_ended(tmp_path: Path, reads: bool) -> None:
    answered = Semaphore(0)

    def peer(channel: Channel) -> None:
        number = called(channel)
        channel.send(HOST_CALL, number, QUESTION)
        for _ in range(3):
            answered.acquire()
            if reads:
                channel.receive()
            channel.send(HOST_CALL, number, QUESTION)
        channel.send(RESULT, number, b"")

    async def answer(call: str, args: dict[str, str], cause: Cause) -> bytes:
        answered.release()
        return bytes(1 << 20)  # more than the socket holds

    async def manage(worker: Worker) -> str:
        lost = await why_lost(worker)
        worker.abort()  # nobody reads what is left
        return lost

    lost = run_loaded(tmp_path, peer, manage, answer)
    assert "too many at once" in lost if not reads else not lost


def test_nothing_more_is_taken_from_a_worker_that_has_broken_the_protocol(tmp_path: Path) -> None:
    def peer(channel: Channel) -> None:
        number = called(channel)
        question = frames.encode(HOST_CALL, number | PREPARING, QUESTION)
        channel._socket.sendall(frames.encode(frames.FAILED, number, b"{}") + question)

    async def manage(worker: Worker) -> str:
        lost = await why_lost(worker)
        for _ in range(3):  # in which it would be answered
            await asyncio.sleep(0)
        return lost

    asked = Asked()
    assert "broke the protocol" in run_loaded(tmp_path, peer, manage, asked)
    assert asked.causes == []


@pytest.mark.parametrize("size", [1000, 1001])
def test_a_reply_is_held_to_its_plugins_limit_whatever_the_worker_sends(tmp_path: Path, size: int) -> None:
    def peer(channel: Channel) -> None:
        channel.send(RESULT, called(channel), b"x" * size)

    lost = run_loaded(tmp_path, peer, why_lost, limits=Limits(output=1000))
    assert "the bound is 1000" in lost if size > 1000 else not lost


@pytest.mark.parametrize(
    ("asked", "abi"),
    [
        (Load("example", "wasm"), "native"),
        (Load("example", "wasm", abi="wasi"), "core"),
        (Load("example", "native"), "core"),
    ],
)
def test_a_worker_that_reports_another_abi_than_it_was_to_load_is_ended(tmp_path: Path, asked: Load, abi: Abi) -> None:
    def peer(channel: Channel) -> None:
        channel.send(READY, 0, frames.ready_body(Ready(abi, ["handle"], [], None, [])))

    async def manage(worker: Worker, path: str) -> None:
        with pytest.raises(BrokeProtocol, match=f"reports the ABI {abi}"):
            await worker.load(path, asked, [0], 10, None)
        assert worker.lost

    run(tmp_path, peer, manage)


@pytest.mark.parametrize("granted", [True, False])
def test_a_worker_is_told_only_the_configuration_that_was_granted(tmp_path: Path, granted: bool) -> None:
    settings, config = PluginSettings(), {"token": "a secret"}
    manifest = Manifest("p", plugin_type="native", capabilities=(Capability("config"),), config=config)
    plugin = Plugin(manifest, "", Record(), {"config": granted}, settings)
    told: list[dict[str, str]] = []

    def worker() -> None:
        connection, _ = listener.accept()
        with connection:
            channel = Channel(connection)
            frame, descriptors = channel.receive_first()
            assert frame is not None
            told.append(frames.parse_load(frame.body).config)
            for descriptor in descriptors:
                os.close(descriptor)
            channel.send(READY, 0, frames.ready_body(Ready("native", ["handle"], [], None, [])))
            channel.receive()

    async def probed() -> None:
        compiled = Compiled(tmp_path / "compiled", 0)
        runners = Runners("", tmp_path, compiled, lambda digest: -1, lambda plugin: refuse, failing, settings)
        runner, _ = await runners.probe(plugin, 0, upgrade=False)
        await runners.adopt(runner)
        await runners.close()

    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor() as threads:
        listener.bind(str(tmp_path / "p.sock"))
        listener.listen()
        served = threads.submit(worker)
        asyncio.run(probed())
        served.result(SECONDS)
    assert told == [config if granted else {}]


def test_a_worker_may_prepare_for_as_long_as_for_a_call(tmp_path: Path) -> None:
    asked = Asked()

    def peer(channel: Channel) -> None:
        number = called(channel)
        channel.send(RESULT, number, b"")
        while True:
            channel.send(HOST_CALL, number | PREPARING, QUESTION)
            channel.receive()

    async def manage(worker: Worker) -> float:
        await call(worker)
        began = asyncio.get_running_loop().time()
        await until(lambda: worker.lost)
        return asyncio.get_running_loop().time() - began

    assert run_loaded(tmp_path, peer, manage, asked, limits=Limits(time=0.1)) >= GRACE
    assert asked.causes


def test_the_time_of_a_call_does_not_count_while_the_worker_prepares(tmp_path: Path) -> None:
    limits = Limits(time=0.1)

    def peer(channel: Channel) -> None:
        channel.send(RESULT, called(channel), b"")
        number = called(channel)
        time.sleep(limits.time + GRACE + 0.4)  # beyond a call's own time, within that of a preparation and a call
        channel.send(RESULT, number, b"at last")

    async def manage(worker: Worker) -> bytes:
        await call(worker, limits.time)
        return await call(worker, limits.time)

    assert run_loaded(tmp_path, peer, manage, limits=limits) == b"at last"


def test_what_a_preparation_emits_follows_from_the_events_that_the_calls_before_it_followed_from(
    tmp_path: Path,
) -> None:
    asked = Asked()

    def peer(channel: Channel) -> None:
        for _ in range(2):
            channel.send(RESULT, called(channel), b"")
        channel.send(HOST_CALL, 2 | PREPARING, QUESTION)

    async def manage(worker: Worker) -> None:
        await call(worker, depth=3)
        await call(worker)  # the one before may still be followed by its preparation
        await until(lambda: bool(asked.causes))

    run_loaded(tmp_path, peer, manage, asked)
    assert asked.causes == [Cause(3)]


def test_what_a_worker_does_while_it_loads_follows_from_what_had_it_started(tmp_path: Path) -> None:
    asked, cause = Asked(), Cause(2, "alice")

    def peer(channel: Channel) -> None:
        channel.send(HOST_CALL, 0, QUESTION)
        channel.receive()
        loaded(channel)

    run(tmp_path, peer, lambda worker, path: worker.load(path, Load("example", "wasm"), [0], 10, None, cause), asked)
    assert asked.causes == [cause]


@pytest.mark.parametrize(
    ("concurrency", "callers", "named"),
    [(1, ("alice", "bob"), "bob"), (2, ("alice", "bob"), None), (2, ("bob", "bob"), "bob")],
)
def test_what_a_preparation_does_is_laid_to_a_caller_only_where_it_can_follow_no_other_call(
    tmp_path: Path, concurrency: int, callers: tuple[str, str], named: str | None
) -> None:
    asked = Asked()

    def peer(channel: Channel) -> None:
        for _ in callers:
            channel.send(RESULT, called(channel), b"")
        channel.send(HOST_CALL, 1 | PREPARING, QUESTION)

    async def manage(worker: Worker) -> None:
        for caller in callers:
            await call(worker, caller=caller)
        await until(lambda: bool(asked.causes))

    run_loaded(tmp_path, peer, manage, asked, concurrency)
    assert asked.causes == [Cause(0, named)]


@pytest.mark.parametrize(("concurrency", "allowed"), [(1, False), (8, True)])
def test_preparations_side_by_side_may_each_log_as_much_as_a_call(
    tmp_path: Path, concurrency: int, allowed: bool
) -> None:
    def peer(channel: Channel) -> None:
        channel.send(RESULT, called(channel), b"")
        for number in range(8):
            for _ in range(LOG_BUDGET // MAX_LOG):
                channel.send(LOG, number | PREPARING, frames.log_body(0, "x" * MAX_LOG))
        channel.send(RESULT, called(channel), b"")

    async def manage(worker: Worker) -> str:
        await call(worker)
        return await why_lost(worker)

    lost = run_loaded(tmp_path, peer, manage, concurrency=concurrency)
    assert "logged more than a call may" in lost if not allowed else not lost


def test_messages_of_no_length_count_too(tmp_path: Path) -> None:
    def peer(channel: Channel) -> None:
        number = called(channel)
        for _ in range(5000):
            channel.send(LOG, number, frames.log_body(0, ""))

    assert "logged more than a call may" in run_loaded(tmp_path, peer, why_lost)


async def in_hand(worker: Worker, *seconds: float) -> list[asyncio.Task[bytes]]:
    """Calls that have been sent, unless they wait for room."""
    tasks = [asyncio.create_task(call(worker, most)) for most in seconds]
    await asyncio.sleep(0)
    return tasks


@pytest.mark.parametrize("both", [False, True])
def test_a_call_that_is_given_up_leaves_the_others_alone_and_keeps_its_place_until_it_ends(
    tmp_path: Path, both: bool
) -> None:
    go_on = Event()

    def peer(channel: Channel) -> None:
        given_up, other = called(channel), called(channel)
        go_on.wait(SECONDS)
        assert not select.select([channel._socket], [], [], 0)[0], "a third call came beside the two"
        channel.send(RESULT, given_up, b"too late")
        third = called(channel)
        channel.send(RESULT, other, b"other")
        channel.send(RESULT, third, b"third")

    async def manage(worker: Worker) -> bytes:
        given_up, other = await in_hand(worker, 5, 5)
        given_up.cancel()
        [third] = await in_hand(worker, 5)
        if both:
            other.cancel()
        await asyncio.sleep(0)
        go_on.set()
        assert both or await other == b"other"
        return await third

    assert run_loaded(tmp_path, peer, manage, concurrency=2) == b"third"


def test_a_payload_that_no_frame_holds_is_refused_and_costs_the_worker_nothing(tmp_path: Path) -> None:
    def peer(channel: Channel) -> None:
        channel.send(RESULT, called(channel), b"served")

    async def manage(worker: Worker) -> bytes:
        with pytest.raises(Limit, match=f"at most {frames.MAX_PAYLOAD} bytes"):
            await worker.call(frames.INVOKE, "handle", bytes(frames.MAX_PAYLOAD + frames.MAX_NAME), 5, Cause())
        return await call(worker)

    assert run_loaded(tmp_path, peer, manage) == b"served"


def test_a_worker_whose_calls_are_all_given_up_is_ended_at_once(tmp_path: Path) -> None:
    async def manage(worker: Worker) -> list[bool]:
        lost = []
        for task in await in_hand(worker, 60, 60):
            task.cancel()
            await asyncio.wait([task])
            lost.append(worker.lost)
        return lost

    assert run_loaded(tmp_path, lambda _: None, manage, concurrency=2) == [False, True]


def test_a_call_of_a_worker_that_has_ended_since_it_was_loaded_fails_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = socket.send_fds

    def sent_and_ended(connection: socket.socket, *what: Any) -> int:
        sent = send(connection, *what)
        ended = select.poll()
        ended.register(connection, 0)  # errors and hang-ups alone
        assert ended.poll(SECONDS * 1000)
        return sent

    monkeypatch.setattr(socket, "send_fds", sent_and_ended)

    def ends(channel: Channel) -> None:
        loaded(channel)
        channel._socket.shutdown(socket.SHUT_RDWR)

    async def manage(worker: Worker, path: str) -> None:
        await worker.load(path, Load("example", "wasm"), [0], SECONDS, None)
        await until(lambda: worker.lost)
        with pytest.raises(WorkerGone, match="the worker of example ended before the call"):
            await asyncio.wait_for(call(worker), SECONDS)

    run(tmp_path, ends, manage)


def test_a_call_that_was_given_up_before_its_turn_keeps_no_worker(tmp_path: Path) -> None:
    async def manage(worker: Worker) -> list[bool]:
        [in_turn] = await in_hand(worker, 60)
        waiting = asyncio.create_task(call(worker))
        await asyncio.sleep(0)
        lost = []
        for task in (waiting, in_turn):
            task.cancel()
            await asyncio.wait([task])
            lost.append(worker.lost)
        return lost

    assert run_loaded(tmp_path, lambda _: None, manage) == [False, True]


def test_a_call_that_was_given_up_and_never_ends_ends_the_worker(tmp_path: Path) -> None:
    def peer(channel: Channel) -> None:
        called(channel)
        channel.send(RESULT, called(channel), b"other")

    async def manage(worker: Worker) -> None:
        given_up, other = await in_hand(worker, 0.1, 0.1)
        given_up.cancel()
        assert await other == b"other"
        assert not worker.lost
        waiting = await in_hand(worker, 60, 60)  # one of them in the line
        await until(lambda: worker.lost)
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(end) for end in ends] == [Timeout, WorkerGone]

    run_loaded(tmp_path, peer, manage, concurrency=2)


def test_a_reply_that_came_while_the_manager_was_stopped_came_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called_now, replied = Event(), Event()

    class Stopped(selectors.EpollSelector):
        """Of a process that is stopped in a call, and goes on when that is overdue: epoll_wait(2) is interrupted."""

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            if not called_now.is_set():
                return super().select(timeout)
            called_now.clear()
            assert timeout is not None, "nobody waits for the end of the call"
            assert replied.wait(SECONDS)
            time.sleep(timeout)
            return []

    def peer(channel: Channel) -> None:
        channel.send(RESULT, called(channel), b"done")
        replied.set()

    async def manage(worker: Worker) -> bytes:
        [task] = await in_hand(worker, 0.01)
        called_now.set()
        return await task

    monkeypatch.setattr(selectors, "DefaultSelector", Stopped)
    monkeypatch.setattr("circleosd.plugins.workers.GRACE", 0.01)
    assert run_loaded(tmp_path, peer, manage) == b"done"
