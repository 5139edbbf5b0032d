"""What an artifact is, found by reading its bytes; nothing in it is run, and Wasmtime is not needed.

Of a component, its import and export sections are read, as the component model's Binary.md has them; the rest is
skipped. Compilation validates what is only skimmed here.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple, NoReturn

from circleosd.worker.binary import FUNC, GLOBAL, I32, I64, MEMORY, Data, Module, Reader, read_module, refuse, sections
from circleosd.worker.failure import PluginFailure
from circleosd.worker.frames import MAX_FUNCTIONS, MAX_ITEM, MAX_ITEMS, MAX_NAME, Abi
from circleosd.worker.host import CALLS

CORE_ABI_VERSION: Final = 1
VARIABLES: Final = 16  # from this value on, an exported global is the address of a variable
CORE_IMPORTS: Final = {
    "log": ((I32, I32, I32), ()),
    "host_call": ((I32, I32), (I32,)),
    "host_answer": ((I32, I32), (I32,)),
}
INTERFACES: Final = ("log", *dict.fromkeys(call.partition(".")[0] for call in CALLS))
INTERFACE_VERSION: Final = "0.1.0"
HOOKS: Final = frozenset({"describe", "init", "on-event"})
# wasi:http would be a way out to the network; nothing else of WASI 0.2 is left out.
WASI_VERSION: Final = "0.2."
WASI_PACKAGES: Final = ("wasi:cli/", "wasi:clocks/", "wasi:filesystem/", "wasi:io/", "wasi:random/", "wasi:sockets/")

_WASI: Final = "wasi_snapshot_preview1"
_HANDLER: Final = ((I32,), (I64,))
_MACHINES: Final = {62: "x86_64", 183: "aarch64"}  # e_machine, elf(5)
_SEGMENT: Final = struct.Struct("<IIQQQQQ8x")  # Elf64_Phdr: p_type, flags, offset, addresses, filesz, memsz; elf(5)
_PT_LOAD: Final = 1
_PF_W: Final = 2


class Artifact(NamedTuple):
    """`functions`: what can be invoked, for a component before its types are looked at.

    `hooks`: which of `_initialize`, `on_event`, `describe`, `init` and `on-event` it exports, of whatever type.
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
        refuse(f"is of the ABI {artifact.abi}, not {abi} as its manifest says")
    if artifact.abi != "component":
        require_few(artifact.functions)
    imports = list(dict.fromkeys(artifact.imports))
    if len(imports) > MAX_ITEMS:
        refuse(f"has {len(imports)} imports: at most {MAX_ITEMS} are allowed")
    if long := next((name for name in imports if len(name.encode()) > MAX_ITEM), None):
        refuse(f"imports {_shown(long)}, and the name of an import has at most {MAX_ITEM} bytes")
    return artifact._replace(imports=imports)


def require_few(functions: list[str]) -> None:
    """Raises `PluginFailure` (`bad-request`) for more functions to call than a plugin may have."""
    if len(functions) > MAX_FUNCTIONS:
        refuse(f"has {len(functions)} functions to call: at most {MAX_FUNCTIONS} are allowed")


def inspect_native(data: Data, memory: int) -> None:
    """Raises `PluginFailure` (`bad-request`) unless `data` is a shared object for this machine, and `limit` if its
    variables take more than `memory` bytes: the kernel does not count those that dlopen(3) maps over its reservation.
    """
    if data[:4] != b"\x7fELF":
        refuse("is not an ELF shared object")
    if len(data) < 64:
        refuse("is truncated: its ELF header is incomplete")
    if data[4] != 2 or data[5] != 1:
        refuse("is not a 64-bit little-endian ELF file")
    if int.from_bytes(data[16:18], "little") != 3:
        refuse("is an ELF file, but not a shared object: link it with -shared")
    number, here = int.from_bytes(data[18:20], "little"), os.uname().machine
    machine = _MACHINES.get(number, f"another machine (ELF machine {number})")
    if here in _MACHINES.values() and machine != here:
        refuse(f"is for {machine}, not for {here}")
    # Otherwise the worker would end by SIGBUS: dlopen(3) maps what is not there.
    table, entries = int.from_bytes(data[32:40], "little"), int.from_bytes(data[56:58], "little")
    variables = 0
    for header in range(table, table + entries * _SEGMENT.size, _SEGMENT.size):
        if header + _SEGMENT.size > len(data):
            refuse("is truncated: its ELF program headers are incomplete")
        kind, flags, offset, _, _, size, mapped = _SEGMENT.unpack_from(data, header)
        if kind == _PT_LOAD and offset + size > len(data):
            refuse("is truncated: a segment of it ends after the file does")
        if kind == _PT_LOAD and flags & _PF_W:
            variables += mapped
    if variables > memory:
        raise PluginFailure("limit", f"its variables take {variables} bytes: its limit for memory is {memory} bytes")


