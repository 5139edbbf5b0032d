"""The floor under a service: `python -m bench.bare_server PATH [--parse]`, nothing but asyncio on a Unix socket.

It answers each line with a line: as it is, or parsed and printed, as every JSON service must.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 16 << 20


@contextmanager
def bare_server(*, parses: bool) -> Iterator[str]:
    """Run it as a process of its own, started as a service would be; yields the path of its socket."""
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/socket"
        command = [sys.executable, "-m", "bench.bare_server", path, *(["--parse"] if parses else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n"
                yield path
            finally:
                process.kill()


async def _serve(path: str, *, parses: bool) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            if parses:
                line = json.dumps(json.loads(line), ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
            writer.write(line)
            await writer.drain()

    server = await asyncio.start_unix_server(answer, path, limit=LONGEST)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], parses="--parse" in sys.argv))
