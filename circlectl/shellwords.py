"""A command line as bash and readline see it: the words, which part of them Tab replaces, and how to quote it."""

from __future__ import annotations

import re
from typing import NamedTuple

_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]")
_ESCAPED_IN_DOUBLE_QUOTES = '$`"\\'


class Typed(NamedTuple):
    """A line up to the cursor. `before` are the words before the one at the cursor, `word`, all without quotes.

    Readline keeps the first `kept` characters of `word` and replaces the rest; `quote` is the quote that is open at the
    cursor, or "". `settled`: the word has a part in closed quotes, in which readline looks for the start of the word.
    """

    before: list[str]
    word: str
    kept: int
    quote: str
    settled: bool

    def replacement(self, whole: str) -> str:
        """What readline has to insert to complete the word to `whole`; "" if that is impossible."""
        if self.settled or not whole.startswith(self.word[: self.kept]):
            return ""
        text = whole[self.kept :]
        if self.quote == "'":
            return text.replace("'", "'\\''")
        if self.quote == '"':
            escaped = (f"\\{char}" if char in _ESCAPED_IN_DOUBLE_QUOTES else char for char in text)
            # In double quotes neither ! nor \! is a plain exclamation mark (bash(1), HISTORY EXPANSION).
            return "".join('"\\!"' if char == "!" else char for char in escaped)
        return "".join(char if _PLAIN.match(char) else f"\\{char}" for char in text)


def split_bash(line: str, breaks: str) -> Typed:
    """Split a line, up to the cursor, as bash does; `breaks` is COMP_WORDBREAKS (bash(1), QUOTING)."""
    words: list[str] = []
    word, kept, settled, begun, quote = "", 0, False, False, ""
    characters = iter(line)
    for char in characters:
        if quote:
            if char == quote:
                quote, settled = "", True
            elif char == "\\" and quote == '"':
                following = next(characters, "")
                word += following if following in _ESCAPED_IN_DOUBLE_QUOTES else char + following
            else:
                word += char
        elif char in " \t\n":
            if begun:
                words.append(word)
            word, kept, settled, begun = "", 0, False, False
        else:
            begun = True
            if char in "'\"":
                quote, kept = char, len(word)
            elif char == "\\":
                word += next(characters, "")
            else:
                word += char
                if char in breaks:
                    kept = len(word)
    return Typed(words, word, kept, quote, settled)
