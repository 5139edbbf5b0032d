r"""The wire protocol: newline-delimited JSON, one object per line, UTF-8. No I/O here.

A request is `{"action":NAME, …parameters, "token"?:STR, "tag"?:ANY}\n`, a reply
`{"ok":true,"message":STR|null,"data":ANY}\n` or `{"ok":false,"message":STR,"data":null,"error":CODE}\n`, with `"tag"`
if the request had one and `"more":true` on every reply of a stream but the last.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

from circleosd.errors import BadRequest, CircleError, Internal, Limit, from_code

JSON = Any  # a value that json.loads can return
MAX_TOKEN = 256  # characters; ours have 43
MAX_VALUES = 10_000  # in one line; a megabyte of values takes a hundred times as long to read as a megabyte of text
MAX_TAG = 1024  # characters; it is echoed in every reply
MAX_DEPTH = 100  # nested objects and lists in a request, whose tag is echoed one level deeper
_BOXES = (dict, list)


class _Absent:
    """The type of `ABSENT`: no tag was sent (null is a tag)."""


ABSENT = _Absent()


class Envelope(NamedTuple):
    """A request before its parameters are examined."""

    action: str
    params: dict[str, JSON]
    token: str | None


class LineBuffer:
    r"""Cuts received bytes into lines of at most `limit` bytes, not counting the newline.

    Each byte is examined only once, however small the pieces in which it arrives.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._data = bytearray()
        self._searched = 0

    def __len__(self) -> int:
        """Bytes held that `next_line` has not returned yet."""
        return len(self._data)

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._data += data

    def next_line(self) -> bytes | None:
        """The next complete line without its newline, or None if it has not been received yet.

        Raises `Limit` if the line is longer than allowed; the stream cannot be read after that.
        """
        end = self._data.find(b"\n", self._searched, self.limit + 1)
        if end < 0:
            if len(self._data) > self.limit:
                raise Limit(f"a line may have at most {self.limit} bytes")
            self._searched = len(self._data)
            return None
        line = bytes(self._data[:end])
        del self._data[: end + 1]
        self._searched = 0
        return line


def only_line(data: bytes, limit: int) -> bytes | None:
    r"""The line in `data`, without its newline; None if it is not exactly one line of at most `limit` bytes."""
    last = len(data) - 1
    return data[:last] if data.find(b"\n") == last and 0 <= last <= limit else None


def _refuse_constant(name: str) -> NoReturn:
    raise BadRequest(f"the line is not JSON: {name} is not allowed")


def _float(text: str) -> float:
    """A number with a fraction or an exponent. One too large would be echoed as Infinity, which is not JSON."""
    number = float(text)
    if math.isinf(number):
        raise BadRequest("the line holds a number that is too large")
    return number


# json.loads and json.dumps with options create these again for every line.
_decoder = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_float)
_parse, _parse_start = _decoder.decode, _decoder.raw_decode
_ESCAPED = bytes(range(0x20)) + b'"\\'  # RFC 8259, section 7
_quote = json.encoder.encode_basestring
_print = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def decode_object(line: bytes) -> dict[str, JSON]:
    """The JSON object (RFC 8259) in a line. Raises `BadRequest` for anything else."""
    try:
        text = line.decode("utf-8")
        try:
            value, end = _parse_start(text)
        except ValueError:
            end = -1
        if end != len(text):  # surrounding white space, which the other way allows, or invalid JSON, which it explains
            value = _parse(text)
        # The first search is for a single character, which takes a hundredth of the time of the others.
        if "\\" in text and ("\\ud" in text or "\\uD" in text):
            # An unpaired surrogate is not valid Unicode text and could be neither stored nor sent on.
            _print(value).encode("utf-8")
    except UnicodeDecodeError as exc:
        raise BadRequest("the line is not UTF-8 text") from exc
    except UnicodeEncodeError as exc:
        raise BadRequest("the line contains half a surrogate pair (such as \\ud83d), which is not text") from exc
    except RecursionError as exc:
        raise BadRequest("the line is nested too deeply") from exc
    except json.JSONDecodeError as exc:
        raise BadRequest(f"the line is not JSON: {exc}") from exc
    except ValueError as exc:  # an integer of more than 4300 digits, sys.int_info
        raise BadRequest("the line holds a number that is too large") from exc
    if not isinstance(value, dict):
        raise BadRequest("the line is not a JSON object")
    return value


def decode_reply(line: bytes, name: str) -> dict[str, JSON]:
    """The reply in a line to a successful request. Otherwise raises the error in it.

    Raises `Internal` for a line that is no reply, which is the fault of the service `name`.
    """
    try:
        reply = decode_object(line)
    except BadRequest as exc:
        raise Internal(f"{name} sent what is not a reply: {exc}") from exc
    if not reply.get("ok"):
        error = reply.get("error")
        if not isinstance(error, str):
            raise Internal(f"{name} sent what is not a reply: it is neither a success nor an error")
        raise from_code(error, str(reply.get("message")))
    return reply


