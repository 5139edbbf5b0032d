"""Core plugins in text form."""

from __future__ import annotations

import wasmtime

SPIN = '(func $spin (export "spin") (param i32) (result i64) (loop $l (br $l)) unreachable)'
# Imports of the host's functions.
LOG = '(import "circleosd" "log" (func $log (param i32 i32 i32)))'
HOST_CALLS = """
  (import "circleosd" "host_call" (func $host_call (param i32 i32) (result i32)))
  (import "circleosd" "host_answer" (func $host_answer (param i32 i32) (result i32)))"""


def wat(text: str) -> bytes:
    """WebAssembly from its text format."""
    return bytes(wasmtime.wat2wasm(text))


def core(
    body: str = "", *, memory: str = "2", buffer: str = "(i32.const 1024)", room: int = 65536, imports: str = ""
) -> bytes:
    """A core plugin with the usual exports, `echo` and `explode`, and what `body` adds."""
    return wat(
        f"""(module {imports}
          (memory (export "memory") {memory})
          (global (export "circleosd_abi") i32 (i32.const 1))
          (func (export "circleosd_buffer") (param $len i32) (result i32)
            (select {buffer} (i32.const 0) (i32.le_u (local.get $len) (i32.const {room}))))
          (func $echo (export "echo") (param $len i32) (result i64)
            (i64.or (i64.shl (i64.const 1024) (i64.const 32)) (i64.extend_i32_u (local.get $len))))
          (func $explode (export "explode") (param $len i32) (result i64) unreachable)
          {body})"""
    )
