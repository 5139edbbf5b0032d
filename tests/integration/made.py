"""Core plugins that make host calls, and the files that a plugin consists of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.core_text import HOST_CALLS, core

# `call`: the payload is a host call, the reply its answer. `until_refused`: repeats the call until it fails.
CALLER = """
  (func $call (export "call") (param $len i32) (result i64)
    (local $answer i32)
    (local.set $answer (call $host_call (i32.const 1024) (local.get $len)))
    (drop (call $host_answer (i32.const 1024) (i32.const 1048576)))
    (i64.or (i64.shl (i64.const 1024) (i64.const 32)) (i64.extend_i32_u (local.get $answer))))
  (func (export "until_refused") (param $len i32) (result i64)
    (local $answer i32)
    (loop $again
      (local.set $answer (call $host_call (i32.const 1024) (local.get $len)))
      (br_if $again (i32.ge_s (local.get $answer) (i32.const 0))))
    (drop (call $host_answer (i32.const 1024) (i32.const 1048576)))
    (i64.or (i64.shl (i64.const 1024) (i64.const 32)) (i64.extend_i32_u (local.get $answer))))"""


def caller(more: str = "", *, imports: str = "") -> bytes:
    """A core module whose `call` makes the host call that it is given."""
    return core(CALLER + more, imports=HOST_CALLS + imports, memory="40", room=1 << 20)


def asking(hook: str, request: str) -> str:
    """The text of `on_event` or `_initialize` that makes one host call, for `caller`."""
    escaped = request.replace('"', '\\"')
    signature, reply = ("(param i32) (result i64)", "(i64.const 0)") if hook == "on_event" else ("", "")
    return f"""(data (i32.const 64) "{escaped}")
      (func (export "{hook}") {signature}
        (drop (call $host_call (i32.const 64) (i32.const {len(request)}))) {reply})"""


def write(directory: Path, name: str, artifact: bytes, **manifest: Any) -> Path:
    """An artifact and its manifest in a directory; returns the artifact's path."""
    suffix = "so" if artifact.startswith(b"\x7fELF") else "wasm"
    path = directory / f"{name}.{suffix}"
    path.write_bytes(artifact)
    (directory / f"{name}.json").write_text(json.dumps({"name": name, "version": "1", **manifest}))
    return path
