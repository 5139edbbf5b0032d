;; What a WebAssembly plugin might do to its host, for the scenario.
(module
  (memory (export "memory") 1)
  (global (export "circleosd_abi") i32 (i32.const 1))
  (func (export "circleosd_buffer") (param $len i32) (result i32) (i32.const 1024))
  (func $reply (param $len i32) (result i64)
    (i64.or (i64.shl (i64.const 1024) (i64.const 32)) (i64.extend_i32_u (local.get $len))))
  (func (export "ok") (param $len i32) (result i64) (call $reply (local.get $len)))
  (func (export "crash") (param $len i32) (result i64) (unreachable))
  (func (export "hang") (param $len i32) (result i64) (loop $again (br $again)) (unreachable))
  ;; Grows until it may not, then uses what it has; replies with a digit for each doubling.
  (func (export "eat") (param $len i32) (result i64)
    (local $doublings i32)
    (block $full
      (loop $more
        (br_if $full (i32.eq (memory.grow (memory.size)) (i32.const -1)))
        (i32.store8 (i32.sub (i32.mul (memory.size) (i32.const 65536)) (i32.const 1)) (i32.const 1))
        (i32.store8 (i32.add (i32.const 1024) (local.get $doublings)) (i32.const 43))
        (local.set $doublings (i32.add (local.get $doublings) (i32.const 1)))
        (br $more)))
    (call $reply (local.get $doublings)))
  (func (export "outside") (param $len i32) (result i64) (i64.const 0x7fffffff00000010)))
