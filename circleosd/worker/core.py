"""The core ABI: a WebAssembly module that receives its payload in a buffer in its own memory (ABI.md, «core»)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, addressof, byref, c_bool, c_char_p, c_int64, c_size_t, c_void_p, memmove, string_at
from typing import Any, Final, NamedTuple

from wasmtime import _bindings as c

from circleosd.worker.engine import (
    FAULT,
    NO_FINALIZER,
    Engine,
    Pointer,
    chars,
    delete_store,
    i32_function_type,
    new_trap,
    raw_function,
    take_error,
    take_trap,
)
from circleosd.worker.failure import PluginFailure, contained, require_text
from circleosd.worker.frames import MAX_HOST_CALL, MAX_LOG, Buffer, Load, json_body
from circleosd.worker.host import TOO_LONG, Host
from circleosd.worker.inspect import CORE_IMPORTS, Artifact
from circleosd.worker.instances import Instances

# From this size on, a payload is copied to the plugin directly from the receive buffer.
_LARGE: Final = 16 << 10

_instantiate = c._wasmtime_instance_pre_instantiate
_export = raw_function("wasmtime_instance_export_get", c_bool, c_void_p, c_void_p, c_char_p, c_size_t, c_void_p)
_call = raw_function("wasmtime_func_call_unchecked", c_void_p, c_void_p, c_void_p, c_void_p, c_size_t, c_void_p)
_memory_data = raw_function("wasmtime_memory_data", c_void_p, c_void_p, c_void_p)
_memory_size = raw_function("wasmtime_memory_data_size", c_size_t, c_void_p, c_void_p)
_caller_context = raw_function("wasmtime_caller_context", c_void_p, c_void_p)
_caller_export = raw_function("wasmtime_caller_export_get", c_bool, c_void_p, c_char_p, c_size_t, c_void_p)

_MEMORY: Final = b"memory"
_BUFFER: Final = b"circleosd_buffer"
_INITIALIZE: Final = b"_initialize"


class _Instance:
    """One instance in its own store, with the data for calling it. Names ending in `_at` are addresses."""

    __slots__ = (
        "answers",
        "broken",
        "buffer_address",
        "buffer_at",
        "buffer_size",
        "context",
        "context_at",
        "functions",
        "kept",
        "memory_at",
        "slot",
        "slot_at",
        "store",
        "trap",
        "trap_at",
        "wasm",
    )

    def __init__(self, store: Pointer, context: Pointer, answers: dict[int, bytes]) -> None:
        self.store = store
        self.context = context
        self.answers = answers
        self.context_at = ctypes.cast(context, c_void_p).value or 0
        self.wasm = c.wasmtime_instance_t()
        self.kept: list[Any] = []  # the objects at the addresses
        self.memory_at = 0
        self.buffer_at = 0
        self.functions: dict[str, int] = {}
        slot = c.wasmtime_val_raw_t()  # the argument of a call, then its result; little-endian
        self.slot_at = addressof(slot)
        self.slot = c_int64.from_buffer(slot)
        self.trap = c_void_p()
        self.trap_at = addressof(self.trap)
        self.buffer_address = 0
        self.buffer_size = -1
        self.broken = False

    def export(self, name: bytes) -> Any:
        """The union with the export of that name."""
        item = c.wasmtime_extern_t()
        if not _export(self.context_at, addressof(self.wasm), name, len(name), addressof(item)):
            raise PluginFailure("plugin-failed", "an export is missing from its instance")
        self.kept.append(item)
        return item.of

    def function(self, name: bytes) -> int:
        """The address of an exported function."""
        return addressof(self.export(name).func)

    def delete(self) -> None:
        # First: the next store may be at the same address.
        self.answers.pop(self.context_at, None)
        delete_store(self.store)


class _Usual(NamedTuple):
    """The expected properties of the next call, which are those of the last one."""

    function: str
    size: int


class CorePlugin:
    """A loaded core plugin. Calls may come from several threads if its instances are fresh."""

    description: str | None = None

    def __init__(self, engine: Engine, module: Pointer, artifact: Artifact, load: Load, host: Host) -> None:
        self.functions = artifact.functions
        self._names = {name: name.encode() for name in artifact.functions}
        self._engine = engine
        self._output = load.limits.output
        self._host = host
        self._initialize = "_initialize" in artifact.hooks
        self._usual: _Usual | None = None
        self._instances = Instances(engine, self._new_instance, shared=load.instance == "shared")
        self._imports = _Imports(host)
        self._linked = self._imports.link(engine, module)
        self._instances.add(self._new_instance())
        if "on_event" in artifact.hooks and "on_event" not in artifact.functions:
            host.log(2, "gets no events: it exports on_event with a type other than (i32) -> i64")

    def call(self, function: str, payload: Buffer) -> bytes:
        """One call: the reply, UTF-8. Raises `PluginFailure`."""
        if function not in self._names:
            names = ", ".join(self.functions)
            raise PluginFailure("not-found", f"has no function {function!r}: it has {names}")
        reply, is_error = self._instances.serve(self._serve, function, payload)
        self._usual = _Usual(function, len(payload))
        require_text(reply)
        if is_error:
            raise PluginFailure("plugin-failed", reply.decode() or "failed without a message", reported=True)
        return reply

    def event(self, topic: str, payload: Buffer) -> bytes:
        """One event, for the handler `on_event`."""
        return self.call("on_event", json_body({"topic": topic, "payload": str(payload, "utf-8", "replace")}))

    def prepare(self) -> None:
        """Between two calls: deletes the used instance and makes that of the next call."""
        self._instances.prepare(self._anticipate)

    def _anticipate(self, instance: _Instance) -> None:
        """Does in advance what is possible for the usual call."""
        if self._usual is None or self._engine.deterministic:  # a call's fuel is for the whole call
            return
        self._find(instance, self._usual.function)
        self._make_room(instance, self._usual.size)

    def _serve(self, instance: _Instance, function: str, payload: Buffer) -> tuple[bytes, bool]:
        """The reply of a function to a payload, and whether it is an error."""
        handler, size = instance.functions.get(function) or self._find(instance, function), len(payload)
        if size > instance.buffer_size:
            self._make_room(instance, size)
        if size:
            _write(instance, payload)
        return self._run(instance, handler, size)

    def _make_room(self, instance: _Instance, size: int) -> None:
        """Asks the plugin for a buffer for `size` bytes."""
        instance.slot.value = size
        self._enter(instance, instance.buffer_at)
        address = instance.slot.value & 0xFFFFFFFF
        if address == 0:
            raise PluginFailure("limit", f"has no room for a payload of {size} bytes", reported=True)
        available = _memory_size(instance.context_at, instance.memory_at)
        if address + size > available:
            raise PluginFailure(
                "plugin-failed",
                f"gave a buffer outside its memory: {size} bytes at address {address}, of {available} bytes",
            )
        instance.buffer_address = address
        instance.buffer_size = size

    def _run(self, instance: _Instance, handler: int, size: int) -> tuple[bytes, bool]:
        instance.slot.value = size
        self._enter(instance, handler)
        packed = instance.slot.value & 0xFFFFFFFFFFFFFFFF
        length = packed & 0x7FFFFFFF
        is_error = bool(packed & 0x80000000)
        if length > self._output:
            raise PluginFailure(
                "limit", f"gave a reply of {length} bytes: its limit for output is {self._output} bytes"
            )
        if length == 0:
            return b"", is_error
        address = packed >> 32
        available = _memory_size(instance.context_at, instance.memory_at)
        if address + length > available:
            raise PluginFailure(
                "plugin-failed",
                f"gave a reply outside its memory: {length} bytes at address {address}, of {available} bytes",
            )
        return string_at(_memory_data(instance.context_at, instance.memory_at) + address, length), is_error

    def _enter(self, instance: _Instance, function: int) -> None:
        """Calls a function of the instance; `instance.slot` holds the argument and then the result."""
        error = _call(instance.context_at, function, instance.slot_at, 1, instance.trap_at)
        if error or instance.trap:
            instance.broken = True
            raise self._failure(instance, ctypes.cast(error, POINTER(c.wasmtime_error_t)))

    def _new_instance(self) -> _Instance:
        store, context = self._engine.new_store()
        instance = _Instance(store, context, self._imports.answers)
        try:
            self._engine.allow(context)
            trap = ctypes.cast(instance.trap_at, POINTER(POINTER(c.wasm_trap_t)))
            error = _instantiate(self._linked, context, byref(instance.wasm), trap)
            if error or instance.trap:
                raise self._failure(instance, error)
            instance.memory_at = addressof(instance.export(_MEMORY).memory)
            instance.buffer_at = instance.function(_BUFFER)
            if self._initialize:
                self._enter(instance, instance.function(_INITIALIZE))
        except BaseException:
            instance.delete()
            raise
        return instance

    def _find(self, instance: _Instance, name: str) -> int:
        function = instance.functions[name] = instance.function(self._names[name])
        return function

    def _failure(self, instance: _Instance, error: Pointer) -> PluginFailure:
        if error:
            return self._engine.failure(take_error(error))
        found = self._engine.failure(take_trap(ctypes.cast(instance.trap, POINTER(c.wasm_trap_t))))
        instance.trap.value = None
        size = _memory_size(instance.context_at, instance.memory_at) if instance.memory_at else 0
        return self._engine.with_memory(found, size)


def _write(instance: _Instance, payload: Buffer) -> None:
    """Copies the payload to the plugin's buffer."""
    target = _memory_data(instance.context_at, instance.memory_at) + instance.buffer_address
    size = len(payload)
    if size < _LARGE or not isinstance(payload, memoryview) or payload.readonly:
        memmove(target, bytes(payload), size)
    else:
        memmove(target, addressof(ctypes.c_char.from_buffer(payload)), size)


