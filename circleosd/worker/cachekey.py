"""The name under which a compilation is cached: a digest of everything that it depends on.

Does not import Wasmtime: the manager, which never runs plugin code, uses this too.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Final

# Increase it with every change in engine.configuration that alters compiled code.
CONFIGURATION: Final = 2


def cache_key(sha256: str, *, deterministic: bool = False) -> str:
    """64 hexadecimal digits for the compilation of the artifact with that digest on this machine."""
    import hashlib  # see chain.linked

    parts = (sha256, _host(), str(CONFIGURATION), "fuel" if deterministic else "epoch")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@lru_cache(maxsize=1)
def _host() -> str:
    """Wasmtime's version and library, the machine, and the features of its CPU (proc_cpuinfo(5)).

    nixpkgs has the library in a separate package. Wasmtime itself refuses only compilations of another major version,
    but a later release may fix an error in code compiled by an earlier one. If /proc/cpuinfo is hidden
    (ProcSubset=pid), only Wasmtime's own check of the CPU remains, which refuses foreign code.
    """
    from importlib.metadata import distribution  # a start of the manager need not wait for it

    features = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.partition(":")[0].strip() in ("flags", "Features"):
            features = line
            break
    machine = os.uname().machine
    wasmtime = distribution("wasmtime")
    library = os.path.realpath(str(wasmtime.locate_file(f"wasmtime/linux-{machine}/_libwasmtime.so")))
    return f"{wasmtime.version}\n{library}\n{machine}\n{features}"