def _inspect(data: Data) -> Artifact:
    head = data[:8]
    if head[:4] != b"\0asm":
        refuse("is not WebAssembly")
    if len(head) < 8:
        refuse("is truncated: it ends within its first 8 bytes")
    version, layer = int.from_bytes(head[4:6], "little"), int.from_bytes(head[6:8], "little")
    try:
        if layer == 1:
            return _component(data)
        if (version, layer) != (1, 0):
            refuse(f"has the WebAssembly version {version}, layer {layer}, which this host does not support")
        return _module(data)
    except IndexError:
        refuse("is truncated or damaged: a section ends too early")


def _module(data: Data) -> Artifact:
    module = read_module(data)
    if "circleosd_abi" not in module.exports and "_start" not in module.exports:
        _refuse_foreign(module, data)
    return _core(module) if "circleosd_abi" in module.exports else _wasi(module)


def _refuse_foreign(module: Module, data: Data) -> NoReturn:
    sources = dict.fromkeys(item.source for item in module.imports)
    if any(kind == 0 and section.name() == "linking" for kind, section in sections(data)):
        step = ": an object file is not a plugin, link it"
    elif "cabi_realloc" in module.exports or any(source.startswith("circleosd:plugin/") for source in sources):
        step = ": the core of a component is not a plugin, make the component with wasm-tools component new"
    elif _WASI in sources:
        step = ": a WASI library (reactor) is not a plugin, build a command instead"
    else:
        step = ""
    # No semicolon in this: behind one, circlectl takes the next step to be named.
    refuse(
        "exports neither circleosd_abi (a core plugin) nor _start (a wasi command), "
        f"but exports {_few(module.exports)}, and imports {f'from {_few(sources)}' if sources else 'nothing'}{step}"
    )


def _core(module: Module) -> Artifact:
    index = module.exported("circleosd_abi", GLOBAL)
    if index is None or index >= len(module.globals):
        refuse("exports circleosd_abi, but not as a global")
    valtype, mutable, value = module.globals[index]
    if valtype != I32 or mutable or value is None:
        refuse("exports circleosd_abi, but not as a constant i32 global")
    version = value if value in range(VARIABLES) else module.word(value)
    if version != CORE_ABI_VERSION:
        refuse(f"has version {version} of the core ABI: this host has version {CORE_ABI_VERSION}")
    for source, name, kind, type_index in module.imports:
        wanted = CORE_IMPORTS.get(name) if source == "circleosd" and kind == FUNC else None
        if wanted is None:
            _refuse_import("core plugin", "circleosd", source, name)
        if module.types[type_index] != wanted:
            refuse(f"imports circleosd.{name} with a type other than in ABI.md")
    if module.exported("memory", MEMORY) is None:
        refuse("exports no memory")
    if module.memories > 1:
        refuse(f"has {module.memories} memories: a core plugin has one")
    buffer = module.exported("circleosd_buffer", FUNC)
    if buffer is None:
        refuse("exports no function circleosd_buffer")
    if module.function_type(buffer) != ((I32,), (I32,)):
        refuse("exports circleosd_buffer with a type other than (i32) -> i32")
    initialize = module.exported("_initialize", FUNC)
    if initialize is not None and module.function_type(initialize) != ((), ()):
        refuse("exports _initialize with a type other than () -> ()")
    functions = [
        name
        for name, (kind, index) in module.exports.items()
        if kind == FUNC and module.function_type(index) == _HANDLER and 0 < len(name.encode()) <= MAX_NAME
    ]
    if not functions:
        refuse("exports no handler: no function of the type (i32) -> i64")
    imports = [f"circleosd.{item.name}" for item in module.imports]
    hooks = frozenset(name for name in ("_initialize", "on_event") if module.exported(name, FUNC) is not None)
    return Artifact("core", functions, imports, hooks)


