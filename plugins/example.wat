;; The example plugin: what it was sent, counted. Written by hand for the core ABI (ABI.md, "core").
;;
;;   handle   "5 bytes, 5 characters, 1 word: hello", and one line in the log
;;   upper    the payload with a … z as A … Z
;;   crc32    the payload's CRC-32 (the IEEE polynomial, as zlib has it) in 8 hexadecimal digits
;;
;; One linear memory, laid out once and for all:
;;
;;      0 …  255   constants: words, hexadecimal digits, the CRC table
;;    256 … 1023   room for the text before the payload, built from its end to its start
;;   1024 …        the payload, as long as it is
;;
;; The payload stays where the host wrote it, and what `handle` says about it is put right before it, so that
;; the reply is one piece of memory without the payload having been copied.
(module
  (import "circleosd" "log" (func $log (param $level i32) (param $text i32) (param $length i32)))

  (memory (export "memory") 2)
  (global (export "circleosd_abi") i32 (i32.const 1))

  (global $payload i32 (i32.const 1024))
  (global $longest i32 (i32.const 0x100000)) ;; 1 MiB, which is what this plugin promises

  (data (i32.const 0) "byte")
  (data (i32.const 8) "character")
  (data (i32.const 24) "word")
  (data (i32.const 32) "handled ")
  (data (i32.const 40) ", ")
  (data (i32.const 44) ": ")
  (data (i32.const 48) "0123456789abcdef")
  ;; The CRC of each value of four bits.
  (data (i32.const 64)
    "\00\00\00\00\64\10\b7\1d\c8\20\6e\3b\ac\30\d9\26"
    "\90\41\dc\76\f4\51\6b\6b\58\61\b2\4d\3c\71\05\50"
    "\20\83\b8\ed\44\93\0f\f0\e8\a3\d6\d6\8c\b3\61\cb"
    "\b0\c2\64\9b\d4\d2\d3\86\78\e2\0a\a0\1c\f2\bd\bd")

  ;; The payload always goes to the same address; memory grows when it does not fit, by 64 KiB pages.
  (func (export "circleosd_buffer") (param $len i32) (result i32)
    (local $missing i32)
    (if (i32.gt_u (local.get $len) (global.get $longest))
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

  ;; A successful reply: the address in the upper half, the length in the lower.
  (func $reply (param $start i32) (param $length i32) (result i64)
    (i64.or
      (i64.shl (i64.extend_i32_u (local.get $start)) (i64.const 32))
      (i64.extend_i32_u (local.get $length))))

  ;; The three functions that build text backwards: each puts something right before $end and returns where
  ;; that starts.

  (func $text_before (param $end i32) (param $text i32) (param $length i32) (result i32)
    (local.set $end (i32.sub (local.get $end) (local.get $length)))
    (memory.copy (local.get $end) (local.get $text) (local.get $length))
    (local.get $end))

  (func $number_before (param $end i32) (param $number i32) (result i32)
    (loop $digit
      (local.set $end (i32.sub (local.get $end) (i32.const 1)))
      (i32.store8
        (local.get $end)
        (i32.add (i32.const 0x30) (i32.rem_u (local.get $number) (i32.const 10))))
      (local.set $number (i32.div_u (local.get $number) (i32.const 10)))
      (br_if $digit (local.get $number)))
    (local.get $end))

  ;; "1 byte", "2 bytes"
  (func $count_before (param $end i32) (param $number i32) (param $unit i32) (param $length i32) (result i32)
    (if (i32.ne (local.get $number) (i32.const 1))
      (then
        (local.set $end (i32.sub (local.get $end) (i32.const 1)))
        (i32.store8 (local.get $end) (i32.const 0x73))))
    (local.set $end (call $text_before (local.get $end) (local.get $unit) (local.get $length)))
    (local.set $end (i32.sub (local.get $end) (i32.const 1)))
    (i32.store8 (local.get $end) (i32.const 0x20))
    (call $number_before (local.get $end) (local.get $number)))

  ;; ASCII white space: tab, line feed, vertical tab, form feed, carriage return, space.
  (func $is_space (param $byte i32) (result i32)
    (i32.or
      (i32.eq (local.get $byte) (i32.const 0x20))
      (i32.lt_u (i32.sub (local.get $byte) (i32.const 0x09)) (i32.const 5))))

  (func (export "handle") (param $len i32) (result i64)
    (local $at i32)
    (local $end i32)
    (local $byte i32)
    (local $space i32)
    (local $before i32)
    (local $characters i32)
    (local $words i32)
    (local.set $at (global.get $payload))
    (local.set $end (i32.add (global.get $payload) (local.get $len)))
    (local.set $before (i32.const 1))
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $at) (local.get $end)))
        (local.set $byte (i32.load8_u (local.get $at)))
        ;; Every byte but 10xxxxxx begins a character.
        (local.set $characters
          (i32.add
            (local.get $characters)
            (i32.ne (i32.and (local.get $byte) (i32.const 0xc0)) (i32.const 0x80))))
        ;; A word begins where something follows white space or the start.
        (local.set $space (call $is_space (local.get $byte)))
        (local.set $words
          (i32.add (local.get $words) (i32.gt_u (local.get $before) (local.get $space))))
        (local.set $before (local.get $space))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br $next)))

    (local.set $at (call $count_before (global.get $payload) (local.get $len) (i32.const 0) (i32.const 4)))
    (local.set $at (call $text_before (local.get $at) (i32.const 32) (i32.const 8)))
    (call $log (i32.const 1) (local.get $at) (i32.sub (global.get $payload) (local.get $at)))

    (local.set $at (call $text_before (global.get $payload) (i32.const 44) (i32.const 2)))
    (local.set $at (call $count_before (local.get $at) (local.get $words) (i32.const 24) (i32.const 4)))
    (local.set $at (call $text_before (local.get $at) (i32.const 40) (i32.const 2)))
    (local.set $at (call $count_before (local.get $at) (local.get $characters) (i32.const 8) (i32.const 9)))
    (local.set $at (call $text_before (local.get $at) (i32.const 40) (i32.const 2)))
    (local.set $at (call $count_before (local.get $at) (local.get $len) (i32.const 0) (i32.const 4)))
    (call $reply (local.get $at) (i32.sub (local.get $end) (local.get $at))))

  (func (export "upper") (param $len i32) (result i64)
    (local $at i32)
    (local $end i32)
    (local $byte i32)
    (local.set $at (global.get $payload))
    (local.set $end (i32.add (global.get $payload) (local.get $len)))
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $at) (local.get $end)))
        (local.set $byte (i32.load8_u (local.get $at)))
        ;; Bytes of longer characters are 0x80 and above: none of them is taken for a letter.
        (if (i32.lt_u (i32.sub (local.get $byte) (i32.const 0x61)) (i32.const 26))
          (then (i32.store8 (local.get $at) (i32.sub (local.get $byte) (i32.const 0x20)))))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br $next)))
    (call $reply (global.get $payload) (local.get $len)))

  ;; One step of the CRC, by the lower four bits.
  (func $crc_step (param $crc i32) (result i32)
    (i32.xor
      (i32.shr_u (local.get $crc) (i32.const 4))
      (i32.load
        offset=64
        (i32.shl (i32.and (local.get $crc) (i32.const 0xf)) (i32.const 2)))))

  (func (export "crc32") (param $len i32) (result i64)
    (local $at i32)
    (local $end i32)
    (local $crc i32)
    (local.set $at (global.get $payload))
    (local.set $end (i32.add (global.get $payload) (local.get $len)))
    (local.set $crc (i32.const -1))
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $at) (local.get $end)))
        (local.set $crc (i32.xor (local.get $crc) (i32.load8_u (local.get $at))))
        (local.set $crc (call $crc_step (call $crc_step (local.get $crc))))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br $next)))
    (local.set $crc (i32.xor (local.get $crc) (i32.const -1)))
    ;; Eight digits, from the last to the first, right before the payload.
    (local.set $at (global.get $payload))
    (loop $digit
      (local.set $at (i32.sub (local.get $at) (i32.const 1)))
      (i32.store8
        (local.get $at)
        (i32.load8_u offset=48 (i32.and (local.get $crc) (i32.const 0xf))))
      (local.set $crc (i32.shr_u (local.get $crc) (i32.const 4)))
      (br_if $digit (i32.gt_u (local.get $at) (i32.sub (global.get $payload) (i32.const 8)))))
    (call $reply (local.get $at) (i32.const 8))))
