"""What the registry's service manager on systemd costs, against systemctl in the same run. Medians, in milliseconds.

On a throw-away machine with a booted systemd, as root:  python bench/dbus_units.py [runs]
"""

from __future__ import annotations

import asyncio
import importlib
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

UNIT = "circleosd-bench.service"
FILE = Path("/run/systemd/system") / UNIT
TEXT = "[Unit]\nStartLimitIntervalSec=0\n[Service]\nType=exec\nExecStart=sleep infinity\n"


def resident() -> int:
    """This process's resident memory in KiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4


def since(start: float) -> float:
    """Milliseconds."""
    return (time.perf_counter() - start) * 1000


def row(what: str, value: float, remark: str = "") -> None:
    """Print a line."""
    print(f"{what:36}{value:9.2f} {remark}")


async def median(runs: int, act: Callable[[], Awaitable[object]]) -> float:
    """The median time of `act`."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        await act()
        times.append(since(start))
    return statistics.median(times)


async def systemctl(*arguments: str) -> None:
    """Run systemctl, which waits for the job like we do."""
    process = await asyncio.create_subprocess_exec("systemctl", *arguments, stdout=subprocess.DEVNULL)
    assert await process.wait() == 0


async def main(runs: int) -> None:
    """Measure and print."""
    before = resident()
    start = time.perf_counter()
    from circleosd.systemd.units import SystemdUnits

    row("import circleosd.systemd.units", since(start), f"{resident() - before} KiB")
    start = time.perf_counter()
    importlib.import_module("circleosd.systemd.bus")
    row("import dbus-fast, at the first call", since(start), f"{resident() - before} KiB")
    manager = SystemdUnits("system", timeout=30)
    start = time.perf_counter()
    await manager.states([UNIT])
    row("connect, first answer", since(start))
    units = [unit for unit in await manager.matching("*") if not unit.endswith(".device")][:30]
    row(f"states of {len(units)} units", await median(runs, lambda: manager.states(units)))
    row("  systemctl show of them", await median(runs, lambda: systemctl("show", "--", *units)))
    row("detail of one unit", await median(runs, lambda: manager.detail("dbus.service")))
    row("  systemctl show of it", await median(runs, lambda: systemctl("show", "dbus.service")))
    times: dict[str, list[float]] = {}
    for _ in range(runs):  # in turns, so that both meet the same noise
        for what, act in (
            ("start", lambda: manager.job("start", UNIT)),
            ("stop", lambda: manager.job("stop", UNIT)),
            ("  systemctl start", lambda: systemctl("start", UNIT)),
            ("  systemctl stop", lambda: systemctl("stop", UNIT)),
        ):
            start = time.perf_counter()
            await act()
            times.setdefault(what, []).append(since(start))
    for what, found in times.items():
        row(what, statistics.median(found))
    row("memory in the end", resident(), "KiB")
    await manager.close()


if __name__ == "__main__":
    FILE.write_text(TEXT)
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    try:
        asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 50))
    finally:
        FILE.unlink()
        subprocess.run(["systemctl", "daemon-reload"], check=True)
