"""Plays the plugin manager to one real worker process, blocking, for tests and measurements."""

from __future__ import annotations

import atexit
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Protocol

import pytest

from circleosd.worker import frames, limits
from circleosd.worker.frames import Failed, Frame, Load, Ready
from tests import PROJECT
from tests.measuring import once_it_holds
from tests.waiting import SECONDS

# What systemd or the supervisor does before it starts a worker: the socket as descriptor 3, its own id.
_START: Final = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
from circleosd.worker.main import main
sys.exit(main(sys.argv[2]))
"""

# A process that has imported everything and forks workers, which saves each of them 100 ms. The process
# between it and the worker reports how that ended.
_TEMPLATE: Final = """
import os, signal, socket, sys
from circleosd.worker import compiler, component, core, engine, limits, loader, main, native, session, wasi

control = socket.socket(fileno=int(sys.argv[1]))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    name, (listener, errors, status), _, _ = socket.recv_fds(control, 1024, 3) or (b"", (), 0, None)
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        control.close()
        worker = os.fork()
        if worker == 0:
            os.close(status)
            os.dup2(errors, 2)
            os.close(errors)
            os.dup2(listener, 3)
            if listener != 3:
                os.close(listener)
            os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
            grace, name = name.decode().split()
            limits.GRACE = float(grace)
            code = 1
            try:
                code = main.main(name)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
        os.close(listener)
        os.close(errors)
        os.write(status, worker.to_bytes(4, "big"))
        os.write(status, os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]).to_bytes(4, "big", signed=True))
        os._exit(0)
    for descriptor in (listener, errors, status):
        os.close(descriptor)
"""


class Process(Protocol):
    """What the driver needs of a worker's process; `subprocess.Popen` has it."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...
    def send_signal(self, sig: int) -> None: ...


class _Forked:
    """A worker that the template forked; `status` brings its id, and at its end its exit status."""

    def __init__(self, status: int) -> None:
        self._status = status
        self._code: int | None = None
        self.pid = int.from_bytes(os.read(status, 4), "big")

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("the worker", timeout or 0)
            self._code = int.from_bytes(os.read(self._status, 4), "big", signed=True)
            os.close(self._status)
        return self._code

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)


@lru_cache(maxsize=1)
def _template() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-c", _TEMPLATE, str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=PROJECT)
    theirs.close()

    def end() -> None:
        ours.close()
        process.kill()
        process.wait()

    atexit.register(end)
    return ours


class WorkerEnded(Exception):
    """The worker closed the connection; `status` is its exit status, negative for a signal."""

    def __init__(self, status: int, errors: str) -> None:
        super().__init__(f"the worker ended with status {status}: {errors}")
        self.status = status


