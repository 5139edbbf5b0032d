"""WASI commands in text form."""

from __future__ import annotations

from tests.core_text import wat

_PREVIEW1 = "wasi_snapshot_preview1"


def command(body: str, *, memory: str = "17", extra: str = "") -> bytes:
    """A command with `body` as `_start`. iovec at 0, counts at 8 and 12, buffer at 1024.

    `$read` fills the buffer once and returns the count; `$write fd ptr len` writes once; `$exit` exits.
    """
    return wat(
        f"""(module
      (import "{_PREVIEW1}" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
      (import "{_PREVIEW1}" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
      (import "{_PREVIEW1}" "proc_exit" (func $exit (param i32)))
      (import "{_PREVIEW1}" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
      (import "{_PREVIEW1}" "path_open"
        (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
      (import "{_PREVIEW1}" "fd_prestat_get" (func $prestat (param i32 i32) (result i32)))
      (import "{_PREVIEW1}" "args_sizes_get" (func $args_sizes (param i32 i32) (result i32)))
      (import "{_PREVIEW1}" "args_get" (func $args (param i32 i32) (result i32)))
      (import "{_PREVIEW1}" "environ_sizes_get" (func $environ_sizes (param i32 i32) (result i32)))
      (import "{_PREVIEW1}" "environ_get" (func $environ (param i32 i32) (result i32)))
      (memory (export "memory") {memory})
      {extra}
      (func $read (result i32)
        (i32.store (i32.const 0) (i32.const 1024))
        (i32.store (i32.const 4) (i32.const 65536))
        (drop (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
        (i32.load (i32.const 8)))
      (func $write (param $fd i32) (param $ptr i32) (param $len i32) (result i32)
        (i32.store (i32.const 0) (local.get $ptr))
        (i32.store (i32.const 4) (local.get $len))
        (call $fd_write (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 12)))
      (func (export "_start") {body}))"""
    )


# Copies stdin to stdout.
ECHO = """(local $n i32)
  (loop $more
    (local.set $n (call $read))
    (if (local.get $n) (then
      (drop (call $write (i32.const 1) (i32.const 1024) (local.get $n)))
      (br $more))))"""

# Sleeps for a minute: a relative monotonic clock subscription at 2048, its event at 2304.
SLEEP = """
  (i32.store (i32.const 2064) (i32.const 1))
  (i64.store (i32.const 2072) (i64.const 60000000000))
  (drop (call $poll (i32.const 2048) (i32.const 2304) (i32.const 1) (i32.const 2400)))"""
