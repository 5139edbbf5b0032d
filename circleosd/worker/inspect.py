"""What an artifact is, found by reading its bytes; nothing in it is run, and Wasmtime is not needed.

Follows the binary formats of WebAssembly 2.0 (core) and of the component model's Binary.md (import and
export sections; the rest is skipped). Compilation validates what is only skimmed here.
"""

from __future__ import annotations

import mmap
import platform
from typing import Final, NamedTuple, NoReturn, TypeAlias

from circleosd.worker.failure import PluginFailure
from circleosd.worker.frames import MAX_FUNCTIONS, MAX_NAME, Abi

Data: TypeAlias = bytes | bytearray | mmap.mmap

CORE_ABI_VERSION: Final = 1
CORE_IMPORTS: Final = {
    "log": ((0x7F, 0x7F, 0x7F), ()),
    "host_call": ((0x7F, 0x7F), (0x7F,)),
    "host_answer": ((0x7F, 0x7F), (0x7F,)),
}
INTERFACES: Final = ("log", "kv", "config", "clock", "services", "events")
INTERFACE_VERSION: Final = "0.1.0"
HOOKS: Final = frozenset({"describe", "init", "on-event"})
# wasi:http would be a way out to the network; nothing else of WASI 0.2 is left out.
WASI_PACKAGES: Final = ("wasi:cli/", "wasi:clocks/", "wasi:filesystem/", "wasi:io/", "wasi:random/", "wasi:sockets/")

# A million entries, which Wasmtime would take, are a second of reading here; compiled
# languages stay below a tenth of this.
MAX_ENTRIES: Final = 200_000

_I32: Final = 0x7F
_I64: Final = 0x7E
_HANDLER: Final = ((_I32,), (_I64,))
_FUNC, _TABLE, _MEMORY, _GLOBAL, _TAG = range(5)

_Type: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


class Artifact(NamedTuple):
    """`functions`: what can be invoked, for a component before its types are looked at.

    `hooks`: which of `_initialize`, `describe`, `init` and `on-event` it exports.
    """

    abi: Abi
    functions: list[str]
    imports: list[str]
    hooks: frozenset[str] = frozenset()


def inspect(data: Data, abi: Abi | None = None) -> Artifact:
    """Which of the three wasm ABIs `data` has. `abi` is what it claims, if anything.

    Raises `PluginFailure` (`bad-request`) with the reason when it has none, or not that one.
    """
    artifact = _inspect(data)
    if abi is not None and abi != artifact.abi:
        _refuse(f"is of the ABI {artifact.abi}, not {abi} as its manifest says")
    if len(artifact.functions) > MAX_FUNCTIONS:
        _refuse(f"has {len(artifact.functions)} functions to call: at most {MAX_FUNCTIONS} are allowed")
    return artifact._replace(imports=list(dict.fromkeys(artifact.imports)))


def inspect_native(data: Data) -> None:
    """Raises `PluginFailure` (`bad-request`) unless `data` is a shared object for this machine."""
    if data[:4] != b"\x7fELF":
        _refuse("is no ELF shared object")
    if len(data) < 64:
        _refuse("is truncated: its ELF header is incomplete")
    if data[4] != 2 or data[5] != 1:
        _refuse("is no 64-bit little-endian ELF file")
    if int.from_bytes(data[16:18], "little") != 3:
        _refuse("is an ELF file, but no shared object: link it with -shared")
    machine = int.from_bytes(data[18:20], "little")
    wanted = {"x86_64": 62, "aarch64": 183}.get(platform.machine())
    if wanted is not None and machine != wanted:
        _refuse(f"is for another machine (ELF machine {machine}), not for {platform.machine()}")


def _refuse(reason: str) -> NoReturn:
    raise PluginFailure("bad-request", f"it {reason}")