class _Imports:
    """The functions that a core module may import. None of them raises an exception: they trap.

    `answers` holds the answer of each instance's last `host_call`, until the next one, by the address of its context.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self.answers: dict[int, bytes] = {}
        self._callbacks: list[Any] = []

    def link(self, engine: Engine, module: Pointer) -> Pointer:
        """The module with its imports resolved: a `wasmtime_instance_pre_t *`."""
        linker = c.wasmtime_linker_new(engine.pointer)
        functions = {"log": self._log, "host_call": self._host_call, "host_answer": self._host_answer}
        for name, function in functions.items():
            parameters, results = CORE_IMPORTS[name]
            callback = c.wasmtime_func_unchecked_callback_t(_trapping(function))
            self._callbacks.append(callback)
            engine.check(
                c.wasmtime_linker_define_func_unchecked(
                    linker,
                    chars("circleosd"),
                    len("circleosd"),
                    chars(name),
                    len(name),
                    i32_function_type(len(parameters), len(results)),
                    callback,
                    None,
                    NO_FINALIZER,
                )
            )
        linked = POINTER(c.wasmtime_instance_pre_t)()
        engine.check(c.wasmtime_linker_instantiate_pre(linker, module, byref(linked)))
        return linked

    def _log(self, caller: Any, arguments: Any) -> None:
        # Longer text is cut anyway; a character takes at most four bytes.
        length = arguments[2].i32 & 0xFFFFFFFF
        address = _place(caller, "log", arguments[1].i32, length)
        self._host.log(arguments[0].i32, string_at(address, min(length, 4 * MAX_LOG)).decode("utf-8", "replace"))

    def _host_call(self, caller: Any, arguments: Any) -> None:
        length = arguments[1].i32 & 0xFFFFFFFF
        address = _place(caller, "host_call", arguments[0].i32, length)
        if length > MAX_HOST_CALL:
            ok, answer = False, TOO_LONG.encode()
        else:
            ok, answer = self._host.call_json(string_at(address, length))
        self.answers[_caller_context(caller)] = answer
        packed = len(answer) | (0 if ok else 1 << 31)
        arguments[0].i32 = packed - (1 << 32) if packed >> 31 else packed

    def _host_answer(self, caller: Any, arguments: Any) -> None:
        answer = self.answers.get(_caller_context(caller), b"")
        length = min(arguments[1].i32 & 0xFFFFFFFF, len(answer))
        memmove(_place(caller, "host_answer", arguments[0].i32, length), answer, length)
        arguments[0].i32 = length


def _trapping(function: Callable[[Any, Any], None]) -> Callable[..., int]:
    """A callback for Wasmtime that turns exceptions of `function` into traps."""

    def callback(_environment: Any, caller: Any, arguments: Any, _count: int) -> int:
        try:
            function(caller, arguments)
        except PluginFailure as exc:
            return new_trap(exc.message)
        return 0

    return contained(callback, lambda: new_trap(FAULT))


def _place(caller: Any, what: str, pointer: int, length: int) -> int:
    """The process address of `length` bytes at `pointer`. Raises `PluginFailure` if any of them is outside memory."""
    item = c.wasmtime_extern_t()
    context_at, memory_at = _caller_context(caller), addressof(item.of.memory)
    if not _caller_export(caller, _MEMORY, len(_MEMORY), addressof(item)):
        raise PluginFailure("plugin-failed", f"{what}: the plugin exports no memory")
    pointer &= 0xFFFFFFFF
    size = _memory_size(context_at, memory_at)
    if pointer + length > size:
        raise PluginFailure(
            "plugin-failed", f"{what}: {length} bytes at address {pointer} lie outside memory, of {size} bytes"
        )
    return int(_memory_data(context_at, memory_at) or 0) + pointer
