"""The native ABI: a shared object with C functions (ABI.md, «native»; include/circleosd_plugin.h)."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_int32, c_size_t, c_uint32, c_void_p, string_at
from typing import Any, Final

from circleosd.worker.failure import PluginFailure, contained, require_text
from circleosd.worker.frames import MAX_DESCRIPTION, MAX_HOST_CALL, MAX_LOG, MAX_NAME, Buffer, Load, json_body
from circleosd.worker.host import TOO_LONG, Host

ABI_VERSION: Final = 1
MAX_HANDLERS: Final = 256
_LINE_BUFFERED: Final = 1  # _IOLBF, setvbuf(3)

_HandlerFunction = ctypes.CFUNCTYPE(c_int32, c_void_p, c_char_p, c_size_t, c_void_p)
_LogFunction = ctypes.CFUNCTYPE(None, c_int32, c_void_p, c_size_t)
_WriteFunction = ctypes.CFUNCTYPE(c_int32, c_void_p, c_void_p, c_size_t)
_CallFunction = ctypes.CFUNCTYPE(c_int32, c_void_p, c_size_t, POINTER(c_void_p), POINTER(c_size_t))

_libc: Final = ctypes.CDLL(None)
_stdout: Final = c_void_p.in_dll(_libc, "stdout")


class _Host(ctypes.Structure):
    _fields_ = (
        ("abi_version", c_uint32),
        ("size", c_uint32),
        ("log", _LogFunction),
        ("write", _WriteFunction),
        ("call", _CallFunction),
    )


class _Handler(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("function", c_void_p))


class _Plugin(ctypes.Structure):
    _fields_ = (
        ("abi_version", c_uint32),
        ("handler_count", c_uint32),
        ("name", c_char_p),
        ("description", c_char_p),
        ("handlers", POINTER(_Handler)),
        ("init", c_void_p),
    )


class _Thread(threading.local):
    """The data of the call on this thread: its reply, and the last host call's answer."""

    def __init__(self) -> None:
        self.reply = bytearray()
        self.overflowed = False
        self.answer: Any = None


class NativePlugin:
    """A loaded native plugin. Calls may come from several threads; it is the plugin's job to allow that."""

    def __init__(self, artifact: int, load: Load, host: Host) -> None:
        self._host = host
        self._limits = load.limits
        self._thread = _Thread()
        self._callbacks = (
            _LogFunction(contained(self._log, lambda: None)),
            _WriteFunction(contained(self._write, lambda: -1)),
            _CallFunction(contained(self._call, lambda: 1)),
        )
        self._interface = _Host(ABI_VERSION, ctypes.sizeof(_Host), *self._callbacks)
        plugin = _initialize(artifact, load.entry or "plugin_init", load.limits.memory)
        self.description = _text(plugin.description, "description", MAX_DESCRIPTION) if plugin.description else None
        self._handlers = _handlers(plugin)
        self.functions = list(self._handlers)
        if plugin.init:
            status, reply = self._run(_HandlerFunction(plugin.init), b"")
            if status != 0:
                raise PluginFailure("plugin-failed", f"its init failed: {_message(status, reply)}", reported=True)

    def call(self, function: str, payload: Buffer) -> bytearray:
        """One call: the reply, UTF-8. Raises `PluginFailure`."""
        handler = self._handlers.get(function)
        if handler is None:
            raise PluginFailure("not-found", f"has no function {function!r}: it has {', '.join(self.functions)}")
        status, reply = self._run(handler, bytes(payload))
        if status != 0:
            raise PluginFailure("plugin-failed", _message(status, reply), reported=True)
        require_text(reply)
        return reply

    def event(self, topic: str, payload: Buffer) -> bytearray:
        """One event, for the handler `on_event`."""
        return self.call("on_event", json_body({"topic": topic, "payload": str(payload, "utf-8", "replace")}))

    def prepare(self) -> None:
        """There is nothing to prepare: the plugin's state is its process."""

    def _run(self, handler: Callable[..., int], payload: bytes) -> tuple[int, bytearray]:
        thread = self._thread
        thread.overflowed = False
        # A bytes object ends with a NUL byte that its length does not count, as the header promises.
        status = handler(byref(self._interface), payload, len(payload), 1)
        _libc.fflush(_stdout)  # output without a final newline, which nothing would write when the worker ends
        reply, thread.reply = thread.reply, bytearray()
        if thread.overflowed:
            raise PluginFailure("limit", f"wrote more than its limit for output of {self._limits.output} bytes")
        return status, reply

    def _log(self, level: int, text: int | None, length: int) -> None:
        data = string_at(text, min(length, 4 * MAX_LOG)) if text and length else b""
        self._host.log(level, data.decode("utf-8", "replace"))

    def _write(self, _reply: int | None, text: int | None, length: int) -> int:
        thread = self._thread
        if thread.overflowed or len(thread.reply) + length > self._limits.output:
            thread.overflowed = True
            return -1
        if text and length:
            thread.reply += string_at(text, length)
        return 0

    def _call(self, request: int | None, length: int, answer: Any, answer_length: Any) -> int:
        if length > MAX_HOST_CALL:
            ok, data = False, TOO_LONG.encode()
        else:
            ok, data = self._host.call_json(string_at(request, length) if request and length else b"")
        # A string buffer ends with a NUL byte, as the header promises.
        self._thread.answer = kept = ctypes.create_string_buffer(data)
        if answer:
            answer[0] = ctypes.addressof(kept)
        if answer_length:
            answer_length[0] = len(data)
        return 0 if ok else 1


