"""Waiting until a condition holds: as long as a busy machine may take, and no longer than it takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = 60.0  # after which it is given up
LOOK = 0.01  # seconds between looks


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop go on until `condition` holds. Raises TimeoutError."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(LOOK)


def wait_until(condition: Callable[[], bool]) -> float:
    """Wait until `condition` holds, without an event loop; how many seconds it took. Raises TimeoutError."""
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > SECONDS:
            raise TimeoutError
        time.sleep(LOOK)
    return time.monotonic() - begun


def ended(pid: int) -> bool:
    """Whether a process has ended. The first process of a container may leave it a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
