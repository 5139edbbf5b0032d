"""The core ABI: a WebAssembly module that takes its payload in a buffer of its own memory (ABI.md, «core»)."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress
from ctypes import POINTER, byref, c_void_p, memmove, string_at
from typing import Any, Final

from wasmtime import _bindings as c

from circleosd.worker.engine import (
    FAULT,
    NO_FINALIZER,
    Engine,
    Pointer,
    chars,
    check,
    delete_store,
    failure,
    i32_function_type,
    new_trap,
    take_error,
    trap_failure,
)
from circleosd.worker.failure import PluginFailure, contained
from circleosd.worker.frames import MAX_HOST_CALL, MAX_LOG, Buffer, Load, json_body
from circleosd.worker.host import Host
from circleosd.worker.inspect import Artifact
from circleosd.worker.text import require_text

# From this size on, a payload is copied to the plugin straight from where it was received.
_LARGE: Final = 16 << 10

_instantiate = c._wasmtime_instance_pre_instantiate
_export = c._wasmtime_instance_export_get
_call = c._wasmtime_func_call_unchecked
_memory_data = c._wasmtime_memory_data
_memory_size = c._wasmtime_memory_data_size

_MEMORY: Final = chars("memory")
_BUFFER: Final = chars("circleosd_buffer")
_INITIALIZE: Final = chars("_initialize")

_PAGE: Final = 64 << 10


class _Instance:
    """One instance in a store of its own, with what a call of it needs."""

    __slots__ = (
        "broken",
        "buffer",
        "buffer_address",
        "buffer_size",
        "context",
        "functions",
        "memory",
        "raw",
        "store",
        "trap",
        "wasm",
    )

    def __init__(self, store: Pointer, context: Pointer) -> None:
        self.store = store
        self.context = context
        self.wasm = c.wasmtime_instance_t()
        self.memory: Any = None
        self.buffer: Any = None
        self.functions: dict[str, Any] = {}
        self.raw = (c.wasmtime_val_raw_t * 1)()
        self.trap = POINTER(c.wasm_trap_t)()
        self.buffer_address = 0
        self.buffer_size = -1
        self.broken = False

    def delete(self) -> None:
        delete_store(self.store)


class CorePlugin:
    """A loaded core plugin. Calls may come from several threads if its instances are fresh."""

    description: str | None = None

    def __init__(self, engine: Engine, module: Pointer, artifact: Artifact, load: Load, host: Host) -> None:
        self.functions = artifact.functions
        self._names = {name: (chars(name), len(name.encode())) for name in artifact.functions}
        self._engine = engine
        self._limits = load.limits
        self._host = host
        self._shared = load.instance == "shared"
        self._initialize = "_initialize" in artifact.hooks
        self._ready: list[_Instance] = []
        self._spent: list[_Instance] = []
        self._imports = _Imports(host)
        self._linked = self._imports.link(engine, module)
        self._ready.append(self._new_instance())

    def call(self, function: str, payload: Buffer) -> bytes:
        """One call: the reply, UTF-8. Raises `PluginFailure`."""
        if function not in self._names:
            names = ", ".join(self.functions)
            raise PluginFailure("not-found", f"has no function {function!r}: it has {names}")
        try:
            instance = self._ready.pop()
        except IndexError:
            instance = self._new_instance()
        try:
            self._engine.allow(instance.context)
            handler = instance.functions.get(function) or self._find(instance, function)
            self._write(instance, payload)
            reply, is_error = self._run(instance, handler, len(payload))
        except PluginFailure as exc:
            exc.restarted = self._shared and instance.broken
            raise
        finally:
            keep = self._shared and not instance.broken
            (self._ready if keep else self._spent).append(instance)
        require_text(reply)
        if is_error:
            raise PluginFailure("plugin-failed", reply.decode() or "failed without a message")
        return reply

    def event(self, topic: str, payload: Buffer) -> bytes:
        """One event, for the handler `on_event`."""
        return self.call("on_event", json_body({"topic": topic, "payload": str(payload, "utf-8", "replace")}))

    def prepare(self) -> None:
        """Between two calls: deletes what was used and makes the instance of the next call."""
        while self._spent:
            self._spent.pop().delete()
        if not self._ready:
            # What fails here fails again, and is reported, in the call that needs the instance.
            with suppress(PluginFailure):
                self._ready.append(self._new_instance())

    def _write(self, instance: _Instance, payload: Buffer) -> None:
        size = len(payload)
        if size <= instance.buffer_size:
            address = instance.buffer_address
        else:
            raw = instance.raw
            raw[0].i32 = size
            self._enter(instance, instance.buffer)
            address = raw[0].i32 & 0xFFFFFFFF
            if address == 0:
                raise PluginFailure("limit", f"has no room for a payload of {size} bytes")
            available = _memory_size(instance.context, instance.memory)
            if address + size > available:
                raise PluginFailure(
                    "plugin-failed",
                    f"gave a buffer outside its memory: {size} bytes at address {address}, of {available} bytes",
                )
            instance.buffer_address = address
            instance.buffer_size = size
        if size == 0:
            return
        base = ctypes.cast(_memory_data(instance.context, instance.memory), c_void_p).value or 0
        if size < _LARGE or not isinstance(payload, memoryview) or payload.readonly:
            memmove(base + address, bytes(payload), size)
        else:
            memmove(base + address, ctypes.addressof(ctypes.c_char.from_buffer(payload)), size)

    def _run(self, instance: _Instance, handler: Any, size: int) -> tuple[bytes, bool]:
        raw = instance.raw
        raw[0].i32 = size
        self._enter(instance, handler)
        packed = raw[0].i64 & 0xFFFFFFFFFFFFFFFF
        length = packed & 0x7FFFFFFF
        is_error = bool(packed & 0x80000000)
        if length > self._limits.output:
            raise PluginFailure(
                "limit", f"gave a reply of {length} bytes: its limit for output is {self._limits.output} bytes"
            )
        if length == 0:
            return b"", is_error
        address = packed >> 32
        available = _memory_size(instance.context, instance.memory)
        if address + length > available:
            raise PluginFailure(
                "plugin-failed",
                f"gave a reply outside its memory: {length} bytes at address {address}, of {available} bytes",
            )
        base = ctypes.cast(_memory_data(instance.context, instance.memory), c_void_p).value or 0
        return string_at(base + address, length), is_error

    def _enter(self, instance: _Instance, function: Any) -> None:
        """Calls a function of the instance; argument and result are in `instance.raw`."""
        error = _call(instance.context, function, instance.raw, 1, byref(instance.trap))
        if error or instance.trap:
            instance.broken = True
            raise self._failure(instance, error)

    def _new_instance(self) -> _Instance:
        store, context = self._engine.new_store()
        instance = _Instance(store, context)
        try:
            self._engine.allow(context)
            error = _instantiate(self._linked, context, byref(instance.wasm), byref(instance.trap))
            if error or instance.trap:
                raise self._failure(instance, error)
            instance.memory = byref(self._export(instance, _MEMORY, len(_MEMORY)).memory)
            instance.buffer = byref(self._export(instance, _BUFFER, len(_BUFFER)).func)
            if self._initialize:
                self._enter(instance, byref(self._export(instance, _INITIALIZE, len(_INITIALIZE)).func))
        except BaseException:
            instance.delete()
            raise
        return instance

    def _find(self, instance: _Instance, name: str) -> Any:
        encoded, length = self._names[name]
        function = byref(self._export(instance, encoded, length).func)
        instance.functions[name] = function
        return function

    def _export(self, instance: _Instance, name: Any, length: int) -> Any:
        item = c.wasmtime_extern_t()
        if not _export(instance.context, byref(instance.wasm), name, length, byref(item)):
            raise PluginFailure("plugin-failed", "an export is missing from its instance")
        return item.of

    def _failure(self, instance: _Instance, error: Pointer) -> PluginFailure:
        if error:
            return failure(take_error(error), self._limits)
        found = trap_failure(instance.trap, self._limits)
        instance.trap = POINTER(c.wasm_trap_t)()
        if instance.memory is not None and found.code == "plugin-failed":
            size = _memory_size(instance.context, instance.memory)
            if size + _PAGE > self._limits.memory:
                return PluginFailure(
                    "limit",
                    f"{found.message}; its memory is at its limit of {self._limits.memory} bytes",
                    found.backtrace,
                )
        return found


class _Answers(threading.local):
    """The answer of this thread's last `host_call`, until the next."""

    kept: bytes = b""