def _inspect(data: Data) -> Artifact:
    head = data[:8]
    if head[:4] != b"\0asm":
        _refuse("is not WebAssembly")
    if len(head) < 8:
        _refuse("is truncated: it ends within its first 8 bytes")
    version, layer = int.from_bytes(head[4:6], "little"), int.from_bytes(head[6:8], "little")
    try:
        if layer == 1:
            return _component(data)
        if (version, layer) != (1, 0):
            _refuse(f"has the WebAssembly version {version}, layer {layer}, which this host does not know")
        return _module(data)
    except IndexError:
        _refuse("is truncated or damaged: a section ends too early")


class _Reader:
    """Reads one section. Running over its end raises IndexError, which means damage."""

    __slots__ = ("data", "end", "position")

    def __init__(self, data: Data, position: int, end: int) -> None:
        self.data = data
        self.position = position
        self.end = end

    def byte(self) -> int:
        position = self.position
        if position >= self.end:
            raise IndexError
        self.position = position + 1
        return self.data[position]

    def leb(self) -> int:
        """An unsigned LEB128 number of at most 32 bits."""
        result = shift = 0
        while True:
            byte = self.byte()
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                if result >> 32:
                    raise IndexError
                return result
            shift += 7
            if shift > 28:
                raise IndexError

    def skip_leb(self) -> None:
        for _ in range(10):
            if self.byte() < 0x80:
                return
        raise IndexError

    def skip(self, count: int) -> None:
        self.position += count
        if self.position > self.end:
            raise IndexError

    def count(self, what: str) -> int:
        count = self.leb()
        if count > MAX_ENTRIES:
            _refuse(f"has {count} {what}: at most {MAX_ENTRIES} are allowed")
        return count

    def name(self) -> str:
        length = self.leb()
        start = self.position
        self.skip(length)
        try:
            return self.data[start : self.position].decode()
        except UnicodeDecodeError:
            _refuse("is damaged: a name in it is not UTF-8")

    def valtype(self) -> int:
        byte = self.byte()
        if byte in (0x63, 0x64):
            self.skip_leb()
        return byte

    def limits(self) -> None:
        flags = self.byte()
        self.skip_leb()
        if flags & 1:
            self.skip_leb()
        if flags & 8:
            self.skip_leb()


def _sections(data: Data) -> list[tuple[int, _Reader]]:
    whole = _Reader(data, 8, len(data))
    sections: list[tuple[int, _Reader]] = []
    while whole.position < whole.end:
        if len(sections) >= MAX_ENTRIES:
            _refuse(f"has more than {MAX_ENTRIES} sections")
        kind = whole.byte()
        size = whole.leb()
        start = whole.position
        whole.skip(size)
        sections.append((kind, _Reader(data, start, start + size)))
    return sections


class _Module:
    """The parts of a core module that tell what it is."""

    def __init__(self) -> None:
        self.types: list[_Type] = []
        self.imports: list[tuple[str, str, int, int]] = []
        self.functions: list[int] = []
        self.globals: list[tuple[int, bool, int | None]] = []
        self.imported_globals = 0
        self.memories = 0
        self.exports: dict[str, tuple[int, int]] = {}

    def function_type(self, index: int) -> _Type | None:
        """The type of a function by its index, or None when the index is wrong."""
        return self.types[self.functions[index]] if index < len(self.functions) else None

    def exported(self, name: str, kind: int) -> int | None:
        """The index of an export, or None when there is none of that name and kind."""
        found = self.exports.get(name)
        return found[1] if found and found[0] == kind else None


def _module(data: Data) -> Artifact:
    module = _Module()
    for kind, section in _sections(data):
        if kind == 1:
            _types(module, section)
        elif kind == 2:
            _imports(module, section)
        elif kind == 3:
            module.functions += [section.leb() for _ in range(section.count("functions"))]
        elif kind == 5:
            module.memories += section.count("memories")
        elif kind == 6:
            _globals(module, section)
        elif kind == 7:
            _exports(module, section)
        elif kind > 13:
            _refuse(f"is damaged: it has a section of the unknown kind {kind}")
    if "circleosd_abi" in module.exports:
        return _core(module)
    if "_start" in module.exports:
        return _wasi(module)
    names = ", ".join(list(module.exports)[:8])
    _refuse(
        "exports neither circleosd_abi (a core plugin) nor _start (a wasi command); "
        + (f"it exports {names}" if names else "it exports nothing")
    )


