"""The parts of Wasmtime's C API that the worker needs: engines, modules, stores, traps.

The package's own classes look up types at every call (47 µs instead of 2); only its declarations of the C API,
`wasmtime._bindings`, are used here. Pointers are ctypes pointers; the caller of a `new_…` function owns the result.
"""

from __future__ import annotations

import ctypes
import os
import re
from ctypes import POINTER, byref, c_char_p, c_void_p
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from wasmtime import _bindings as c
from wasmtime._ffi import dll

from circleosd.worker.failure import PluginFailure
from circleosd.worker.frames import Limits
from circleosd.worker.watch import ticks

Pointer: TypeAlias = Any
Kind: TypeAlias = Literal["module", "component"]

MAX_STACK: Final = 512 << 10
MAX_TABLE_ELEMENTS: Final = 100_000
MAX_BACKTRACE: Final = 16
FUEL_PER_SECOND: Final = 200_000_000

# Memory that a slot of the pool keeps resident and clears itself, instead of with a system call.
KEEP_RESIDENT: Final = 256 << 10
MAX_INSTANCE_SIZE: Final = 16 << 20


class Parts(NamedTuple):
    """How many instances, memories and tables of core modules serve one call."""

    instances: int
    memories: int
    tables: int


# A component consists of several modules, each with an instance and perhaps its own memory and tables.
PARTS: Final[dict[Kind, Parts]] = {"module": Parts(1, 1, 8), "component": Parts(256, 16, 24)}

# Wasmtime's words when an instance does not fit its store or its slot.
_LIMIT_SIGNS: Final = ("exceeds the limit of", "exceeds the per-instance limit", "resource limit exceeded")

# Its words for a feature that `configuration` leaves off; it may tell to enable it, which a plugin's author cannot.
_FEATURE_SIGNS: Final = re.compile("enabled|disabled|proposal|feature|required for")

NO_FINALIZER: Final = ctypes.cast(0, ctypes.CFUNCTYPE(None, c_void_p))
_I32: Final = 0
_PAGE: Final = 64 << 10
_NO_OFFSET: Final = ctypes.c_size_t(-1).value


def configuration(*, deterministic: bool) -> Pointer:
    """A `wasm_config_t` with everything that compiled code depends on: increase cachekey.CONFIGURATION with changes."""
    config = c.wasm_config_new()
    c.wasmtime_config_max_wasm_stack_set(config, MAX_STACK)
    c.wasmtime_config_epoch_interruption_set(config, not deterministic)
    c.wasmtime_config_consume_fuel_set(config, deterministic)
    c.wasmtime_config_cranelift_nan_canonicalization_set(config, deterministic)
    c.wasmtime_config_wasm_relaxed_simd_deterministic_set(config, deterministic)
    c.wasmtime_config_wasm_threads_set(config, False)
    c.wasmtime_config_shared_memory_set(config, False)
    c.wasmtime_config_wasm_memory64_set(config, False)
    c.wasmtime_config_wasm_gc_set(config, False)
    # Exceptions need a GC heap per call, which the pool does not have; the other two are not in ABI.md.
    c.wasmtime_config_wasm_exceptions_set(config, False)
    c.wasmtime_config_wasm_function_references_set(config, False)
    c.wasmtime_config_wasm_wide_arithmetic_set(config, False)
    c.wasmtime_config_native_unwind_info_set(config, False)
    return config


