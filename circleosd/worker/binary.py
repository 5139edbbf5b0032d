"""Reads the parts of a binary that identify it, in the format of WebAssembly 2.0; nothing is run.

Compilation validates the parts that are skipped here. The input may be anything: damage raises IndexError, or
`PluginFailure` (`bad-request`) with the reason.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Final, NamedTuple, NoReturn, TypeAlias

from circleosd.worker.failure import PluginFailure

Data: TypeAlias = bytes | bytearray | mmap.mmap

# Wasmtime would accept a million, which take a second to read here; compiled languages stay below a tenth of this.
MAX_ENTRIES: Final = 200_000

I32: Final = 0x7F
I64: Final = 0x7E
FUNC, TABLE, MEMORY, GLOBAL, TAG = range(5)

Type: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


def refuse(reason: str) -> NoReturn:
    raise PluginFailure("bad-request", f"it {reason}")


class Reader:
    """Reads one section. Reading past its end raises IndexError, which means damage."""

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
            refuse(f"has {count} {what}: at most {MAX_ENTRIES} are allowed")
        return count

    def name(self) -> str:
        length = self.leb()
        start = self.position
        self.skip(length)
        try:
            return self.data[start : self.position].decode()
        except UnicodeDecodeError:
            refuse("is damaged: a name in it is not UTF-8")

    def valtype(self) -> int:
        byte = self.byte()
        if byte in (0x63, 0x64):
            self.skip_leb()
        return byte

    def limits(self) -> int:
        """Skip the size of a table or memory; return its flags."""
        flags = self.byte()
        self.skip_leb()
        if flags & 1:
            self.skip_leb()
        if flags & 8:
            self.skip_leb()
        return flags


def sections(data: Data) -> list[tuple[int, Reader]]:
    whole = Reader(data, 8, len(data))
    sections: list[tuple[int, Reader]] = []
    while whole.position < whole.end:
        if len(sections) >= MAX_ENTRIES:
            refuse(f"has more than {MAX_ENTRIES} sections")
        kind = whole.byte()
        size = whole.leb()
        start = whole.position
        whole.skip(size)
        sections.append((kind, Reader(data, start, start + size)))
    return sections


class Import(NamedTuple):
    """An import of that kind, such as FUNC. `type_index` is the type of a function; 0 for other kinds."""

    source: str
    name: str
    kind: int
    type_index: int


class Global(NamedTuple):
    """A global variable. `value` is its initial value if that is a constant i32 in the module."""

    valtype: int
    mutable: bool
    value: int | None


class Module:
    """The parts of a core module that identify it. `functions`: their types, by index; `exports`: kind and index.

    Functions and globals include the imported ones, which come first.
    """

    def __init__(self) -> None:
        self.types: list[Type] = []
        self.imports: list[Import] = []
        self.functions: list[int] = []
        self.globals: list[Global] = []
        self.memories = 0
        self.exports: dict[str, tuple[int, int]] = {}
        self.data: list[Reader] = []

    def function_type(self, index: int) -> Type | None:
        """The type of a function by its index, or None if the index is invalid."""
        return self.types[self.functions[index]] if index < len(self.functions) else None

    def word(self, address: int) -> int:
        """The 32-bit number at an address of a new instance's memory; little-endian, unsigned."""
        content = bytearray(4)
        start = address & 0xFFFFFFFF
        for begin, segment in (found for section in self.data for found in _segments(section)):
            first, last = max(start, begin), min(start + 4, begin + segment.end - segment.position)
            if first < last:
                offset = segment.position - begin
                content[first - start : last - start] = segment.data[first + offset : last + offset]
        return int.from_bytes(content, "little")

    def exported(self, name: str, kind: int) -> int | None:
        """The index of an export, or None if there is none with that name and kind."""
        found = self.exports.get(name)
        return found[1] if found and found[0] == kind else None


def read_module(data: Data) -> Module:
    """Read a core module."""
    module = Module()
    for kind, section in sections(data):
        if kind == 1:
            _types(module, section)
        elif kind == 2:
            _imports(module, section)
        elif kind == 3:
            module.functions += [section.leb() for _ in range(section.count("functions"))]
        elif kind == 5:
            for _ in range(section.count("memories")):
                _memory(module, section)
        elif kind == 6:
            _globals(module, section)
        elif kind == 7:
            _exports(module, section)
        elif kind == 11:
            module.data.append(section)
        elif kind > 13:
            refuse(f"is damaged: it has a section of the unknown kind {kind}")
    return module


def _types(module: Module, section: Reader) -> None:
    for _ in range(section.count("types")):
        form = section.byte()
        if form != 0x60:
            refuse(f"has a type of the form {form:#x} (GC or stack switching), which this host does not support")
        parameters = tuple(section.valtype() for _ in range(section.count("parameters")))
        module.types.append((parameters, tuple(section.valtype() for _ in range(section.count("results")))))


_IMPORTED: Final = Global(0, mutable=True, value=None)  # nothing is known of it


def _imports(module: Module, section: Reader) -> None:
    for _ in range(section.count("imports")):
        source, name, kind = section.name(), section.name(), section.byte()
        index = 0
        if kind == FUNC:
            index = section.leb()
            module.functions.append(index)
        elif kind == TABLE:
            section.valtype()
            section.limits()
        elif kind == MEMORY:
            _memory(module, section)
        elif kind == GLOBAL:
            section.valtype()
            section.byte()
            module.globals.append(_IMPORTED)
        elif kind == TAG:
            section.byte()
            section.leb()
        elif name == "" and kind in (0x7E, 0x7F):
            refuse("has compact imports (several for one name), which this host does not support")
        else:
            refuse(f"has an import of the kind {kind}, which this host does not support")
        module.imports.append(Import(source, name, kind, index))


def _memory(module: Module, section: Reader) -> None:
    flags = section.limits()
    # Data of a shared memory, and addresses in a 64-bit one, are not where the version of a core plugin is looked for.
    for flag, what in ((2, "shared"), (4, "64-bit")):
        if flags & flag:
            refuse(f"has a {what} memory, which this host does not support")
    module.memories += 1


def _globals(module: Module, section: Reader) -> None:
    for _ in range(section.count("globals")):
        valtype = section.valtype()
        mutable = section.byte() != 0
        module.globals.append(Global(valtype, mutable, _constant(section)))


def _constant(section: Reader) -> int | None:
    """Reads one constant expression; returns its value if it is a single i32.const, else None."""
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
            refuse(f"has a constant with the instruction {opcode:#x}, which this host does not support")


def _signed(data: bytes | bytearray) -> int:
    value = sum((byte & 0x7F) << 7 * index for index, byte in enumerate(data))
    bits = 7 * len(data)
    return value - (1 << bits) if value >> (bits - 1) else value


def _exports(module: Module, section: Reader) -> None:
    for _ in range(section.count("exports")):
        name, kind, index = section.name(), section.byte(), section.leb()
        module.exports[name] = (kind, index)


def _segments(section: Reader) -> Iterator[tuple[int, Reader]]:
    """The address and content of each part that a data section puts into the first memory."""
    section = Reader(section.data, section.position, section.end)
    for _ in range(section.count("data segments")):
        flags = section.leb()
        memory = section.leb() if flags == 2 else 0
        address = _constant(section) if flags != 1 else None
        size = section.leb()
        start = section.position
        section.skip(size)
        if memory == 0 and address is not None:
            yield address & 0xFFFFFFFF, Reader(section.data, start, start + size)
