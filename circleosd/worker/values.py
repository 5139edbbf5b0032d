"""Component values: text in, and the few types of wit/circleosd.wit out, using the C API's structures.

`Lower` functions fill a `wasmtime_component_val_t` that Wasmtime then owns, so they allocate with its allocator.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, string_at
from typing import Any, Final, TypeAlias

from wasmtime import _bindings as c
from wasmtime import _ffi as ffi

from circleosd.worker.frames import Buffer

Lower: TypeAlias = Callable[[Any, Any], None]

_BOOL: Final = ffi.WASMTIME_COMPONENT_BOOL.value
_U64: Final = ffi.WASMTIME_COMPONENT_U64.value
STRING: Final = ffi.WASMTIME_COMPONENT_STRING.value
ENUM: Final = ffi.WASMTIME_COMPONENT_ENUM.value
_LIST: Final = ffi.WASMTIME_COMPONENT_LIST.value
_RECORD: Final = ffi.WASMTIME_COMPONENT_RECORD.value
_OPTION: Final = ffi.WASMTIME_COMPONENT_OPTION.value
_RESULT: Final = ffi.WASMTIME_COMPONENT_RESULT.value

_TYPE_NAMES: Final = {
    ffi.WASMTIME_COMPONENT_VALTYPE_STRING.value: "string",
    ffi.WASMTIME_COMPONENT_VALTYPE_LIST.value: "list<…>",
    ffi.WASMTIME_COMPONENT_VALTYPE_RESULT.value: "result<…>",
}
_BYTES: Final = POINTER(c.wasm_byte_t)
_SERVICE: Final = ("name", "state", "description")


def borrow_text(target: Any, data: Buffer) -> object:
    """Makes `target` a string of `data`'s own bytes, which must be UTF-8; keep the returned object until it is used."""
    target.kind = STRING
    string = target.of.string
    string.size = len(data)
    if isinstance(data, memoryview) and not data.readonly and data:
        first = ctypes.c_char.from_buffer(data)
        string.data = ctypes.cast(ctypes.addressof(first), _BYTES)
        return first
    held = bytes(data)
    string.data = ctypes.cast(c_char_p(held), _BYTES)
    return held


def size(value: Any) -> int:
    """Bytes of a string value."""
    return int(value.of.string.size)


def text_bytes(value: Any, most: int | None = None) -> bytes:
    """The UTF-8 of a string value, or its first `most` bytes."""
    length = size(value) if most is None else min(size(value), most)
    return string_at(value.of.string.data, length) if length else b""


def text(value: Any, most: int | None = None) -> str:
    """A string value as text, or its first `most` bytes."""
    return text_bytes(value, most).decode("utf-8", "replace")


def enumeration(value: Any) -> str:
    """The case of an enum value."""
    name = value.of.enumeration
    return string_at(name.data, name.size).decode()


def result(target: Any, answer: tuple[bool, Any], lower: Lower) -> None:
    """`result<T, string>`: the data converted by `lower`, or the error's text."""
    ok, data = answer
    inner = c.wasmtime_component_val_t()
    (lower if ok else _text)(inner, data)
    target.kind = _RESULT
    target.of.result.is_ok = ok
    target.of.result.val = c.wasmtime_component_val_new(byref(inner)) if not ok or lower is not nothing else None


def nothing(target: Any, data: Any) -> None:
    """`_`: for any data."""


def boolean(target: Any, data: Any) -> None:
    """`bool`."""
    target.kind = _BOOL
    target.of.boolean = data


def unsigned(target: Any, data: Any) -> None:
    """`u64`."""
    target.kind = _U64
    target.of.u64 = data


def optional_text(target: Any, data: Any) -> None:
    """`option<string>`."""
    target.kind = _OPTION
    if data is None:
        target.of.option = None
        return
    inner = c.wasmtime_component_val_t()
    _text(inner, data)
    target.of.option = c.wasmtime_component_val_new(byref(inner))


def texts(target: Any, data: Any) -> None:
    """`list<string>`."""
    _list(target, data, _text)


def service(target: Any, data: Any) -> None:
    """The record `service`."""
    target.kind = _RECORD
    c.wasmtime_component_valrecord_new_uninit(byref(target.of.record), len(_SERVICE))
    for index, field in enumerate(_SERVICE):
        entry = target.of.record.data[index]
        _name(entry.name, field)
        _text(entry.val, data[field])


def services(target: Any, data: Any) -> None:
    """`list<service>`."""
    _list(target, data, service)


def function_type(function: Any, context: Any) -> str:
    """A function's type in WIT syntax, as far as this world needs to distinguish types."""
    kind = c.wasmtime_component_func_type(function, context)
    valtype = c.wasmtime_component_valtype_t()
    parameters = []
    name, length = POINTER(ctypes.c_char)(), ctypes.c_size_t()
    for index in range(c.wasmtime_component_func_type_param_count(kind)):
        c.wasmtime_component_func_type_param_nth(kind, index, byref(name), byref(length), byref(valtype))
        parameters.append(_type_name(valtype))
    written = "async " if c.wasmtime_component_func_type_async(kind) else ""
    written += f"func({', '.join(parameters)})"
    if c.wasmtime_component_func_type_result(kind, byref(valtype)):
        written += f" -> {_type_name(valtype)}"
    c.wasmtime_component_func_type_delete(kind)
    return written


def _type_name(valtype: Any) -> str:
    name = _TYPE_NAMES.get(valtype.kind, "…")
    if name != "result<…>":
        return name
    cases = []
    for case in (c.wasmtime_component_result_type_ok, c.wasmtime_component_result_type_err):
        inner = c.wasmtime_component_valtype_t()
        cases.append(_type_name(inner) if case(valtype.of.result, byref(inner)) else "_")
    return f"result<{', '.join(cases)}>"


def _text(target: Any, data: str) -> None:
    target.kind = STRING
    _name(target.of.string, data)


def _name(target: Any, data: str) -> None:
    encoded = data.encode("utf-8", "replace")
    c.wasm_byte_vec_new(byref(target), len(encoded), ctypes.cast(c_char_p(encoded), _BYTES))


def _list(target: Any, data: list[Any], item: Lower) -> None:
    target.kind = _LIST
    c.wasmtime_component_vallist_new_uninit(byref(target.of.list), len(data))
    for index, value in enumerate(data):
        item(target.of.list.data[index], value)
