"""The protocol between plugin manager and worker: framing and bodies, without I/O.

A frame is a header `!IBI` (body length, kind, call id) and a body, over a Unix stream socket. The manager sends LOAD
once, first, with the artifact's descriptor (SCM_RIGHTS, on the frame's first byte) and, if `precompiled`, that of its
compilation. The worker of a wasm plugin replies with COMPILED once, before it runs any code of the plugin, empty if the
given one fits; every worker replies with READY or FAILED; all with call id 0. Each INVOKE or EVENT has its own call id,
1 to `LAST_ID`, and is answered with that id by one RESULT or FAILED. LOG and HOST_CALL frames come before that with the
same id: 0 while the plugin is loaded; and, after a wasm call, its id with the bit `PREPARING`, while the instance of
another call is made. Each HOST_CALL waits for its HOST_REPLY.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final, Literal, NamedTuple, TypeAlias, cast, get_args

Buffer: TypeAlias = bytes | bytearray | memoryview

HEADER: Final = struct.Struct("!IBI")

LOAD: Final = 1
INVOKE: Final = 2
HOST_REPLY: Final = 3
EVENT: Final = 4
READY: Final = 16
COMPILED: Final = 17
RESULT: Final = 18
FAILED: Final = 19
LOG: Final = 20
HOST_CALL: Final = 21

PREPARING: Final = 1 << 31
LAST_ID: Final = PREPARING - 1

# A payload or reply of 16 MiB is twice the longest request line of the services (plugins.max_line), so an escaped
# payload never reaches this limit first.
MAX_PAYLOAD: Final = 16 << 20
MAX_HOST_CALL: Final = 1 << 20
MAX_ARGUMENTS: Final = 2
AROUND_ARGUMENTS: Final = 128  # bytes of a HOST_CALL besides its arguments' values: at most some 60 with today's names
MAX_LOG: Final = 8 << 10
MAX_NAME: Final = 128
# What a plugin may say about itself in READY, which is shown in listings.
MAX_FUNCTIONS: Final = 1_000
MAX_DESCRIPTION: Final = 4096
# A compromised worker could send anything; an honest one has some dozens of imports, and 17 lines of backtrace.
MAX_ITEMS: Final = 1_000
MAX_ITEM: Final = 1024

# A compilation is two to six times as large as its module; that of a 50 MB module still fits.
MAX_COMPILED: Final = 512 << 20

TO_WORKER: Final[dict[int, int]] = {
    LOAD: 4 << 20,
    INVOKE: MAX_PAYLOAD + MAX_NAME + 2,
    EVENT: MAX_PAYLOAD + MAX_NAME + 2,
    HOST_REPLY: MAX_PAYLOAD,
}
TO_MANAGER: Final[dict[int, int]] = {
    READY: 4 << 20,
    COMPILED: MAX_COMPILED,
    RESULT: MAX_PAYLOAD,
    FAILED: 1 << 20,
    LOG: MAX_LOG + 1,
    HOST_CALL: MAX_HOST_CALL,
}

# `unavailable`: the machine lacks something that a worker needs before it is ready, which is not the plugin's fault.
Code: TypeAlias = Literal["plugin-failed", "timeout", "limit", "not-found", "bad-request", "unavailable"]
PluginType: TypeAlias = Literal["wasm", "native"]
Abi: TypeAlias = Literal["core", "component", "wasi", "native"]
Instance: TypeAlias = Literal["fresh", "shared"]

# Levels of LOG frames and of the plugins' log functions.
LEVELS: Final = ("debug", "info", "warning", "error")


class FrameError(Exception):
    """The peer violated the protocol; the connection cannot be used any more."""


class Limits(NamedTuple):
    """`memory` and `output` in bytes, `time` in seconds, `concurrency` in calls at once.

    Calls that share an instance of WebAssembly have the concurrency 1.
    """

    memory: int = 64 << 20
    time: float = 5.0
    output: int = 4 << 20
    concurrency: int = 1


class Load(NamedTuple):
    """What a worker is to run. `abi` None means: detect it; `entry` is the init function of a native plugin."""

    name: str
    plugin_type: PluginType
    limits: Limits = Limits()
    abi: Abi | None = None
    entry: str | None = None
    instance: Instance = "fresh"
    deterministic: bool = False
    config: dict[str, str] = {}  # noqa: RUF012  (a NamedTuple's default, never written to)
    granted: tuple[str, ...] = ()
    precompiled: bool = False


class Ready(NamedTuple):
    """`sandbox` lists the mechanisms with which the worker confined itself, for example `seccomp`."""

    abi: Abi
    functions: list[str]
    imports: list[str]
    description: str | None
    sandbox: list[str]


class Failed(NamedTuple):
    """`restarted`: a shared instance was discarded with its state. `reported`: the plugin itself reported the failure,
    in its own words or by its exit status; otherwise it was stopped, and is to blame.
    """

    code: Code
    message: str
    backtrace: list[str]
    restarted: bool = False
    reported: bool = False


class Frame(NamedTuple):
    """One received frame."""

    kind: int
    call_id: int
    body: bytes | bytearray


def encode(kind: int, call_id: int, body: Buffer = b"") -> bytes:
    """One complete frame. Raises `FrameError` if the body exceeds the limit of its kind."""
    check(kind, len(body), TO_WORKER if kind < READY else TO_MANAGER)
    return HEADER.pack(len(body), kind, call_id) + body


def check(kind: int, length: int, bounds: dict[int, int]) -> None:
    """Raises `FrameError` for a kind that is not in `bounds`, or a body longer than its limit there."""
    bound = bounds.get(kind)
    if bound is None:
        raise FrameError(f"cannot read the frame: kind {kind} is unknown here")
    if length > bound:
        raise FrameError(f"cannot take a frame of kind {kind} with {length} bytes: the bound is {bound}")


def named_body(name: str, payload: Buffer) -> bytes:
    """The body of INVOKE (function, payload) and of EVENT (topic, payload): u16 length, name, payload."""
    encoded = name.encode()
    if not 0 < len(encoded) <= MAX_NAME:
        raise FrameError(f"cannot send a name of {len(encoded)} bytes: it must have 1 to {MAX_NAME}")
    return len(encoded).to_bytes(2, "big") + encoded + payload


def split_named(body: Buffer) -> tuple[str, memoryview]:
    """Name and payload of INVOKE and EVENT. Raises `FrameError`."""
    if len(body) < 2:
        raise FrameError("cannot read the frame: it ends before its name")
    end = 2 + (body[0] << 8 | body[1])
    if end > len(body):
        raise FrameError("cannot read the frame: its name is longer than the frame")
    try:
        return str(body[2:end], "utf-8"), memoryview(body)[end:]
    except UnicodeDecodeError as exc:
        raise FrameError("cannot read the frame: its name is not UTF-8") from exc


def json_body(value: object) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def json_object(body: Buffer) -> dict[str, Any]:
    """The JSON object in `body`, with texts that UTF-8 can represent. Raises `FrameError`."""
    try:
        text = str(body, "utf-8")
        value = json.loads(text)
        # As in wire.py: an escape may stand for half a character (RFC 8259, section 8.2).
        if "\\" in text and ("\\ud" in text or "\\uD" in text):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as exc:
        raise FrameError(f"cannot read the frame: {exc}") from exc
    if not isinstance(value, dict):
        raise FrameError("cannot read the frame: it is not a JSON object")
    return value


def load_body(load: Load) -> bytes:
    """The body of LOAD."""
    return json_body({**load._asdict(), "limits": load.limits._asdict()})


def parse_load(body: Buffer) -> Load:
    """The inverse of `load_body`; the manager has checked the values. Raises `FrameError` for a wrong set of fields."""
    value = json_object(body)
    try:
        limits = Limits(**value.pop("limits"))
        return Load(**{**value, "limits": limits, "granted": tuple(value.get("granted", ()))})
    except (KeyError, TypeError) as exc:
        raise FrameError(f"cannot read the load request: {exc}") from exc


def ready_body(ready: Ready) -> bytes:
    """The body of READY."""
    return json_body(ready._asdict())


def parse_ready(body: Buffer) -> Ready:
    """The inverse of `ready_body`. The worker may be compromised, so every field is checked."""
    value = json_object(body)
    abi, description = value.get("abi"), value.get("description")
    if abi not in get_args(Abi) or not (description is None or isinstance(description, str)):
        raise FrameError("cannot read READY: abi or description is not allowed")
    functions = _texts(value, "functions", MAX_FUNCTIONS, MAX_NAME)
    if not functions or "" in functions or len(description or "") > MAX_DESCRIPTION:
        raise FrameError("cannot read READY: it has no functions, or too long a description")
    return Ready(cast(Abi, abi), functions, _texts(value, "imports"), description, _texts(value, "sandbox"))


def failed_body(failed: Failed) -> bytes:
    """The body of FAILED."""
    return json_body(failed._asdict())


def parse_failed(body: Buffer) -> Failed:
    """The inverse of `failed_body`. The worker may be compromised, so every field is checked."""
    value = json_object(body)
    code, message = value.get("code"), value.get("message")
    if code not in get_args(Code) or not isinstance(message, str):
        raise FrameError("cannot read FAILED: code or message is not allowed")
    told = (value.get(field) is True for field in ("restarted", "reported"))
    return Failed(cast(Code, code), message, _texts(value, "backtrace"), *told)


def _texts(value: dict[str, Any], field: str, most: int = MAX_ITEMS, longest: int = MAX_ITEM) -> list[str]:
    """A list of at most `most` texts of at most `longest` bytes."""
    items = value.get(field)
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise FrameError(f"cannot read the frame: {field} is not a list of texts")
    if len(items) > most or any(len(item.encode()) > longest for item in items):
        raise FrameError(f"cannot read the frame: {field} has over {most} texts, or one of over {longest} bytes")
    return items


def log_body(level: int, text: str) -> bytes:
    """The body of LOG: u8 level (other levels than 0 to 3 become 3) and UTF-8 text, cut at `MAX_LOG` bytes."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) > MAX_LOG:
        encoded = encoded[: MAX_LOG - 3].decode("utf-8", "ignore").encode() + "…".encode()
    return bytes((level if 0 <= level <= 3 else 3,)) + encoded