def _initialize(artifact: int, entry: str, memory: int) -> _Plugin:
    # Otherwise its output would be buffered, because standard output is not a terminal, and lost with its worker.
    _libc.setvbuf(_stdout, None, _LINE_BUFFERED, c_size_t(0))
    # It stays open because a debugger opens it by the same name; below /proc/self that would be a descriptor of the
    # debugger, in gdb(1) a pipe that nobody writes to. The link has this process's pid in the pid namespace of /proc.
    path = f"/proc/{os.readlink('/proc/self')}/fd/{os.dup(artifact)}"
    try:
        library = ctypes.CDLL(path, mode=2)
    except OSError as exc:
        # dlerror(3) starts or ends with the file: `libx.so.1: version … not found (required by …)`
        reason = f"{exc}".removeprefix(f"{path}: ").replace(path, "it")
        if reason.startswith("cannot dynamically load"):
            reason = "it is an executable, not a shared object: link it with -shared"
        if "failed to map segment" not in reason:
            raise PluginFailure("bad-request", reason) from exc
        # This does not give the reason.
        if os.fstatvfs(artifact).f_flag & os.ST_NOEXEC:
            reason += "; plugins are stored on a file system mounted noexec"
            raise PluginFailure("bad-request", reason) from exc
        reason += f"; it needs more than its limit for memory of {memory} bytes"
        raise PluginFailure("limit", reason) from exc
    try:
        function = library[entry]
    except AttributeError:
        raise PluginFailure("bad-request", f"it exports no function {entry}") from None
    function.restype = POINTER(_Plugin)
    function.argtypes = ()
    pointer = function()
    if not pointer:
        raise PluginFailure("plugin-failed", f"its {entry} returned NULL")
    plugin: _Plugin = pointer.contents
    if plugin.abi_version != ABI_VERSION:
        raise PluginFailure(
            "bad-request",
            f"it has version {plugin.abi_version} of the native ABI, not {ABI_VERSION}",
        )
    return plugin


def _handlers(plugin: _Plugin) -> dict[str, Callable[..., int]]:
    count = plugin.handler_count
    if not 1 <= count <= MAX_HANDLERS:
        raise PluginFailure("bad-request", f"it has {count} handlers, not 1 to {MAX_HANDLERS}")
    if not plugin.handlers:
        raise PluginFailure("bad-request", "its pointer to its handlers is NULL")
    handlers: dict[str, Callable[..., int]] = {}
    for index in range(count):
        handler = plugin.handlers[index]
        name = _text(handler.name, "handler's name", MAX_NAME) if handler.name else ""
        if not name or not handler.function or name in handlers:
            raise PluginFailure("bad-request", f"its handler {index} has no name, no function, or a name twice")
        handlers[name] = _HandlerFunction(handler.function)
    return handlers


def _text(data: bytes, what: str, bound: int) -> str:
    if len(data) > bound:
        raise PluginFailure("bad-request", f"its {what} is longer than {bound} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise PluginFailure("bad-request", f"its {what} is not UTF-8") from exc


def _message(status: int, reply: bytearray) -> str:
    return reply.decode("utf-8", "replace") or f"returned {status}"
