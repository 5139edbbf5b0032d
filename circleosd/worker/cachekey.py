"""The name under which a compilation is cached: a digest of everything that it depends on, besides the machine.

Does not import Wasmtime: the manager, which never runs plugin code, uses this too.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Final

# Increase it with every change in engine.configuration that alters compiled code.
CONFIGURATION: Final = 2


def cache_key(sha256: str, *, deterministic: bool = False) -> str:
    """64 hexadecimal digits for the compilation of the artifact with that digest."""
    import hashlib  # see chain.linked

    parts = (sha256, _wasmtime(), str(CONFIGURATION), "fuel" if deterministic else "epoch")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@lru_cache(maxsize=1)
def _wasmtime() -> str:
    """Its version and its library, which nixpkgs has in a separate package.

    Wasmtime itself refuses compilations for another machine or CPU; but of those of other releases, it refuses only the
    ones of another major version, and a later release may fix an error in code compiled by an earlier one.
    """
    from importlib.metadata import distribution  # a start of the manager need not wait for it

    wasmtime = distribution("wasmtime")
    library = os.path.realpath(str(wasmtime.locate_file(f"wasmtime/linux-{os.uname().machine}/_libwasmtime.so")))
    return f"{wasmtime.version}\n{library}"
