"""The wasi ABI: a WASI preview 1 command, run once per call (ABI.md, «wasi»); and WASI for components.

Neither has files, directories, sockets or an environment other than the plugin's configuration: what is not configured
in `wasi_config_t` does not exist.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import re
from contextlib import suppress
from ctypes import POINTER, byref, c_char_p, c_size_t, c_ssize_t, c_void_p, string_at
from typing import Any, Final, Protocol

from wasmtime import _bindings as c

from circleosd.worker.engine import NO_FINALIZER, Engine, Pointer, Trouble, chars, delete_store, take_error, take_trap
from circleosd.worker.failure import PluginFailure, contained, require_text
from circleosd.worker.frames import MAX_LOG, Buffer, Load
from circleosd.worker.host import Host
from circleosd.worker.inspect import Artifact

_START: Final = chars("_start")
_MEMORY: Final = chars("memory")
_INFO: Final = 1
# Wasmtime does not pass on statuses that have another meaning for a shell.
_OTHER_STATUS: Final = "exit with invalid exit status"

# What runtimes print after the reason why they end the program: Rust, Zig, Go, Python and SpiderMonkey.
_AFTERWORD: Final = re.compile(
    r"note: |\s+(left|right): |Cannot print stack trace: "
    r"|goroutine \d+ .*\]:$|\[signal .*\]$|runtime stack:$|\.\.\..* frames elided"
    r"|thread '.*panicked at \S+:$|Python function threw an unexpected exception$|lost sys\.stderr$"
    r"|Redirecting call to abort|Stack:$|\s+[^\s@]*@\S+$"
)
# A frame of a stack trace of Go, whose function is on the line before.
_FRAME: Final = re.compile(r"\t.+:\d+( \+0x.*)?$")


class Sink(Protocol):
    """Receives a stream of a WASI program. `write` returns whether it accepted the bytes."""

    def write(self, data: bytes) -> bool: ...


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


class LineLog:
    """Logs each line for the call of the thread that created this, and remembers the last one that may be a reason."""

    def __init__(self, host: Host) -> None:
        self._host = host
        # Wasmtime writes from its own threads.
        self._call = host.current
        self._rest = b""
        self.last = ""
        self._before = ""

    def write(self, data: bytes) -> bool:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._log(line)
        if len(self._rest) >= MAX_LOG:
            self.flush()
        return True

    def follow(self) -> None:
        """From now on, lines belong to this thread's current call, which has none yet."""
        self._call = self._host.current
        self.last = self._before = ""

    def flush(self) -> None:
        """Logs a last line without a newline."""
        line, self._rest = self._rest, b""
        self._log(line)

    def _log(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip()
        if text:
            self._remember(text)
            self._host.log(_INFO, text, self._call)

    def _remember(self, text: str) -> None:
        if _FRAME.match(text):
            self.last = self._before
        elif not _AFTERWORD.match(text):
            self._before, self.last = self.last, text.strip()[:200]


_sinks: Final[dict[int, Sink]] = {}
_numbers: Final = itertools.count(1)


def _take(number: int, data: Any, size: int) -> int:
    return size if _sinks[number].write(string_at(data, size)) else -errno.EFBIG


_write: Final = ctypes.CFUNCTYPE(c_ssize_t, c_void_p, POINTER(ctypes.c_ubyte), c_size_t)(
    contained(_take, lambda: -errno.EIO)
)


class Streams:
    """The two outputs of one program, known to the C API by number."""

    def __init__(self, output: Sink, errors: Sink) -> None:
        self.output = next(_numbers)
        self.errors = next(_numbers)
        _sinks[self.output] = output
        _sinks[self.errors] = errors

    def close(self) -> None:
        """Call this after the store that uses them is deleted."""
        del _sinks[self.output], _sinks[self.errors]


def set_wasi(
    engine: Engine, context: Pointer, name: str, environment: dict[str, str], stdin: bytes, streams: Streams
) -> None:
    """Gives a store its WASI: arguments, environment, stdin, two outputs, and nothing else."""
    config = c.wasi_config_new()
    c.wasi_config_set_argv(config, 1, _strings([name]))
    c.wasi_config_set_env(config, len(environment), _strings(environment), _strings(environment.values()))
    vector = c.wasm_byte_vec_t()
    c.wasm_byte_vec_new(byref(vector), len(stdin), ctypes.cast(c_char_p(stdin), POINTER(ctypes.c_ubyte)))
    c.wasi_config_set_stdin_bytes(config, byref(vector))
    c.wasi_config_set_stdout_custom(config, _write, streams.output, NO_FINALIZER)
    c.wasi_config_set_stderr_custom(config, _write, streams.errors, NO_FINALIZER)
    engine.check(c.wasmtime_context_set_wasi(context, config))


def _strings(texts: Any) -> Any:
    items = [text.encode() for text in texts]
    return ctypes.cast((c_char_p * len(items))(*items), POINTER(POINTER(ctypes.c_char)))


def exit_failure(status: int | str, last_line: str) -> PluginFailure:
    """The failure of a program that exited with a status other than 0."""
    said = f": {last_line}" if last_line else ""
    return PluginFailure("plugin-failed", f"exited with status {status}{said}", reported=True)


def explained(found: PluginFailure, last_line: str) -> PluginFailure:
    """The failure of a program that was stopped; for a trap, with the reason that its runtime may have printed."""
    if found.code != "plugin-failed" or not last_line:
        return found
    return PluginFailure("plugin-failed", f"{found.message}: {last_line}", found.backtrace)


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
