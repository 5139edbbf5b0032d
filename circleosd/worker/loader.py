"""From a load request and its descriptors to a callable plugin in a confined process."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from circleosd.worker import inspect, limits
from circleosd.worker.channel import Channel
from circleosd.worker.failure import PluginFailure
from circleosd.worker.frames import COMPILED, MAX_PAYLOAD, Abi, Buffer, FrameError, Load, Ready
from circleosd.worker.host import Host
from circleosd.worker.sandbox import confine
from circleosd.worker.watch import SharedWatch, Watch

if TYPE_CHECKING:
    from circleosd.worker.engine import Engine, Kind, Pointer

THREAD_STACK: Final = 2 << 20


class Plugin(Protocol):
    """A loaded plugin of any ABI. `call` and `event` raise only `PluginFailure`."""

    functions: list[str]
    description: str | None

    def call(self, function: str, payload: Buffer) -> bytes | bytearray:
        """The reply to one call, UTF-8."""

    def event(self, topic: str, payload: Buffer) -> bytes | bytearray:
        """Delivers one event."""

    def prepare(self) -> None:
        """Does everything that can be done between two calls instead of during the next one."""


class Loaded(NamedTuple):
    """`watch` must be running whenever a method of `plugin` is."""

    plugin: Plugin
    watch: Watch
    ready: Ready


def load_plugin(load: Load, descriptors: list[int], channel: Channel, host: Host) -> Loaded:
    """Loads and confines. Raises `PluginFailure` if the plugin is refused."""
    wanted = 2 if load.precompiled else 1
    if len(descriptors) != wanted:
        raise FrameError(f"{len(descriptors)} descriptors came with the load request, not {wanted}")
    size = os.fstat(descriptors[0]).st_size
    if size == 0:
        raise PluginFailure("bad-request", "it is empty")
    with mmap.mmap(descriptors[0], size, access=mmap.ACCESS_READ) as data:
        if load.plugin_type == "native":
            inspect.inspect_native(data, load.limits.memory)
            return _load_native(load, descriptors[0], host)
        artifact = inspect.inspect(data, load.abi)
        return _load_wasm(load, artifact, data, descriptors[1:], channel, host)


def _load_wasm(
    load: Load, artifact: inspect.Artifact, data: mmap.mmap, precompiled: list[int], channel: Channel, host: Host
) -> Loaded:
    threads, concurrency = limits.bound_threads(), load.limits.concurrency
    kind: Kind = "component" if artifact.abi == "component" else "module"
    engine, code = _compiled(kind, load, data, precompiled, channel)
    plugin_class = _plugin_class(artifact.abi)
    stacks = concurrency + (0 if artifact.abi == "core" else 2 * threads)
    # A text that crosses a component's boundary may be as large as its memory, and Wasmtime copies it twice.
    memories = concurrency + 1 + (concurrency if artifact.abi == "component" else 0)
    # A command that reads and writes piece by piece may have less memory than its payload. The process holds the
    # payload as received and in its streams, like the reply, and the next call's before this one's are deleted.
    carried = concurrency * 3 * (MAX_PAYLOAD + load.limits.output)
    limits.share_one_heap()
    limits.bound_memory(load.limits.memory * memories + carried + stacks * THREAD_STACK)
    sandbox = confine()
    watch = _watch(load, engine.tick())
    limits.forbid_timers()
    watch.begin()
    try:
        plugin = plugin_class(engine, code, artifact, load, host)
        watch.extend()
        plugin.prepare()
    finally:
        watch.end()
    # Not earlier: Wasmtime writes a module's initial memory to a memfd for the first instance.
    limits.forbid_files()
    ready = Ready(artifact.abi, plugin.functions, artifact.imports, plugin.description, sandbox)
    return Loaded(plugin, watch, ready)


def _compiled(
    kind: Kind, load: Load, data: mmap.mmap, precompiled: list[int], channel: Channel
) -> tuple[Engine, Pointer]:
    """An engine and the code for it: the given compilation if it fits, else a new one, which the manager gets."""
    # Wasmtime takes 10 MB and 30 ms, which the worker of a native plugin can save.
    from circleosd.worker.engine import Engine, code_from_bytes, code_from_file

    engine = None
    if precompiled:
        engine = Engine(kind, load.limits, deterministic=load.deterministic)
        if (code := code_from_file(kind, engine, precompiled[0])) is not None:
            channel.send(COMPILED, 0, b"")
            return engine, code
    from circleosd.worker.compiler import compile_in_child

    compiled = compile_in_child(kind, data, deterministic=load.deterministic)
    channel.send(COMPILED, 0, compiled)
    engine = engine or Engine(kind, load.limits, deterministic=load.deterministic)
    return engine, code_from_bytes(kind, engine, compiled)


def _plugin_class(abi: Abi) -> Callable[[Any, Any, inspect.Artifact, Load, Host], Plugin]:
    if abi == "core":
        from circleosd.worker.core import CorePlugin

        return CorePlugin
    if abi == "component":
        from circleosd.worker.component import ComponentPlugin

        return ComponentPlugin
    from circleosd.worker.wasi import WasiPlugin

    return WasiPlugin


def _load_native(load: Load, artifact: int, host: Host) -> Loaded:
    from circleosd.worker.native import NativePlugin

    limits.share_one_heap()
    extra = load.limits.memory + load.limits.concurrency * THREAD_STACK
    limits.bound_memory(extra)
    limits.bound_mappings(extra)  # not for wasm: Wasmtime reserves gigabytes of address space
    limits.forbid_files()
    sandbox = confine(artifact)
    if "seccomp" not in sandbox and load.limits.concurrency == 1:
        limits.forbid_processes()
    watch = _watch(load, None)
    limits.forbid_timers()
    watch.begin()
    try:
        plugin = NativePlugin(artifact, load, host)
    finally:
        watch.end()
    return Loaded(plugin, watch, Ready("native", plugin.functions, [], plugin.description, sandbox))


def _watch(load: Load, tick: tuple[int, int] | None) -> Watch:
    return (SharedWatch if load.limits.concurrency > 1 else Watch)(load.limits.time, tick)