class _Imports:
    """The functions that a core module may import. None of them raises: they trap."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._answers = _Answers()
        self._callbacks: list[Any] = []

    def link(self, engine: Engine, module: Pointer) -> Pointer:
        """The module with its imports resolved: a `wasmtime_instance_pre_t *`."""
        linker = c.wasmtime_linker_new(engine.pointer)
        for name, parameters, results, function in (
            ("log", 3, 0, self._log),
            ("host_call", 2, 1, self._host_call),
            ("host_answer", 2, 1, self._host_answer),
        ):
            callback = c.wasmtime_func_unchecked_callback_t(_trapping(function))
            self._callbacks.append(callback)
            check(
                c.wasmtime_linker_define_func_unchecked(
                    linker,
                    chars("circleosd"),
                    len("circleosd"),
                    chars(name),
                    len(name),
                    i32_function_type(parameters, results),
                    callback,
                    None,
                    NO_FINALIZER,
                ),
                engine.limits,
            )
        linked = POINTER(c.wasmtime_instance_pre_t)()
        check(c.wasmtime_linker_instantiate_pre(linker, module, byref(linked)), engine.limits)
        return linked

    def _log(self, caller: Any, arguments: Any) -> None:
        level = arguments[0].i32 & 0xFFFFFFFF
        # What is longer is cut anyhow; a character takes at most four bytes.
        length = arguments[2].i32 & 0xFFFFFFFF
        address = _place(caller, "log", arguments[1].i32, length)
        self._host.log(min(level, 3), string_at(address, min(length, 4 * MAX_LOG)).decode("utf-8", "replace"))

    def _host_call(self, caller: Any, arguments: Any) -> None:
        length = arguments[1].i32 & 0xFFFFFFFF
        address = _place(caller, "host_call", arguments[0].i32, length)
        if length > MAX_HOST_CALL:
            ok, answer = False, b"limit: a host call may have %d bytes" % MAX_HOST_CALL
        else:
            ok, answer = self._host.call_json(string_at(address, length))
        self._answers.kept = answer
        packed = len(answer) | (0 if ok else 1 << 31)
        arguments[0].i32 = packed - (1 << 32) if packed >> 31 else packed

    def _host_answer(self, caller: Any, arguments: Any) -> None:
        answer = self._answers.kept
        length = min(arguments[1].i32 & 0xFFFFFFFF, len(answer))
        memmove(_place(caller, "host_answer", arguments[0].i32, length), answer, length)
        arguments[0].i32 = length


def _trapping(function: Callable[[Any, Any], None]) -> Callable[..., int]:
    """A callback for Wasmtime that turns what `function` raises into a trap."""

    def callback(_environment: Any, caller: Any, arguments: Any, _count: int) -> int:
        try:
            function(caller, arguments)
        except PluginFailure as exc:
            return new_trap(exc.message)
        return 0

    return contained(callback, lambda: new_trap(FAULT))


def _place(caller: Any, what: str, pointer: int, length: int) -> int:
    """The process address of `length` bytes at `pointer`. Raises `PluginFailure` if any is outside memory."""
    item = c.wasmtime_extern_t()
    context = c.wasmtime_caller_context(caller)
    if not c.wasmtime_caller_export_get(caller, _MEMORY, len(_MEMORY), byref(item)):
        raise PluginFailure("plugin-failed", f"{what}: the plugin exports no memory")
    pointer &= 0xFFFFFFFF
    size = _memory_size(context, byref(item.of.memory))
    if pointer + length > size:
        raise PluginFailure(
            "plugin-failed", f"{what}: {length} bytes at address {pointer} lie outside memory, of {size} bytes"
        )
    base: int = ctypes.cast(_memory_data(context, byref(item.of.memory)), c_void_p).value or 0
    return base + pointer
