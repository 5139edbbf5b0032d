"""Warm `invoke` against the floor under it: `python bench/invoke.py [SECONDS]`.

One client on one connection, with the process boundary between manager and worker in place. The floor is a bare
asyncio server on a Unix socket that answers each line with a line, measured in the same run, turn by turn with the
plugin: as it is (echo), or parsed and printed (JSON), as every JSON service must.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.integration.embedded_host import EmbeddedHost
from tests.integration.made import ECHO, core, write

CASES = ((64, 4.0, False), (4096, 5.0, False), (1 << 20, 4.0, True))  # bytes, times the floor, whether that is JSON
ROUNDS = 10


@contextmanager
def bare_server(*, parses: bool) -> Iterator[str]:
    """A process with nothing but asyncio; yields the path of its socket."""
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/socket"
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                asyncio.run(_serve(path, writing, parses=parses))
            finally:
                os._exit(0)
        os.close(writing)
        os.read(reading, 1)
        os.close(reading)
        try:
            yield path
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)


async def _serve(path: str, ready: int, *, parses: bool) -> None:
    """Answers each line with a line of the same length: as it is, or parsed and printed."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            if parses:
                line = json.dumps(json.loads(line), ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
            writer.write(line)
            await writer.drain()

    server = await asyncio.start_unix_server(answer, path, limit=16 << 20)
    os.write(ready, b".")
    await server.serve_forever()


class Client:
    """One connection, one request at a time."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._buffer = bytearray(4 << 20)
        self._view = memoryview(self._buffer)

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
    """Median seconds of a round trip, and of an invoke the 99th percentile too."""

    echo: float
    json: float
    invoke: float
    p99: float


def measure(plugin: Client, size: int, seconds: float) -> Measured:
    text = ("lorem ipsum dolor " * (size // 18 + 1))[:size]
    line = json.dumps({"action": "invoke", "id": "bench", "func": "echo", "payload": text}).encode() + b"\n"
    with bare_server(parses=False) as echo, bare_server(parses=True) as parsing:
        clients = (Client(echo), Client(parsing), plugin)
        times: tuple[list[float], ...] = ([], [], [])
        for client in clients:
            client.times(line, seconds / ROUNDS)  # warms up
        assert plugin.trip(line) > size
        for _ in range(ROUNDS):
            for client, found in zip(clients, times, strict=True):
                found += client.times(line, seconds / ROUNDS)
    echo_median, json_median, invoke_median = map(statistics.median, times)
    return Measured(echo_median, json_median, invoke_median, statistics.quantiles(times[2], n=100)[98])


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    arguments.add_argument("seconds", type=float, nargs="?", default=2.0, help="for each of the three, for each size")
    seconds = arguments.parse_args().seconds
    host = EmbeddedHost({})
    missed = 0
    try:
        host.start()
        with tempfile.TemporaryDirectory() as directory:
            path = write(Path(directory), "bench", core(ECHO), limits={"output": 2 << 20, "memory": 8 << 20})
            host.ok("plugin", "load", str(path))
        plugin = Client(str(host.runtime / "plugin-manager.sock"))
        print("bytes       echo      JSON    invoke       p99  × echo  × JSON   goal")
        for size, goal, parses in CASES:
            found = measure(plugin, size, seconds)
            ratio = found.invoke / (found.json if parses else found.echo)
            missed += ratio > goal
            times = " ".join(f"{value * 1e6:>6.0f} µs" for value in found)
            against = f"{found.invoke / found.echo:>7.2f} {found.invoke / found.json:>7.2f}"
            print(f"{size:<7} {times} {against} {goal:>4.0f} × {'JSON' if parses else 'echo'}")
        return 1 if missed else 0
    finally:
        host.stop()


if __name__ == "__main__":
    sys.exit(main())
