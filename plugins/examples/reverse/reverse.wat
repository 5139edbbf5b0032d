;; Reverses a text by its Unicode code points: "añb€" becomes "€bña". Core ABI (ABI.md, "core").
;;
;; All in the buffer where the host put the payload, in two passes. The first turns each code point's bytes
;; around, the second all bytes: after both, each code point reads forwards again, and they stand in the
;; opposite order.
(module
  (memory (export "memory") 1)
  (global (export "circleosd_abi") i32 (i32.const 1))

  ;; The payload is at address 16, since an address of 0 would mean that there is no room.
  (global $payload i32 (i32.const 16))

  (func (export "circleosd_buffer") (param $len i32) (result i32)
    (local $missing i32)
    ;; 2 GiB and more could not be a reply either.
    (if (i32.lt_s (local.get $len) (i32.const 0))
      (then (return (i32.const 0))))
    (local.set $missing
      (i32.sub
        (i32.shr_u
          (i32.add (i32.add (global.get $payload) (local.get $len)) (i32.const 0xffff))
          (i32.const 16))
        (memory.size)))
    (if (i32.gt_s (local.get $missing) (i32.const 0))
      (then
        (if (i32.eq (memory.grow (local.get $missing)) (i32.const -1))
          (then (return (i32.const 0))))))
    (global.get $payload))

  ;; Turns the bytes from $first to before $end around.
  (func $turn (param $first i32) (param $end i32)
    (local $byte i32)
    (block $done
      (loop $next
        (local.set $end (i32.sub (local.get $end) (i32.const 1)))
        (br_if $done (i32.ge_u (local.get $first) (local.get $end)))
        (local.set $byte (i32.load8_u (local.get $first)))
        (i32.store8 (local.get $first) (i32.load8_u (local.get $end)))
        (i32.store8 (local.get $end) (local.get $byte))
        (local.set $first (i32.add (local.get $first) (i32.const 1)))
        (br $next))))

  (func (export "handle") (param $len i32) (result i64)
    (local $end i32)
    (local $first i32)
    (local $at i32)
    (local.set $end (i32.add (global.get $payload) (local.get $len)))
    (local.set $first (global.get $payload))
    (block $done
      (loop $code_point
        (br_if $done (i32.ge_u (local.get $first) (local.get $end)))
        ;; $at: past the byte at $first and the continuation bytes, 10xxxxxx, after it.
        (local.set $at (local.get $first))
        (block $found
          (loop $byte
            (local.set $at (i32.add (local.get $at) (i32.const 1)))
            (br_if $found (i32.ge_u (local.get $at) (local.get $end)))
            (br_if $byte
              (i32.eq (i32.and (i32.load8_u (local.get $at)) (i32.const 0xc0)) (i32.const 0x80)))))
        (call $turn (local.get $first) (local.get $at))
        (local.set $first (local.get $at))
        (br $code_point)))
    (call $turn (global.get $payload) (local.get $end))
    ;; The reply: its address in the upper half, its length in the lower.
    (i64.or
      (i64.shl (i64.extend_i32_u (global.get $payload)) (i64.const 32))
      (i64.extend_i32_u (local.get $len)))))