def _pool(limits: Limits, kind: Kind) -> Pointer:
    """Slots for the instances of all concurrent calls, one being prepared and one not yet deleted."""
    pool = c.wasmtime_pooling_allocation_config_new()
    slots = limits.concurrency + 2
    instances, memories, tables = PARTS[kind]
    c.wasmtime_pooling_allocation_config_total_component_instances_set(pool, slots if kind == "component" else 1)
    c.wasmtime_pooling_allocation_config_max_component_instance_size_set(pool, MAX_INSTANCE_SIZE)
    c.wasmtime_pooling_allocation_config_total_core_instances_set(pool, slots * instances)
    c.wasmtime_pooling_allocation_config_max_core_instance_size_set(pool, MAX_INSTANCE_SIZE)
    c.wasmtime_pooling_allocation_config_total_memories_set(pool, slots * memories)
    c.wasmtime_pooling_allocation_config_total_tables_set(pool, slots * tables)
    c.wasmtime_pooling_allocation_config_max_tables_per_module_set(pool, tables)
    c.wasmtime_pooling_allocation_config_table_elements_set(pool, MAX_TABLE_ELEMENTS)
    c.wasmtime_pooling_allocation_config_max_memory_size_set(pool, min(limits.memory, 4 << 30))
    c.wasmtime_pooling_allocation_config_linear_memory_keep_resident_set(pool, KEEP_RESIDENT)
    # Neither is used, but a thousand stacks would be reserved.
    c.wasmtime_pooling_allocation_config_total_stacks_set(pool, 1)
    c.wasmtime_pooling_allocation_config_total_gc_heaps_set(pool, 1)
    return pool


class Trouble(NamedTuple):
    """A parsed trap or error of Wasmtime: its innermost cause, and all causes, outermost first."""

    cause: str
    causes: list[str]
    backtrace: list[str]
    exit_status: int | None


class Engine:
    """One Wasmtime engine with a worker's configuration, which lives as long as the process."""

    def __init__(self, kind: Kind, limits: Limits, *, deterministic: bool) -> None:
        self.limits = limits
        self._parts = PARTS[kind]
        self.deterministic = deterministic
        self.fuel = max(1, int(limits.time * FUEL_PER_SECOND))
        self._ticks = ticks(limits.time) + 1
        config = configuration(deterministic=deterministic)
        c.wasmtime_pooling_allocation_strategy_set(config, _pool(limits, kind))
        self.pointer = c.wasm_engine_new_with_config(config)

    def tick(self) -> tuple[int, int] | None:
        """The C function that advances the epoch, and its argument; None if fuel is used instead.

        It only does one atomic addition, so it may be called from any thread at any time.
        """
        if self.deterministic:
            return None
        function = ctypes.cast(c._wasmtime_engine_increment_epoch, c_void_p).value
        engine = ctypes.cast(self.pointer, c_void_p).value
        assert function is not None
        assert engine is not None
        return function, engine

    def new_store(self) -> tuple[Pointer, Pointer]:
        """A store for the instances of one module or component, with the limits, and its context."""
        store = _store_new(self.pointer, None, NO_FINALIZER)
        instances, memories, tables = self._parts
        _limiter(store, self.limits.memory, MAX_TABLE_ELEMENTS, instances, tables, memories)
        return store, _store_context(store)

    def allow(self, context: Pointer) -> None:
        """Lets the store run for a call's time from now on, or, if deterministic, for a call's fuel."""
        if self.deterministic:
            self.check(c.wasmtime_context_set_fuel(context, self.fuel))
        else:
            _set_deadline(context, self._ticks)

    def check(self, error: Pointer) -> None:
        """Raises the `PluginFailure` for a `wasmtime_error_t *`, unless it is NULL."""
        if error:
            raise self.failure(take_error(error))

    def failure(self, trouble: Trouble) -> PluginFailure:
        """The failure for a trap or error: an exceeded limit, or the plugin's own fault."""
        cause, backtrace, seconds = trouble.cause, trouble.backtrace, self.limits.time
        if cause == "wasm trap: interrupt":
            return PluginFailure("timeout", f"took longer than {seconds:g} s", backtrace)
        if cause.startswith("wasm trap: all fuel consumed"):
            return PluginFailure("limit", f"used up its fuel of {self.fuel} units (time = {seconds:g} s)", backtrace)
        if any(sign in cause for sign in _LIMIT_SIGNS):
            figures = re.sub("0x[0-9a-f]+", lambda found: str(int(found[0], 16)), cause)
            return PluginFailure("limit", f"needs more than its limits allow: {figures}", backtrace)
        if cause.startswith("wasm trap: "):
            return PluginFailure("plugin-failed", "trap: " + cause.removeprefix("wasm trap: "), backtrace)
        # The outermost cause of an error in wasm code is the backtrace as text.
        return PluginFailure("plugin-failed", cause if backtrace else ": ".join(trouble.causes), backtrace)

    def with_memory(self, found: PluginFailure, size: int) -> PluginFailure:
        """The failure of an instance: by the memory limit if its memory of `size` bytes cannot grow by a page."""
        if found.code != "plugin-failed" or size + _PAGE <= self.limits.memory:
            return found
        text = f"{found.message}; its memory is at its limit of {self.limits.memory} bytes"
        return PluginFailure("limit", text, found.backtrace)


