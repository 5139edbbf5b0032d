"""The manager's side of a worker, against a peer that sends what it likes."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from circleosd.errors import PluginFailed
from circleosd.plugins.workers import Worker
from circleosd.worker import frames
from circleosd.worker.frames import COMPILED, READY, Load, Ready

READY_FRAME = frames.encode(READY, 0, frames.ready_body(Ready("core", ["handle"], [], None, [])))


class Sink:
    """Keeps a compilation."""

    def __init__(self) -> None:
        self.data = b""
        self.complete = False

    def write(self, data: memoryview) -> None:
        self.data += bytes(data)

    def finish(self) -> None:
        self.complete = True


def load(directory: Path, sent: bytes, sink: Sink) -> Ready:
    """What the manager makes of a worker that answers a load request with `sent`."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(sent)
            while connection.recv(65536):
                pass

    async def refuse(call: str, args: dict[str, str], depth: int) -> bytes:
        raise AssertionError

    async def manage() -> Ready:
        worker = Worker("example", refuse, 1)
        try:
            return await worker.load(path, Load("example", "wasm"), [0], 10, sink)
        finally:
            worker.close()

    path = str(directory / "worker.sock")
    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor() as threads:
        listener.bind(path)
        listener.listen()
        served = threads.submit(serve)
        try:
            return asyncio.run(manage())
        finally:
            served.result(10)


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
    with pytest.raises(PluginFailed, match="a compilation that nobody waits for"):
        load(tmp_path, sent, sink)
    assert sink.data == first