def parse_log(body: Buffer) -> tuple[int, str]:
    """Level (0 to 3) and text. Raises `FrameError`."""
    data = bytes(body)
    if not data or data[0] > 3:
        raise FrameError("cannot read LOG: it has no valid level")
    return data[0], data[1:].decode("utf-8", "replace")


def parse_host_call(body: Buffer) -> tuple[str, dict[str, str]]:
    """Call and arguments of HOST_CALL. Raises `FrameError`."""
    value = json_object(body)
    call, args = value.get("call"), value.get("args")
    if not isinstance(call, str) or not isinstance(args, dict):
        raise FrameError("cannot read HOST_CALL: call or args is not allowed")
    if not all(isinstance(item, str) for item in args.values()):
        raise FrameError("cannot read HOST_CALL: an argument is not text")
    # A compromised worker could send a megabyte of small values, or of members that are dropped, again and again: it
    # takes up to 50 times as long to read as a megabyte of text. A character takes at most 6 bytes.
    if len(args) > MAX_ARGUMENTS or len(body) > AROUND_ARGUMENTS + 6 * sum(map(len, args.values())):
        raise FrameError("cannot read HOST_CALL: it has more than a call and its arguments")
    return call, args


def host_reply_body(data: object) -> bytes:
    """The body of HOST_REPLY for a successful call with the result `data`."""
    return json_body({"ok": True, "data": data})


def host_error_body(code: str, message: str) -> bytes:
    """The body of HOST_REPLY for a call that was refused or failed."""
    return json_body({"ok": False, "error": code, "message": message})


def parse_host_reply(body: Buffer) -> tuple[bool, Any]:
    """(True, data), or (False, `code: message`). Raises `FrameError`."""
    value = json_object(body)
    if value.get("ok") is True:
        return True, value.get("data")
    return False, f"{value.get('error', 'internal')}: {value.get('message', 'no reason given')}"
