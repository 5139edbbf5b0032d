"""The host from the plugin's view: the log, and the calls in ABI.md's table.

Nothing here raises an exception for what a plugin did: a callback from plugin code cannot raise. The manager decides
again about every call that reaches it; refusing a call here saves the round trip.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple, TypeAlias

from circleosd.worker import frames
from circleosd.worker.frames import Buffer, FrameError, Load

# What one call may log: 32 of the longest messages.
LOG_BUDGET: Final = 32 * frames.MAX_LOG
LEAST_LOGGED: Final = 128  # minimum size that a message counts as: each is a line in the host's journal

TOO_LONG: Final = f"limit: a host call may have at most {frames.MAX_HOST_CALL} bytes as JSON"

# (True, the result) or (False, "code: message").
Answer: TypeAlias = tuple[bool, Any]


def logged(size: int) -> int:
    """How much of its call's allowance a message of `size` bytes uses."""
    return max(size, LEAST_LOGGED)


class HostCall(NamedTuple):
    """The names of the arguments, all text, and the capability, which may contain an argument."""

    arguments: tuple[str, ...]
    capability: str


CALLS: Final[dict[str, HostCall]] = {
    "kv.get": HostCall(("key",), "kv"),
    "kv.set": HostCall(("key", "value"), "kv"),
    "kv.delete": HostCall(("key",), "kv"),
    "kv.keys": HostCall(("prefix",), "kv"),
    "config.get": HostCall(("key",), "config"),
    "config.keys": HostCall((), "config"),
    "clock.now": HostCall((), "clock"),
    "clock.monotonic": HostCall((), "clock"),
    "services.list": HostCall((), "services:read"),
    "services.status": HostCall(("name",), "services:read"),
    "services.restart": HostCall(("name",), "services:restart:{name}"),
    "events.emit": HostCall(("topic", "payload"), "events:{topic}"),
}

# The capabilities; those that end in a colon are followed by a name, which may contain colons too.
KINDS: Final = tuple(dict.fromkeys(call.capability.partition("{")[0] for call in CALLS.values()))
_NAMED: Final = tuple(kind for kind in KINDS if kind.endswith(":"))


def covers(granted: str, capability: str) -> bool:
    """Whether the granted capability is `capability`, or its kind with `*` as the name."""
    return granted == capability or any(capability.startswith(kind) and granted == f"{kind}*" for kind in _NAMED)


def is_covered(capability: str, by: Iterable[str]) -> bool:
    """Whether one of the capabilities `by` is this one, or its kind with `*` as the name."""
    return any(covers(item, capability) for item in by)


def needed_capability(call: str, args: dict[str, str]) -> str:
    """The capability needed for a call in `CALLS` with these arguments."""
    return CALLS[call].capability.format_map(args)


class Call:
    """One call from the host's view: its id, 0 while the plugin is loaded, and how much it may still log."""

    __slots__ = ("budget", "call_id")

    def __init__(self, call_id: int) -> None:
        self.call_id = call_id
        self.budget = LOG_BUDGET


class _Current(threading.local):
    call: Call = Call(0)


class Host:
    """One plugin's host. `send` sends a frame; `ask` sends a HOST_CALL and returns its reply's body."""

    def __init__(
        self,
        load: Load,
        send: Callable[[int, int, Buffer], None],
        ask: Callable[[int, Buffer], Buffer],
    ) -> None:
        self._granted = load.granted
        self.config = load.config if is_covered("config", load.granted) else {}  # also a WASI program's environment
        self._send = send
        self._ask = ask
        self._current = _Current()
        self._local: dict[str, Callable[[dict[str, str]], Any]] = {
            "config.get": lambda args: self.config.get(args["key"]),
            "config.keys": lambda args: sorted(self.config),
            "clock.now": lambda args: time.time_ns() // 1_000_000,
            "clock.monotonic": lambda args: time.monotonic_ns(),
        }

    def begin(self, call_id: int) -> None:
        """From now on, this thread acts for that call id."""
        self._current.call = Call(call_id)

    @property
    def current(self) -> Call:
        """This thread's call, for threads that write on its behalf."""
        return self._current.call

    def log(self, level: int, text: str, call: Call | None = None) -> None:
        """Sends one message of this thread's call, or of the given one; drops it if the call logs too much."""
        call = call or self._current.call
        if call.budget <= 0:
            return
        body = frames.log_body(level, text)
        call.budget -= logged(len(body))
        self._send(frames.LOG, call.call_id, body)
        if call.budget <= 0:
            self._send(frames.LOG, call.call_id, frames.log_body(2, "further log messages of this call were dropped"))

    def call(self, call: str, args: dict[str, str]) -> Answer:
        """One call in `CALLS` with complete arguments."""
        capability = needed_capability(call, args)
        if not is_covered(capability, self._granted):
            return False, f"denied: this plugin has not been granted the capability {capability}"
        local = self._local.get(call)
        if local is not None:
            return True, local(args)
        request = frames.json_body({"call": call, "args": args})
        if len(request) > frames.MAX_HOST_CALL:
            return False, TOO_LONG
        try:
            return frames.parse_host_reply(self._ask(self._current.call.call_id, request))
        except FrameError as exc:
            return False, f"internal: {exc}"

    def call_json(self, request: bytes) -> tuple[bool, bytes]:
        """The same for a JSON request; the answer is the result as JSON, or the error's text."""
        ok, result = self._call_json(request)
        return ok, frames.json_body(result) if ok else str(result).encode("utf-8", "replace")

    def _call_json(self, request: bytes) -> Answer:
        try:
            value = json.loads(request.decode())
        except (ValueError, RecursionError) as exc:
            return False, f"bad-request: the host call is not JSON: {exc}"
        call = value.get("call") if isinstance(value, dict) else None
        if not isinstance(call, str):
            return False, 'bad-request: the host call is not a JSON object with a "call"'
        known = CALLS.get(call)
        if known is None:
            return False, f"bad-request: no host call {call[:80]!r}"
        args = value.get("args")
        if args is None:
            args = {}
        if not isinstance(args, dict) or set(args) != set(known.arguments):
            names = ", ".join(known.arguments) or "none"
            return False, f"bad-request: the arguments of {call} are: {names}"
        if not all(isinstance(item, str) for item in args.values()):
            return False, f"bad-request: the arguments of {call} must be text"
        try:
            "".join(args.values()).encode()
        except UnicodeEncodeError:
            return False, f"bad-request: an argument of {call} is not text: it contains half a surrogate pair"
        return self.call(call, args)
