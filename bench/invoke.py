"""Warm `invoke` against the floor under it: `python -m bench.invoke [SECONDS]`.

One client on one connection, with the process boundary between manager and worker in place. The floor is a bare
asyncio server on a Unix socket that answers each line with a line, measured in the same run, turn by turn with the
plugin: as it is (echo), as another such server answers it (relayed, with as many processes that wait for a CPU as a
call has), or parsed and printed (JSON), as every JSON service must.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal, NamedTuple, Self

from bench.bare_server import bare_server
from tests.core_text import core
from tests.integration.embedded_host import EmbeddedHost
from tests.integration.made import write

ROUNDS = 10


class Goal(NamedTuple):
    """A payload's bytes, and how many times which floor a call with it may take."""

    size: int
    times: float
    floor: Literal["relayed", "json"]


GOALS = (Goal(64, 1.5, "relayed"), Goal(4096, 1.5, "relayed"), Goal(1 << 20, 4.0, "json"))


class Client:
    """One connection, one request at a time."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._buffer = bytearray(4 << 20)
        self._view = memoryview(self._buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def trip(self, line: bytes) -> int:
        """Send a line, read the reply line; returns the length of the reply."""
        self._socket.sendall(line)
        count = 0
        while not count or self._buffer[count - 1] != 10:
            received = self._socket.recv_into(self._view[count:])
            assert received, "the connection ended"
            count += received
        return count

    def times(self, line: bytes, seconds: float) -> list[float]:
        """How long each of as many round trips took as fit in so many seconds."""
        found = []
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            self.trip(line)
            found.append(time.perf_counter() - start)
        return found


class Measured(NamedTuple):
    """Seconds of a round trip: the 5th percentile, as others had to wait, and of an invoke the 99th too."""

    echo: float
    relayed: float
    json: float
    invoke: float
    p99: float

    def ratio(self, goal: Goal) -> float:
        return self.invoke / (self.json if goal.floor == "json" else self.relayed)


def loaded(host: EmbeddedHost) -> Client:
    """Load a plugin that answers with its payload; a connection to the manager."""
    with tempfile.TemporaryDirectory() as directory:
        artifact = core(memory="20", room=1 << 20)
        path = write(Path(directory), "bench", artifact, limits={"output": 2 << 20, "memory": 8 << 20})
        host.ok("plugin", "load", str(path))
    return Client(str(host.runtime / "plugin-manager.sock"))


def measure(plugin: Client, size: int, seconds: float) -> Measured:
    """Call a plugin, and ask the servers, each for so many seconds."""
    text = ("lorem ipsum dolor " * (size // 18 + 1))[:size]
    line = json.dumps({"action": "invoke", "id": "bench", "func": "echo", "payload": text}).encode() + b"\n"
    with (
        bare_server() as first, bare_server("--of", first) as second, bare_server("--parse") as third,
        Client(first) as echoing, Client(second) as relaying, Client(third) as printing,
    ):  # fmt: skip
        clients = (echoing, relaying, printing, plugin)
        times: tuple[list[float], ...] = ([], [], [], [])
        for client in clients:
            client.times(line, seconds / ROUNDS)  # warms up
        assert plugin.trip(line) > size
        for _ in range(ROUNDS):
            for client, found in zip(clients, times, strict=True):
                found += client.times(line, seconds / ROUNDS)
    echo, relayed, parsed, invoked = (statistics.quantiles(found, n=20)[0] for found in times)
    return Measured(echo, relayed, parsed, invoked, statistics.quantiles(times[3], n=100)[98])


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    arguments.add_argument("seconds", type=float, nargs="?", default=2.0, help="for each of the four, for each size")
    seconds = arguments.parse_args().seconds
    host = EmbeddedHost({})
    missed = 0
    try:
        host.start()
        with loaded(host) as plugin:
            print("bytes       echo   relayed      JSON    invoke       p99  × echo   × rel.  × JSON   goal")
            for goal in GOALS:
                found = measure(plugin, goal.size, seconds)
                missed += found.ratio(goal) > goal.times
                times = " ".join(f"{value * 1e6:>6.0f} µs" for value in found)
                against = " ".join(f"{found.invoke / floor:>7.2f}" for floor in (found.echo, found.relayed, found.json))
                print(f"{goal.size:<7} {times} {against} {goal.times:>4g} × {goal.floor}")
        return 1 if missed else 0
    finally:
        host.stop()


if __name__ == "__main__":
    sys.exit(main())