def _types(module: _Module, section: _Reader) -> None:
    for _ in range(section.count("types")):
        form = section.byte()
        if form != 0x60:
            _refuse(f"has a type of the form {form:#x} (GC or stack switching), which this host does not run")
        parameters = tuple(section.valtype() for _ in range(section.count("parameters")))
        module.types.append((parameters, tuple(section.valtype() for _ in range(section.count("results")))))


def _imports(module: _Module, section: _Reader) -> None:
    for _ in range(section.count("imports")):
        source, name, kind = section.name(), section.name(), section.byte()
        index = 0
        if kind == _FUNC:
            index = section.leb()
            module.functions.append(index)
        elif kind == _TABLE:
            section.valtype()
            section.limits()
        elif kind == _MEMORY:
            section.limits()
            module.memories += 1
        elif kind == _GLOBAL:
            section.valtype()
            section.byte()
            module.globals.append((0, True, None))
        elif kind == _TAG:
            section.byte()
            section.leb()
        else:
            _refuse(f"is damaged: the import {source}.{name} is of the unknown kind {kind}")
        module.imports.append((source, name, kind, index))


def _globals(module: _Module, section: _Reader) -> None:
    for _ in range(section.count("globals")):
        valtype = section.valtype()
        mutable = section.byte() != 0
        module.globals.append((valtype, mutable, _constant(section)))


def _constant(section: _Reader) -> int | None:
    """Reads one constant expression; its value if it is a single i32.const, else None."""
    value: int | None = None
    operations = 0
    while True:
        opcode = section.byte()
        if opcode == 0x0B:
            return value if operations == 1 else None
        operations += 1
        value = None
        if opcode == 0x41:
            start = section.position
            section.skip_leb()
            value = _signed(section.data[start : section.position])
        elif opcode in (0x42, 0x23, 0xD2, 0xD0):
            section.skip_leb()
        elif opcode == 0x43:
            section.skip(4)
        elif opcode == 0x44:
            section.skip(8)
        elif opcode == 0xFD:
            section.skip_leb()
            section.skip(16)
        elif opcode not in (0x6A, 0x6B, 0x6C, 0x7C, 0x7D, 0x7E):
            raise IndexError


def _signed(data: bytes | bytearray) -> int:
    value = sum((byte & 0x7F) << 7 * index for index, byte in enumerate(data))
    bits = 7 * len(data)
    return value - (1 << bits) if value >> (bits - 1) else value


def _exports(module: _Module, section: _Reader) -> None:
    for _ in range(section.count("exports")):
        name, kind, index = section.name(), section.byte(), section.leb()
        module.exports[name] = (kind, index)