def _wasi(module: Module) -> Artifact:
    start = module.exported("_start", FUNC)
    if start is None or module.function_type(start) != ((), ()):
        refuse("exports _start, but not as a function of the type () -> ()")
    for source, name, kind, _ in module.imports:
        if source != _WASI or kind != FUNC:
            _refuse_import("wasi command", _WASI, source, name)
    if module.exported("memory", MEMORY) is None:
        refuse("exports no memory")
    if module.memories > 1:
        refuse(f"has {module.memories} memories: a wasi command has one")
    return Artifact("wasi", ["handle"], [f"{item.source}.{item.name}" for item in module.imports])


def _refuse_import(what: str, only: str, source: str, name: str) -> NoReturn:
    why = ", which this host does not have" if source == only else f": a {what} may import only from {only}"
    refuse(f"imports {_shown(source)}.{_shown(name)}{why}")


def _component(data: Data) -> Artifact:
    imports: list[str] = []
    exports: dict[str, int] = {}
    for kind, section in sections(data):
        if kind == 10:
            imports += _component_imports(section)
        elif kind == 11:
            exports |= _component_exports(section)
    functions = [name for name, sort in exports.items() if sort == 1 and len(name.encode()) <= MAX_NAME]
    command = "handle" not in functions and any(name.startswith("wasi:cli/run@") for name in exports)
    for name in imports:
        # A command is refused below, whatever version of WASI it is for.
        if not command or not name.startswith(WASI_PACKAGES):
            _allowed_interface(name)
    if command:
        refuse(
            "is a command of WASI 0.2 or later, and exports no function handle: "
            "build it for WASI preview 1 (wasm32-wasip1)"
        )
    if "handle" in exports and "handle" not in functions:
        refuse("is a component that exports handle, but not as a function")
    if "handle" not in functions:
        refuse("is a component but exports no function handle" + (f", only {_few(exports)}" if exports else ""))
    hooks = HOOKS.intersection(functions)
    return Artifact("component", [name for name in functions if name not in hooks], imports, hooks)


def _component_imports(section: Reader) -> Iterator[str]:
    """The names of imports, except those of types that are only named, which require nothing of the host."""
    for _ in range(section.count("imports")):
        name = _component_name(section)
        if not _extern_type(section):
            yield name


def _component_exports(section: Reader) -> Iterator[tuple[str, int]]:
    """The names of exports, and their sorts; 1 is a function."""
    for _ in range(section.count("exports")):
        name, sort = _component_name(section), section.byte()
        if sort == 0:
            section.byte()
        section.leb()
        if section.byte() == 1:
            _extern_type(section)
        yield name, sort


def _component_name(section: Reader) -> str:
    if section.byte() > 1:
        refuse("is a component of a newer format: its names cannot be read")
    return section.name()


def _extern_type(section: Reader) -> bool:
    """Skip a type; return whether it is only a name for one."""
    kind = section.byte()
    if kind == 0:
        section.byte()
        section.leb()
    elif kind in (1, 4, 5):
        section.leb()
    elif kind == 3:
        if section.byte() == 0:
            section.leb()
            return True
    else:
        refuse(f"is a component of a newer format: it imports or exports something of kind {kind}")
    return False


def _allowed_interface(name: str) -> None:
    if name.startswith(WASI_PACKAGES):
        if not name.partition("@")[2].startswith(WASI_VERSION):
            refuse(f"imports {_shown(name)}: this host has version {WASI_VERSION}x of WASI")
        return
    package, _, rest = name.partition("/")
    interface, _, version = rest.partition("@")
    if package != "circleosd:plugin" or interface not in INTERFACES:
        refuse(f"imports {_shown(name)}, which this host does not have")
    if version != INTERFACE_VERSION:
        refuse(f"imports {_shown(name)}: this host has version {INTERFACE_VERSION} of that interface")


def _few(names: Iterable[str]) -> str:
    return ", ".join(map(_shown, itertools.islice(names, 8))) or "nothing"


def _shown(name: str) -> str:
    return name if 0 < len(name) <= 80 and name.isprintable() else repr(name[:80])
