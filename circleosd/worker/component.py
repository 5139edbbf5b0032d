"""The component ABI: the world `plugin` of wit/circleosd.wit (ABI.md, «component»)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, byref, c_void_p
from typing import Any, Final, TypeAlias

from wasmtime import _bindings as c

from circleosd.worker import values
from circleosd.worker.engine import FAULT, NO_FINALIZER, Engine, Pointer, chars, delete_store, take_error
from circleosd.worker.failure import PluginFailure, contained
from circleosd.worker.frames import LEVELS, MAX_DESCRIPTION, MAX_HOST_CALL, MAX_LOG, Buffer, Load
from circleosd.worker.host import CALLS, TOO_LONG, Answer, Host
from circleosd.worker.inspect import INTERFACE_VERSION, Artifact, require_few
from circleosd.worker.instances import Instances
from circleosd.worker.wasihost import LineLog, Streams, exit_failure, explained, set_wasi

_call = c._wasmtime_component_func_call
_val_delete = c._wasmtime_component_val_delete

_Body: TypeAlias = Callable[[Any, Any], None]

# The results of the calls in `CALLS` for a component, besides their errors.
_RESULTS: Final[dict[str, values.Lower]] = {
    "kv.get": values.optional_text,
    "kv.set": values.nothing,
    "kv.delete": values.boolean,
    "kv.keys": values.texts,
    "config.get": values.optional_text,
    "config.keys": values.texts,
    "clock.now": values.unsigned,
    "clock.monotonic": values.unsigned,
    "services.list": values.services,
    "services.status": values.service,
    "services.restart": values.nothing,
    "events.emit": values.nothing,
}
_TYPES: Final = {
    "describe": "func() -> string",
    "init": "func() -> result<_, string>",
    "on-event": "func(string, string) -> result<_, string>",
    "handle": "func(string) -> result<string, string>",
}


class _Instance:
    """One instance in its own store, and those of its functions that were looked up so far."""

    __slots__ = ("broken", "component", "context", "functions", "logs", "store", "streams")

    def __init__(self, store: Pointer, context: Pointer) -> None:
        self.store = store
        self.context = context
        self.component = c.wasmtime_component_instance_t()
        self.functions: dict[str, Any] = {}
        self.streams: Streams | None = None
        self.logs: tuple[LineLog, ...] = ()  # of standard output and standard error
        self.broken = False

    def delete(self) -> None:
        delete_store(self.store)
        if self.streams is not None:
            self.streams.close()


class ComponentPlugin:
    """A loaded component. Calls may come from several threads if its instances are fresh."""

    def __init__(self, engine: Engine, component: Pointer, artifact: Artifact, load: Load, host: Host) -> None:
        self._engine = engine
        self._component = component
        self._load = load
        self._host = host
        # None until the first instance shows their types; with another type, they come from a toolchain
        self._hooks: frozenset[str] | None = None
        self._candidates = artifact.hooks
        self._wasi = any(name.startswith("wasi:") for name in artifact.imports)
        self._instances = Instances(engine, self._new_instance, shared=load.instance == "shared")
        self._indices = {name: self._index(name) for name in (*artifact.functions, *artifact.hooks)}
        self._imports = _Imports(engine, host)
        self._linker = self._imports.link(artifact.imports, wasi=self._wasi)
        instance = self._new_instance()
        self.functions = self._callable(instance, artifact.functions)
        if "on-event" in self._candidates - (self._hooks or set()):  # unlike `init`, no toolchain has one of its own
            given = self._type(instance, "on-event")
            host.log(2, f"gets no events: it exports on-event as {given}, not as {_TYPES['on-event']}")
        self.description = self._describe(instance)
        self._instances.put_back(instance)

    def call(self, function: str, payload: Buffer) -> bytes:
        """One call: the reply, UTF-8. Raises `PluginFailure`."""
        if function not in self.functions:
            raise PluginFailure("not-found", f"has no function {function!r}: it has {', '.join(self.functions)}")
        return self._serve(function, [payload])

    def event(self, topic: str, payload: Buffer) -> bytes:
        """One event, for `on-event`."""
        if "on-event" not in (self._hooks or ()):
            raise PluginFailure("not-found", "takes no events: it exports no on-event")
        return self._serve("on-event", [topic.encode(), payload])

    def prepare(self) -> None:
        """Between two calls: deletes the used instance and makes that of the next call."""
        self._instances.prepare()

    def _serve(self, function: str, arguments: list[Buffer]) -> bytes:
        ok, reply = self._instances.serve(self._enter, function, arguments)
        if not ok:
            raise PluginFailure("plugin-failed", reply.decode() or "failed without a message", reported=True)
        return reply

    def _enter(self, instance: _Instance, function: str, arguments: list[Buffer]) -> tuple[bool, bytes]:
        """Calls a function that returns a result of texts; returns whether it is ok, and the text of either case."""
        result = self._invoke(instance, function, arguments)
        try:
            case = result.of.result
            if not case.val:
                return case.is_ok, b""
            size = values.size(case.val.contents)
            if case.is_ok and size > self._load.limits.output:
                bound = self._load.limits.output
                raise PluginFailure("limit", f"gave a reply of {size} bytes: its limit for output is {bound} bytes")
            return case.is_ok, values.text_bytes(case.val.contents)
        finally:
            _val_delete(byref(result))

    def _invoke(self, instance: _Instance, function: str, arguments: list[Buffer]) -> Any:
        found = instance.functions.get(function) or self._find(instance, function)
        for log in instance.logs:
            log.follow()
        given = (c.wasmtime_component_val_t * len(arguments))()
        held = [values.borrow_text(given[index], argument) for index, argument in enumerate(arguments)]
        result = c.wasmtime_component_val_t()
        error = _call(found, instance.context, given, len(held), byref(result), 1)  # including post-return
        for log in instance.logs:
            log.flush()
        if error:
            instance.broken = True
            raise self._failure(instance, error)
        return result

    def _failure(self, instance: _Instance, error: Pointer) -> PluginFailure:
        trouble = take_error(error)
        last_line = instance.logs[-1].last if instance.logs else ""
        if trouble.exit_status is not None:
            return exit_failure(trouble.exit_status, last_line)
        return explained(self._engine.failure(trouble), last_line)

    def _index(self, name: str) -> Pointer:
        index = c.wasmtime_component_get_export_index(self._component, None, chars(name), len(name.encode()))
        if not index:
            raise PluginFailure("bad-request", f"its export {name} cannot be found")
        return index

    def _find(self, instance: _Instance, name: str) -> Any:
        function = c.wasmtime_component_func_t()
        if not c.wasmtime_component_instance_get_func(
            byref(instance.component), instance.context, self._indices[name], byref(function)
        ):
            raise PluginFailure("bad-request", f"its export {name} is not a function")
        instance.functions[name] = found = byref(function)
        return found

    def _new_instance(self) -> _Instance:
        store, context = self._engine.new_store()
        instance = _Instance(store, context)
        try:
            if self._wasi:
                output, errors = instance.logs = LineLog(self._host), LineLog(self._host)
                instance.streams = Streams(output, errors)
                set_wasi(self._engine, context, self._load.name, self._host.config, b"", instance.streams)
            self._engine.allow(context)
            error = c.wasmtime_component_linker_instantiate(
                self._linker, context, self._component, byref(instance.component)
            )
            if error:
                raise self._failure(instance, error)
            if self._hooks is None:
                self._hooks = frozenset(name for name in self._candidates if self._is(instance, name, name))
            if "init" in self._hooks:
                ok, message = self._enter(instance, "init", [])
                if not ok:
                    raise PluginFailure("plugin-failed", f"its init failed: {message.decode()}", reported=True)
        except BaseException:
            instance.delete()
            raise
        return instance

    def _is(self, instance: _Instance, name: str, world: str) -> bool:
        """Whether an export has the type of `world` in the world."""
        return self._type(instance, name) == _TYPES[world]

    def _type(self, instance: _Instance, name: str) -> str:
        return values.function_type(self._find(instance, name), instance.context)

    def _callable(self, instance: _Instance, names: list[str]) -> list[str]:
        """The exports that can be invoked. Raises `PluginFailure` unless `handle` is one, or if there are too many."""
        found = [name for name in names if self._is(instance, name, "handle")]
        if "handle" not in found:
            given = self._type(instance, "handle")
            raise PluginFailure("bad-request", f"it exports handle as {given}, not as {_TYPES['handle']}")
        require_few(found)
        return found

    def _describe(self, instance: _Instance) -> str | None:
        if "describe" not in (self._hooks or ()):
            return None
        result = self._invoke(instance, "describe", [])
        try:
            return values.text_bytes(result, MAX_DESCRIPTION).decode("utf-8", "ignore")
        finally:
            _val_delete(byref(result))


class _Imports:
    """The interfaces that a component may import."""

    def __init__(self, engine: Engine, host: Host) -> None:
        self._engine = engine
        self._host = host
        self._callbacks: list[Any] = []

    def link(self, imports: list[str], *, wasi: bool) -> Pointer:
        """A `wasmtime_component_linker_t *` with the interfaces of these names, and with WASI if wanted."""
        linker = c.wasmtime_component_linker_new(self._engine.pointer)
        if wasi:
            self._engine.check(c.wasmtime_component_linker_add_wasip2(linker))
        root = c.wasmtime_component_linker_root(linker)
        for name in imports:
            interface = name.removeprefix("circleosd:plugin/").removesuffix(f"@{INTERFACE_VERSION}")
            if interface == "log":
                write = _failing("log.write", (values.ENUM, values.STRING), 0, self._log)
                self._define(root, name, {"write": write})
            elif interface != name:
                calls = [call for call in CALLS if call.startswith(f"{interface}.")]
                self._define(root, name, {call.partition(".")[2]: self._callback(call) for call in calls})
        c.wasmtime_component_linker_instance_delete(root)
        return linker

    def _callback(self, call: str) -> Callable[..., int]:
        kinds = (values.STRING,) * len(CALLS[call].arguments)
        return _failing(call, kinds, 1, self._host_call(call))

    def _define(self, root: Pointer, name: str, functions: dict[str, Callable[..., int]]) -> None:
        interface = POINTER(c.wasmtime_component_linker_instance_t)()
        added = c.wasmtime_component_linker_instance_add_instance(root, chars(name), len(name), byref(interface))
        self._engine.check(added)
        for function, body in functions.items():
            callback = c.wasmtime_component_func_callback_t(body)
            self._callbacks.append(callback)
            added = c.wasmtime_component_linker_instance_add_func(
                interface, chars(function), len(function), callback, None, NO_FINALIZER
            )
            self._engine.check(added)
        c.wasmtime_component_linker_instance_delete(interface)

    def _log(self, arguments: Any, _result: Any) -> None:
        level = values.enumeration(arguments[0])
        # Longer text is cut anyway; a character takes at most four bytes.
        text = values.text(arguments[1], 4 * MAX_LOG)
        self._host.log(LEVELS.index(level) if level in LEVELS else 3, text)

    def _host_call(self, call: str) -> _Body:
        names = CALLS[call].arguments
        lower = _RESULTS[call]

        def body(arguments: Any, result: Any) -> None:
            given = [arguments[index] for index in range(len(names))]
            if sum(map(values.size, given)) > MAX_HOST_CALL:
                answer: Answer = False, TOO_LONG
            else:
                answer = self._host.call(call, dict(zip(names, map(values.text, given), strict=True)))
            values.result(result[0], answer, lower)

        return body


def _failing(name: str, kinds: tuple[int, ...], results: int, body: _Body) -> Callable[..., int]:
    """A callback for Wasmtime. An exception of `body` becomes an error of the call.

    The C API accepts a host function for any type with which the component imports it, so the callback checks the
    values before it reads them; Wasmtime itself checks the type of a result.
    """
    message = f"imports {name} with a type other than in circleosd.wit".encode()

    def callback(
        _data: Any, _context: Any, _type: Any, arguments: Any, count: int, result: Any, result_count: int
    ) -> int:
        if (tuple(arguments[index].kind for index in range(count)), result_count) != (kinds, results):
            return _new_error(message)
        body(arguments, result)
        return 0

    return contained(callback, lambda: _new_error(FAULT.encode()))


def _new_error(message: bytes) -> int:
    return ctypes.cast(c.wasmtime_error_new(message), c_void_p).value or 0
