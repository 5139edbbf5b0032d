"""Turns WebAssembly text into a binary: `python wat2wasm.py IN.wat OUT.wasm`."""

import sys
from pathlib import Path

from wasmtime import WasmtimeError, wat2wasm

if len(sys.argv) != 3:
    sys.exit(__doc__)
try:
    Path(sys.argv[2]).write_bytes(wat2wasm(Path(sys.argv[1]).read_text(encoding="utf-8")))
except (OSError, ValueError, WasmtimeError) as exc:
    sys.exit(f"{sys.argv[1]}: {exc}")