def _core(module: _Module) -> Artifact:
    index = module.exported("circleosd_abi", _GLOBAL)
    if index is None or index >= len(module.globals):
        _refuse("exports circleosd_abi, but not as a global")
    valtype, mutable, value = module.globals[index]
    if valtype != _I32 or mutable or value is None:
        _refuse("exports circleosd_abi, but not as a constant i32 global")
    if value != CORE_ABI_VERSION:
        _refuse(f"has version {value} of the core ABI: this host has version {CORE_ABI_VERSION}")
    if module.exported("memory", _MEMORY) is None:
        _refuse("exports no memory")
    if module.memories > 1:
        _refuse(f"has {module.memories} memories: a core plugin has one")
    buffer = module.exported("circleosd_buffer", _FUNC)
    if buffer is None:
        _refuse("exports no function circleosd_buffer")
    if module.function_type(buffer) != ((_I32,), (_I32,)):
        _refuse("exports circleosd_buffer with another type than (i32) -> i32")
    initialize = module.exported("_initialize", _FUNC)
    if initialize is not None and module.function_type(initialize) != ((), ()):
        _refuse("exports _initialize with another type than () -> ()")
    for source, name, kind, type_index in module.imports:
        wanted = CORE_IMPORTS.get(name) if source == "circleosd" and kind == _FUNC else None
        if wanted is None:
            _refuse(f"imports {_shown(source)}.{_shown(name)}, which this host does not have")
        if module.types[type_index] != wanted:
            _refuse(f"imports circleosd.{name} with another type than ABI.md gives it")
    functions = [
        name
        for name, (kind, index) in module.exports.items()
        if kind == _FUNC and module.function_type(index) == _HANDLER and 0 < len(name.encode()) <= MAX_NAME
    ]
    if not functions:
        _refuse("exports no handler: no function of the type (i32) -> i64")
    imports = [f"circleosd.{name}" for _, name, _, _ in module.imports]
    return Artifact("core", functions, imports, frozenset({"_initialize"} if initialize is not None else ()))


def _wasi(module: _Module) -> Artifact:
    start = module.exported("_start", _FUNC)
    if start is None or module.function_type(start) != ((), ()):
        _refuse("exports _start, but not as a function of the type () -> ()")
    if module.exported("memory", _MEMORY) is None:
        _refuse("exports no memory")
    if module.memories > 1:
        _refuse(f"has {module.memories} memories: a wasi command has one")
    for source, name, kind, _ in module.imports:
        if source != "wasi_snapshot_preview1" or kind != _FUNC:
            _refuse(f"imports {_shown(source)}.{_shown(name)}, which this host does not have")
    return Artifact("wasi", ["handle"], [f"{source}.{name}" for source, name, _, _ in module.imports])


def _component(data: Data) -> Artifact:
    imports: list[str] = []
    functions: list[str] = []
    exports: list[str] = []
    for kind, section in _sections(data):
        if kind == 10:
            for _ in range(section.count("imports")):
                imports.append(_component_name(section))
                _extern_type(section)
        elif kind == 11:
            for _ in range(section.count("exports")):
                name = _component_name(section)
                sort = section.byte()
                if sort == 0:
                    section.byte()
                section.leb()
                if section.byte() == 1:
                    _extern_type(section)
                exports.append(name)
                if sort == 1 and len(name.encode()) <= MAX_NAME:
                    functions.append(name)
    for name in imports:
        _allowed_interface(name)
    if "handle" not in functions:
        others = ", ".join(exports[:8])
        _refuse("is a component but exports no function handle" + (f"; it exports {others}" if others else ""))
    hooks = HOOKS.intersection(functions)
    return Artifact("component", [name for name in functions if name not in hooks], imports, hooks)


def _component_name(section: _Reader) -> str:
    if section.byte() > 1:
        _refuse("is a component of a newer format: its names cannot be read")
    return section.name()


def _extern_type(section: _Reader) -> None:
    kind = section.byte()
    if kind == 0:
        section.byte()
        section.leb()
    elif kind in (1, 4, 5):
        section.leb()
    elif kind == 3:
        if section.byte() == 0:
            section.leb()
    else:
        _refuse(f"is a component of a newer format: it imports or exports something of kind {kind}")


def _allowed_interface(name: str) -> None:
    if name.startswith(WASI_PACKAGES):
        return
    package, _, rest = name.partition("/")
    interface, _, version = rest.partition("@")
    if package != "circleosd:plugin" or interface not in INTERFACES:
        _refuse(f"imports {_shown(name)}, which this host does not have")
    if version != INTERFACE_VERSION:
        _refuse(f"imports {_shown(name)}: this host has version {INTERFACE_VERSION} of that interface")


def _shown(name: str) -> str:
    return name if len(name) <= 80 and name.isprintable() else repr(name[:80])
