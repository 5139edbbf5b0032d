"""Parts of WebAssembly's binary format."""

from __future__ import annotations


def leb128(value: int) -> bytes:
    """An unsigned number, as the format writes all of them."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def padded(module: bytes, size: int) -> bytes:
    """The module with a custom section of so many bytes of nothing at its end."""
    body = b"\x04junk" + bytes(size)
    return module + b"\0" + leb128(len(body)) + body