def raw_function(name: str, result: Any, *parameters: Any) -> Any:
    """A function of the C API for the hot path, with plain ctypes types: pointers are numbers.

    The package's own declarations create an object for every pointer, which takes longer than the call.
    """
    function = dll[name]
    function.restype = result
    function.argtypes = parameters
    return function


_store_new = c._wasmtime_store_new
_store_context = c._wasmtime_store_context
_limiter = c._wasmtime_store_limiter
_set_deadline = c._wasmtime_context_set_epoch_deadline
delete_store = c._wasmtime_store_delete


class _Functions(NamedTuple):
    pointer: Any
    new: Any
    serialize: Any
    deserialize: Any
    deserialize_file: Any


_KINDS: Final[dict[Kind, _Functions]] = {
    "module": _Functions(
        POINTER(c.wasmtime_module_t),
        c.wasmtime_module_new,
        c.wasmtime_module_serialize,
        c.wasmtime_module_deserialize,
        c.wasmtime_module_deserialize_file,
    ),
    "component": _Functions(
        POINTER(c.wasmtime_component_t),
        c.wasmtime_component_new,
        c.wasmtime_component_serialize,
        c.wasmtime_component_deserialize,
        c.wasmtime_component_deserialize_file,
    ),
}


def compile_code(kind: Kind, data: bytes, *, deterministic: bool) -> bytes:
    """Compiles and serializes. Raises `PluginFailure` (`bad-request`) for invalid code."""
    functions = _KINDS[kind]
    engine = c.wasm_engine_new_with_config(configuration(deterministic=deterministic))
    pointer = functions.pointer()
    error = functions.new(engine, _bytes_pointer(data), len(data), byref(pointer))
    if error:
        reason = take_error(error).cause
        wanting = _FEATURE_SIGNS.search(re.sub("`[^`]*`", "", reason))
        what = "needs a feature that this host does not support" if wanting else "does not compile"
        raise PluginFailure("bad-request", f"it {what}: {reason}")
    vector = c.wasm_byte_vec_t()
    error = functions.serialize(pointer, byref(vector))
    if error:
        raise PluginFailure("plugin-failed", f"cannot serialize the compilation: {take_error(error).cause}")
    return ctypes.string_at(vector.data, vector.size)


def code_from_bytes(kind: Kind, engine: Engine, data: bytes) -> Pointer:
    """A module or component from its serialized form, which must come from `compile_code`."""
    functions = _KINDS[kind]
    pointer = functions.pointer()
    engine.check(functions.deserialize(engine.pointer, _bytes_pointer(data), len(data), byref(pointer)))
    return pointer


def code_from_file(kind: Kind, engine: Engine, descriptor: int) -> Pointer | None:
    """The same from an open file, mapped if possible, so that workers share its pages.

    None if the file does not fit this Wasmtime, configuration or machine: then compile.
    """
    functions = _KINDS[kind]
    pointer = functions.pointer()
    path = ctypes.create_string_buffer(f"/proc/self/fd/{descriptor}".encode())
    error = functions.deserialize_file(engine.pointer, path, byref(pointer))
    if not error:
        return pointer
    # Mapping code fails for a file that this user may not reopen, and on a file system mounted noexec.
    c.wasmtime_error_delete(error)
    data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    error = functions.deserialize(engine.pointer, _bytes_pointer(data), len(data), byref(pointer))
    if not error:
        return pointer
    c.wasmtime_error_delete(error)
    return None


def _bytes_pointer(data: bytes) -> Any:
    """A `uint8_t *` to the bytes themselves; the caller must keep `data` alive."""
    return ctypes.cast(c_char_p(data), POINTER(ctypes.c_uint8))


