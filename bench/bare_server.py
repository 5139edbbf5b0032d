"""The floor under a service: `python -m bench.bare_server PATH [--parse] [--of PATH]`, only asyncio on a Unix socket.

It answers each line with a line: as it is, or parsed and printed, as every JSON service must. With `--of`, the line
goes on to another such server, whose answer it is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 16 << 20


@contextmanager
def bare_server(*options: str) -> Iterator[str]:
    """Run it as a process of its own, started as a service would be; yields the path of its socket."""
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/socket"
        command = [sys.executable, "-m", "bench.bare_server", path, *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n"
                yield path
            finally:
                process.kill()


async def _serve(path: str, *, parses: bool, behind: str | None) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if behind:
            answers, asked = await asyncio.open_unix_connection(behind, limit=LONGEST)
        while line := await reader.readline():
            if behind:
                asked.write(line)
                line = await answers.readline()
            if parses:
                line = json.dumps(json.loads(line), ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
            writer.write(line)
            await writer.drain()

    server = await asyncio.start_unix_server(answer, path, limit=LONGEST)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("path")
    options.add_argument("--parse", action="store_true")
    options.add_argument("--of")
    given = options.parse_args()
    asyncio.run(_serve(given.path, parses=given.parse, behind=given.of))