def decode_request(line: bytes) -> dict[str, JSON]:
    """As `decode_shallow`. Raises `Limit` for a line that would take long to read."""
    if len(line) > MAX_VALUES and _values(line) > MAX_VALUES:
        raise Limit(f"a line may hold at most {MAX_VALUES} values")
    return decode_shallow(line)


def decode_shallow(line: bytes) -> dict[str, JSON]:
    """The object in a line, as `decode_object`, nested no deeper than can be written again."""
    found = decode_object(line)
    for value in found.values():
        if type(value) in _BOXES and _deeper(value, MAX_DEPTH - 1):
            raise BadRequest("the line is nested too deeply")
    return found


def _values(line: bytes) -> int:
    """The number of values in a line, or slightly more: everything that starts with a comma or an opening bracket."""
    found = _begun(line)
    if found <= MAX_VALUES:  # the most common, and fastest to find
        return found
    unescaped = line.replace(b"\\\\", b"").replace(b'\\"', b"")
    quotes = unescaped.count(b'"')
    return quotes // 2 if quotes > 4 * MAX_VALUES else _begun(b" ".join(unescaped.split(b'"')[::2]))


def _begun(text: bytes) -> int:
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def _deeper(value: JSON, most: int) -> bool:
    """Whether a list or an object has more than `most` nested levels, including itself."""
    level = [value]
    for _ in range(most):
        insides = (box.values() if type(box) is dict else box for box in level)
        level = [item for inside in insides for item in inside if type(item) in _BOXES]
        if not level:
            return False
    return True


def tag_of(request: dict[str, JSON]) -> JSON:
    """The tag of a decoded request, or `ABSENT`. Raises `Limit` if it is too long to be echoed."""
    tag = request.get("tag", ABSENT)
    if tag is not ABSENT and len(_print(tag) if type(tag) in _BOXES else str(tag)) > MAX_TAG:
        raise Limit(f"a tag may have at most {MAX_TAG} characters")
    return tag


def tag_in(line: bytes) -> JSON:
    """The tag of the request in a line, or `ABSENT` if there is none that could be echoed."""
    try:
        return tag_of(decode_shallow(line))
    except CircleError:
        return ABSENT


def envelope(request: dict[str, JSON]) -> Envelope:
    """The envelope of a decoded request; its other members remain in `request` as the parameters.

    Raises `BadRequest`.
    """
    action = request.pop("action", None)
    if not isinstance(action, str):
        raise BadRequest("a request needs an action, which is a string")
    token = request.pop("token", None)
    request.pop("tag", None)
    if token is not None and not (isinstance(token, str) and 0 < len(token) <= MAX_TOKEN):
        raise BadRequest(f"the token must be a string of at most {MAX_TOKEN} characters")
    return Envelope(action, request, token)


def _text(text: str) -> bytes:
    """A text as JSON. Most texts need no escaping, and checking that is faster than escaping."""
    data = text.encode("utf-8")
    if len(data.translate(None, _ESCAPED)) == len(data):
        return b'"%b"' % data
    return _quote(text).encode("utf-8")


def encode(value: JSON) -> bytes:
    """One line: compact JSON and its newline. Half a surrogate pair, which UTF-8 lacks, becomes a question mark."""
    return _print(value).encode("utf-8", "replace") + b"\n"


def success(data: JSON, *, message: str | None = None, tag: object = ABSENT, more: bool = False) -> bytes:
    """The reply line for a successful request."""
    if type(data) is str and message is None and tag is ABSENT and not more:
        return b'{"ok":true,"message":null,"data":%b}\n' % _text(data)  # as below, in less than half the time
    reply: dict[str, JSON] = {"ok": True, "message": message, "data": data}
    if more:
        reply["more"] = True
    if tag is not ABSENT:
        reply["tag"] = tag
    return encode(reply)


def items(data: list[Any]) -> bytes:
    """A part of a list, without the brackets, for `success_of_parts`."""
    return encode(data)[1:-2]


def success_of_parts(parts: Iterable[bytes], *, message: str | None = None, tag: object = ABSENT) -> bytes:
    """The reply line of `success` for a list, from its parts."""
    end = b"" if tag is ABSENT else b',"tag":%b' % encode(tag)[:-1]
    return b'{"ok":true,"message":%b,"data":[%b]%b}\n' % (encode(message)[:-1], b",".join(parts), end)


def failure(error: CircleError, *, tag: object = ABSENT) -> bytes:
    """The reply line for a failed request."""
    reply: dict[str, JSON] = {"ok": False, "message": str(error), "data": None, "error": error.code}
    if tag is not ABSENT:
        reply["tag"] = tag
    return encode(reply)