def chars(text: str) -> Any:
    """Text in the form of the C API's names: an array of char, passed with its length."""
    encoded = text.encode()
    return (ctypes.c_char * len(encoded)).from_buffer_copy(encoded)


def i32_function_type(parameters: int, results: int) -> Pointer:
    """A `wasm_functype_t` of i32 parameters and results."""
    vectors = []
    for count in (parameters, results):
        vector = c.wasm_valtype_vec_t()
        items = (POINTER(c.wasm_valtype_t) * count)(*(c.wasm_valtype_new(_I32) for _ in range(count)))
        c.wasm_valtype_vec_new(byref(vector), count, items)
        vectors.append(vector)
    return c.wasm_functype_new(byref(vectors[0]), byref(vectors[1]))


FAULT: Final = "internal fault of the worker in a host function"


def new_trap(message: str) -> int:
    """A `wasm_trap_t *` in the form of a number, to return from a host function."""
    encoded = message.encode("utf-8", "replace")
    trap = c.wasmtime_trap_new((ctypes.c_char * len(encoded)).from_buffer_copy(encoded), len(encoded))
    return ctypes.cast(trap, c_void_p).value or 0


def take_trap(trap: Pointer) -> Trouble:
    """Parses a `wasm_trap_t *` and deletes it."""
    message = c.wasm_byte_vec_t()
    c.wasm_trap_message(trap, byref(message))
    frames = c.wasm_frame_vec_t()
    c.wasm_trap_trace(trap, byref(frames))
    trouble = Trouble(*_causes(_take_text(message)), _backtrace(frames), None)
    c.wasm_trap_delete(trap)
    return trouble


def take_error(error: Pointer) -> Trouble:
    """Parses a `wasmtime_error_t *` and deletes it."""
    message = c.wasm_byte_vec_t()
    c.wasmtime_error_message(error, byref(message))
    frames = c.wasm_frame_vec_t()
    c.wasmtime_error_wasm_trace(error, byref(frames))
    status = ctypes.c_int(0)
    exited = c.wasmtime_error_exit_status(error, byref(status))
    # The frames point into the error, so delete it last.
    trouble = Trouble(*_causes(_take_text(message)), _backtrace(frames), status.value if exited else None)
    c.wasmtime_error_delete(error)
    return trouble


def _take_text(vector: Any) -> str:
    text = ctypes.string_at(vector.data, vector.size).decode("utf-8", "replace") if vector.size else ""
    c.wasm_byte_vec_delete(byref(vector))
    return text.rstrip("\0")


def _causes(message: str) -> tuple[str, list[str]]:
    """The innermost cause in a Wasmtime error message, and all causes in its order, outermost first."""
    outermost, _, rest = message.partition("\nCaused by:\n")
    causes = [outermost.strip()]
    for line in filter(None, map(str.strip, rest.splitlines())):
        number, colon, cause = line.partition(": ")
        if colon and number.isdigit():
            causes.append(cause)
        elif len(causes) == 1:
            causes.append(line)
        else:
            causes[-1] += f" {line}"
    return causes[-1], causes


def _backtrace(frames: Any) -> list[str]:
    """One line per frame, innermost first: function name or number, and its offset in the module."""
    lines = []
    for index in range(min(frames.size, MAX_BACKTRACE)):
        frame = frames.data[index]
        name = c.wasmtime_frame_func_name(frame)
        number = c.wasm_frame_func_index(frame)
        function = _text(name.contents) if name else f"function {number}"
        offset = c.wasm_frame_module_offset(frame)
        # Where the stack overflowed, there is no offset.
        lines.append(function if offset == _NO_OFFSET else f"{function} (offset {offset:#x})")
    if frames.size > MAX_BACKTRACE:
        lines.append("…")  # Wasmtime keeps 20 and does not say how many it left out
    c.wasm_frame_vec_delete(byref(frames))
    return lines


def _text(vector: Any) -> str:
    text = ctypes.string_at(vector.data, vector.size).decode("utf-8", "replace")
    return text if len(text) <= 200 else text[:200] + "…"
