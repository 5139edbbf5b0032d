"""Compiles one module in a child process of the worker, with its own limits.

A module that exhausts or crashes the compiler costs only the child; and the worker, which never used the compiler's
memory, can report the reason.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
from typing import Final

from circleosd.worker import engine
from circleosd.worker.failure import PluginFailure
from circleosd.worker.frames import MAX_COMPILED, Code, json_body, json_object
from circleosd.worker.limits import COMPILE_MEMORY, COMPILE_SECONDS, bound_compilation

_DONE: Final = b"C"
_REFUSED: Final = b"F"
_PIECE: Final = 1 << 20


def compile_in_child(kind: engine.Kind, data: mmap.mmap, *, deterministic: bool) -> bytes:
    """The serialized compilation. Raises `PluginFailure` for invalid code or an exceeded limit.

    Must be called while the process has only one thread, because only the calling thread exists in the child.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run_child(kind, data, writing, deterministic=deterministic)
    os.close(writing)
    try:
        result = _read(reading)
    finally:
        os.close(reading)
        _, status = os.waitpid(child, 0)
    if result[:1] == _DONE and status == 0:
        return result[1:]
    if result[:1] == _REFUSED:
        refusal = json_object(result[1:])
        raise PluginFailure(refusal["code"], refusal["message"])
    raise PluginFailure(*_end_of_child(status))


def _run_child(kind: engine.Kind, data: mmap.mmap, writing: int, *, deterministic: bool) -> None:
    """Never returns."""
    status = 1
    try:
        bound_compilation()
        try:
            result = _DONE + engine.compile_code(kind, data[:], deterministic=deterministic)
        except PluginFailure as exc:
            result = _REFUSED + json_body({"code": exc.code, "message": exc.message})
        view = memoryview(result)
        while view:
            view = view[os.write(writing, view) :]
        status = 0
    except BaseException:  # noqa: BLE001  the child must not return into its parent's code
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def _read(descriptor: int) -> bytes:
    result = bytearray()
    while piece := os.read(descriptor, _PIECE):
        result += piece
        if len(result) > MAX_COMPILED:
            raise PluginFailure("limit", f"compiles to more than {MAX_COMPILED} bytes")
    return bytes(result)


def _end_of_child(status: int) -> tuple[Code, str]:
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number in (signal.SIGALRM, signal.SIGXCPU):
        return "limit", f"compiling it took longer than {COMPILE_SECONDS:g} s"
    # A failed allocation aborts; if the kernel runs out of memory, it kills.
    if number in (signal.SIGABRT, signal.SIGKILL):
        return "limit", f"compiling it needs more than {COMPILE_MEMORY} bytes of memory"
    how = f"signal {number}" if number else f"status {os.waitstatus_to_exitcode(status)}"
    return "plugin-failed", f"the compiler ended with {how}"