class CallFailed(Exception):
    """The worker answered FAILED."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(f"{failed.code}: {failed.message}")
        self.failed = failed
        self.code = failed.code
        self.message = failed.message
        self.backtrace = failed.backtrace


class Worker:
    """One worker process and its connection. Close it, or use it as a context manager."""

    def __init__(
        self,
        load: Load,
        artifact: bytes,
        compiled: bytes | None = None,
        *,
        forked: bool = True,
        grace: float = limits.GRACE,
    ) -> None:
        self.logs: list[tuple[int, int, str]] = []
        self.host_calls: list[tuple[str, dict[str, str]]] = []
        self.compiled: bytes | None = None
        self.errors = ""
        self.answer: Callable[[str, dict[str, str]], bytes] = lambda call, args: frames.host_error_body(
            "unavailable", "nobody answers host calls here"
        )
        self._next_id = 1
        self._errors: int | None
        self._errors, writing = os.pipe()
        with open(writing, "wb"):
            self.process, self.connection = _start_process(load.name, writing, forked=forked, grace=grace)
        self.connection.settimeout(SECONDS)
        with _file(artifact) as first, _file(compiled or b"") as second:
            descriptors = [first, second] if compiled is not None else [first]
            body = frames.load_body(load._replace(precompiled=compiled is not None))
            self.connection.sendmsg(
                [frames.encode(frames.LOAD, 0, body)],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))],
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> int:
        """Hangs up and returns the worker's exit status."""
        self.connection.close()
        try:
            return self.process.wait(SECONDS)
        finally:
            self.process.kill()
            self.process.wait(SECONDS)
            if self._errors is not None:
                with open(self._errors, encoding="utf-8") as errors:
                    self.errors = errors.read()
                self._errors = None

    def ready(self) -> Ready:
        """Waits for READY; what comes before it is kept. Raises `CallFailed` when the load is refused."""
        return frames.parse_ready(self.wait_for(0).body)

    def invoke(self, function: str, payload: str | bytes = b"") -> str:
        """One call, start to end. Raises `CallFailed` or `WorkerEnded`."""
        return bytes(self.wait_for(self.send(function, payload)).body).decode()

    def send(self, function: str, payload: str | bytes = b"", kind: int = frames.INVOKE) -> int:
        """Sends a call and returns its id."""
        call_id = self._next_id
        self._next_id += 1
        data = payload.encode() if isinstance(payload, str) else payload
        self.connection.sendall(frames.encode(kind, call_id, frames.named_body(function, data)))
        return call_id

    def wait_for(self, call_id: int) -> Frame:
        """The READY or RESULT of that call; logs and host calls are dealt with on the way."""
        while True:
            frame = self.receive()
            if frame.kind == frames.LOG:
                level, text = frames.parse_log(frame.body)
                self.logs.append((frame.call_id, level, text))
            elif frame.kind == frames.HOST_CALL:
                call, args = frames.parse_host_call(frame.body)
                self.host_calls.append((call, args))
                reply = frames.encode(frames.HOST_REPLY, frame.call_id, self.answer(call, args))
                self.connection.sendall(reply)
            elif frame.kind == frames.COMPILED:
                assert self.compiled is None, "COMPILED came twice"
                self.compiled = bytes(frame.body)
            elif frame.call_id != call_id:
                raise AssertionError(f"an answer to {frame.call_id} came instead of {call_id}")
            elif frame.kind == frames.FAILED:
                raise CallFailed(frames.parse_failed(frame.body))
            else:
                return frame

    def receive(self) -> Frame:
        """The next frame. Raises `WorkerEnded`."""
        length, kind, call_id = frames.HEADER.unpack(self._exactly(frames.HEADER.size))
        frames.check(kind, length, frames.TO_MANAGER)
        return Frame(kind, call_id, self._exactly(length))

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                piece = self.connection.recv(size - len(data))
            except ConnectionResetError:
                piece = b""
            if not piece:
                raise WorkerEnded(self.close(), self.errors)
            data += piece
        return bytes(data)

    def status(self) -> dict[str, str]:
        """/proc/PID/status of the worker."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _start_process(name: str, errors: int, *, forked: bool, grace: float) -> tuple[Process, socket.socket]:
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        path = str(Path(directory) / "socket")
        listener.bind(path)
        listener.listen(1)
        process = _fork(name, listener, errors, grace) if forked else _spawn(name, listener, errors)
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
    return process, connection


def _fork(name: str, listener: socket.socket, errors: int, grace: float) -> Process:
    reading, writing = os.pipe()
    try:
        socket.send_fds(_template(), [f"{grace} {name}".encode()], [listener.fileno(), errors, writing])
    finally:
        os.close(writing)
    return _Forked(reading)


def _spawn(name: str, listener: socket.socket, errors: int) -> Process:
    return subprocess.Popen(
        [sys.executable, "-c", _START, str(listener.fileno()), name],
        pass_fds=[listener.fileno()],
        cwd=PROJECT,
        stderr=errors,
    )


@contextmanager
def _file(data: bytes) -> Iterator[int]:
    descriptor = os.memfd_create("artifact", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        yield descriptor
    finally:
        os.close(descriptor)


def start(
    artifact: bytes, compiled: bytes | None = None, *, forked: bool = True, patient: bool = True, **fields: Any
) -> Worker:
    """A worker for that artifact. `fields` are those of `Load`, and `memory`, `time` … of its limits.

    `forked` False starts an interpreter of its own, as a service manager does: for what is measured of it. Otherwise,
    WebAssembly has long to notice by itself that its time is over, as on a machine that stands still it may need.
    `patient` False leaves it as it is: for what ends with its process.
    """
    bounds = {key: fields.pop(key) for key in frames.Limits._fields if key in fields}
    load = Load(**{"name": "example", "plugin_type": "wasm", "limits": frames.Limits(**bounds), **fields})
    grace = 20.0 if patient and load.plugin_type == "wasm" else limits.GRACE
    return Worker(load, artifact, compiled, forked=forked, grace=grace)


def fails(worker: Worker, function: str, payload: str = "") -> CallFailed:
    """The failure of one call, which must be told by a sentence."""
    with pytest.raises(CallFailed) as caught:
        worker.invoke(function, payload)
    assert re.fullmatch(r"[a-z].{8,}", caught.value.message, re.S)
    return caught.value


def still_works(worker: Worker) -> None:
    """The same worker answers the next call."""
    assert worker.invoke("echo", "fine") == "fine"


def recovers(worker: Worker, function: str, says: str) -> None:
    """Each new instance makes a host call: without an answer it fails, and takes no place of later ones."""
    there = worker.answer = lambda call, args: frames.host_reply_body(None)
    worker.ready()
    assert worker.invoke(function, "made before") == "made before"
    worker.answer = lambda call, args: frames.host_error_body("unavailable", "gone")
    for _ in range(8):
        with pytest.raises(CallFailed, match=says):
            worker.invoke(function)
    worker.answer = there
    assert worker.invoke(function, "back") == "back"


def interrupts_what_waited_for_its_instance(artifact: bytes, quick: str, slow: str, payload: str = "") -> None:
    """A call waits while an instance of the plugin is made for it by a host call, and is interrupted when both took its
    time. The worker goes on.
    """

    def end() -> str:
        with start(artifact, granted=("kv",), concurrency=2, time=1.0, patient=False) as worker:
            worker.answer = lambda call, args: frames.host_reply_body("made")
            worker.ready()
            try:
                worker.invoke(quick)
                made = worker.receive().call_id
                call_id = worker.send(slow, payload)
                assert worker.receive().call_id == call_id != made
                time.sleep(0.7)  # most of the call's time, for which the host call of its instance goes on
                for waiting in (made, call_id):
                    worker.connection.sendall(frames.encode(frames.HOST_REPLY, waiting, frames.host_reply_body("made")))
                with pytest.raises(CallFailed, match=r"took longer than 1 s"):
                    worker.wait_for(call_id)
                return worker.invoke(quick, "still here")
            except (WorkerEnded, ConnectionError) as ended:
                return str(ended)

    once_it_holds(end, lambda end: end == "still here")
