"""Turns WebAssembly text into a binary: `python wat2wasm.py IN.wat OUT.wasm`."""

import sys
from pathlib import Path

from wasmtime import wat2wasm

Path(sys.argv[2]).write_bytes(wat2wasm(Path(sys.argv[1]).read_text(encoding="utf-8")))
