"""The wasi ABI: a WASI preview 1 command, run once per call (ABI.md, «wasi»)."""

from __future__ import annotations

from contextlib import suppress
from ctypes import POINTER, byref
from typing import Any, Final

from wasmtime import _bindings as c

from circleosd.worker.engine import Engine, Pointer, Trouble, chars, delete_store, take_error, take_trap
from circleosd.worker.failure import PluginFailure, require_text
from circleosd.worker.frames import Buffer, Load
from circleosd.worker.host import Host
from circleosd.worker.inspect import Artifact
from circleosd.worker.wasihost import LineLog, Sink, Streams, exit_failure, explained, set_wasi

_START: Final = chars("_start")
_MEMORY: Final = chars("memory")
# Wasmtime does not pass on statuses that have another meaning for a shell.
_OTHER_STATUS: Final = "exit with invalid exit status"


class Collector:
    """Keeps up to `bound` bytes."""

    def __init__(self, bound: int) -> None:
        self.data = bytearray()
        self.overflowed = False
        self._bound = bound

    def write(self, data: bytes) -> bool:
        if len(self.data) + len(data) > self._bound:
            self.overflowed = True
            return False
        self.data += data
        return True


def _memory_size(context: Pointer, instance: Any) -> int:
    """The size in bytes of the memory of an existing instance."""
    item = c.wasmtime_extern_t()
    c.wasmtime_instance_export_get(context, byref(instance), _MEMORY, len(_MEMORY), byref(item))
    return int(c.wasmtime_memory_data_size(context, byref(item.of.memory)))


class WasiPlugin:
    """A loaded WASI command. Calls may come from several threads."""

    description: str | None = None

    def __init__(self, engine: Engine, module: Pointer, artifact: Artifact, load: Load, host: Host) -> None:
        self.functions = artifact.functions
        self._engine = engine
        self._load = load
        self._host = host
        self._spent: list[tuple[Pointer, Streams]] = []
        linker = c.wasmtime_linker_new(engine.pointer)
        engine.check(c.wasmtime_linker_define_wasi(linker))
        self._linked = POINTER(c.wasmtime_instance_pre_t)()
        error = c.wasmtime_linker_instantiate_pre(linker, module, byref(self._linked))
        if error:
            raise PluginFailure("bad-request", ": ".join(take_error(error).causes))
        self._run(b"", Collector(0), LineLog(host), start=False)

    def call(self, function: str, payload: Buffer) -> bytes:
        """One run of the command: its output. Raises `PluginFailure`."""
        if function not in self.functions:
            raise PluginFailure("not-found", f"has no function {function!r}: a wasi command has only handle")
        output, errors = Collector(self._load.limits.output), LineLog(self._host)
        trouble: PluginFailure | None = None
        try:
            self._run(bytes(payload), output, errors, start=True)
        except PluginFailure as exc:
            trouble = exc
        errors.flush()
        if output.overflowed:
            bound = self._load.limits.output
            raise PluginFailure("limit", f"wrote more than its limit for output of {bound} bytes") from trouble
        if trouble is not None:
            raise trouble
        reply = bytes(output.data)
        require_text(reply)
        return reply

    def event(self, topic: str, payload: Buffer) -> bytes:
        """A command takes no events."""
        raise PluginFailure("not-found", "takes no events: it is a wasi command")

    def prepare(self) -> None:
        """Deletes the remains of earlier calls."""
        with suppress(IndexError):  # another thread may take what this one found
            while self._spent:
                store, streams = self._spent.pop()
                delete_store(store)
                streams.close()

    def _run(self, stdin: bytes, output: Sink, errors: LineLog, *, start: bool) -> None:
        store, context = self._engine.new_store()
        streams = Streams(output, errors)
        try:
            set_wasi(self._engine, context, self._load.name, self._host.config, stdin, streams)
            self._engine.allow(context)
            self._enter(context, errors, start=start)
        finally:
            # Other threads delete the items of this list.
            self._spent.append((store, streams))

    def _enter(self, context: Pointer, errors: LineLog, *, start: bool) -> None:
        instance = c.wasmtime_instance_t()
        trap = POINTER(c.wasm_trap_t)()
        error = c.wasmtime_instance_pre_instantiate(self._linked, context, byref(instance), byref(trap))
        made = not error and not trap
        if made and start:
            item = c.wasmtime_extern_t()
            c.wasmtime_instance_export_get(context, byref(instance), _START, len(_START), byref(item))
            raw = (c.wasmtime_val_raw_t * 1)()
            error = c.wasmtime_func_call_unchecked(context, byref(item.of.func), raw, 0, byref(trap))
        if trap:
            found = self._engine.failure(take_trap(trap))
            errors.flush()
            size = _memory_size(context, instance) if made else 0
            raise self._engine.with_memory(explained(found, errors.last), size)
        if error:
            self._ended(take_error(error), errors)

    def _ended(self, trouble: Trouble, errors: LineLog) -> None:
        if trouble.exit_status == 0:
            return
        errors.flush()
        if trouble.exit_status is not None:
            raise exit_failure(trouble.exit_status, errors.last)
        if trouble.cause.startswith(_OTHER_STATUS):
            raise exit_failure("above 125", errors.last)
        raise explained(self._engine.failure(trouble), errors.last)
