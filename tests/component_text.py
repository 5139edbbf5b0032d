"""Components in text form, lifted and lowered by hand, so that tests need no component toolchain."""

from __future__ import annotations

from tests.core_text import wat

_RESULT = "(result (result string (error string)))"


def component(
    *, imports: str = "", host: tuple[str, ...] = (), body: str = "", exports: str = "", handle: str = "",
    memory: str = "17",
) -> bytes:  # fmt: skip
    """A component that answers `handle` with its payload, unless `handle` is another body.

    `imports` may lower functions with `(memory $memory) (realloc $realloc)`; `host` are the core functions that
    the inner module imports: `name params`, where `name` is both a core function of the component and a
    function of the module. `body` and `exports` add functions to module and component.

    `$ok` and `$error` take pointer and length and return a result's area, at 16. `cabi_realloc` hands out memory
    from 65536 to 16 MiB, again and again.
    """
    handle = handle or "(call $ok (local.get $ptr) (local.get $len))"
    names = [text.partition(" ")[0] for text in host]
    core_imports = "".join(f'(import "host" "{name}" (func ${text}))' for name, text in zip(names, host, strict=True))
    instance = "".join(f'(export "{name}" (func ${name}))' for name in names)
    return wat(
        f"""(component
      (core module $libc
        (memory (export "memory") {memory})
        (global $next (mut i32) (i32.const 65536))
        (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32)
          (local $start i32)
          (if (i32.gt_u (global.get $next) (i32.const 16777216)) (then (global.set $next (i32.const 65536))))
          (local.set $start (i32.and (i32.add (global.get $next) (i32.const 15)) (i32.const -16)))
          (global.set $next (i32.add (local.get $start) (local.get 3)))
          (if (i32.gt_u (global.get $next) (i32.mul (memory.size) (i32.const 65536)))
            (then (drop (memory.grow (i32.const 64)))))
          (local.get $start)))
      (core instance $libc (instantiate $libc))
      (alias core export $libc "memory" (core memory $memory))
      (alias core export $libc "cabi_realloc" (core func $realloc))
      {imports}
      (core module $m
        (import "libc" "memory" (memory 1))
        {core_imports}
        (func $area (param $case i32) (param $ptr i32) (param $len i32) (result i32)
          (i32.store8 (i32.const 16) (local.get $case))
          (i32.store (i32.const 20) (local.get $ptr))
          (i32.store (i32.const 24) (local.get $len))
          (i32.const 16))
        (func $ok (param $ptr i32) (param $len i32) (result i32)
          (call $area (i32.const 0) (local.get $ptr) (local.get $len)))
        (func $error (param $ptr i32) (param $len i32) (result i32)
          (call $area (i32.const 1) (local.get $ptr) (local.get $len)))
        (func $handle (export "handle") (param $ptr i32) (param $len i32) (result i32) {handle})
        {body})
      (core instance $host {instance})
      (core instance $i (instantiate $m (with "libc" (instance $libc)) (with "host" (instance $host))))
      {another("handle", "handle")}
      {exports})"""
    )


def another(name: str, core_name: str) -> str:
    """An export of handle's type, for `exports`."""
    return f"""(func (export "{name}") (param "payload" string) {_RESULT}
        (canon lift (core func $i "{core_name}") (memory $memory) (realloc $realloc)))"""
