"""Characters in a text from elsewhere that have an effect beyond being displayed."""

from __future__ import annotations

# They control a terminal (C0, DEL, C1), end a line (U+2028, U+2029) or reorder the text (Bidi_Control, UAX #9).
STEERING = frozenset(
    map(chr, (*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)))
)
_REPLACED = dict.fromkeys(map(ord, STEERING - {"\t"}), "\N{REPLACEMENT CHARACTER}")


def plain(text: str) -> str:
    """`text` on one line: each of these characters except the tab is replaced."""
    return text.translate(_REPLACED)


def word(text: str) -> str:
    """`text` as a single word: in quotes, and escaped, unless it is visible ASCII without blanks. All names of objects
    are, but a refused request may have any: it could pretend what follows in a line, or look like another name.
    """
    return text if text.isascii() and text.isprintable() and text and " " not in text else ascii(text)
