"""What a worker costs: its start, its memory, its calls; each beside a floor measured in the same run.

    python -m bench.worker [ROUNDS]

The rows alternate within a round, so that a busy moment of the machine meets all of them; figures are medians
over rounds, with the best round in parentheses.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from circleosd.worker import frames
from tests import PROJECT
from tests.component_text import component
from tests.core_text import core
from tests.native_source import native
from tests.wasi_text import ECHO, command
from tests.worker_driver import Worker, start

SIZES = {"64 B": 64, "4 KiB": 4096, "1 MiB": 1 << 20}
# The floor: whole frames back, by the same means as the worker's, and nothing else.
BARE = """
import socket, sys
from circleosd.worker import frames
from circleosd.worker.channel import Channel
channel = Channel(socket.socket(fileno=int(sys.argv[1])))
while frame := channel.receive():
    channel.send(frames.RESULT, frame.call_id, frame.body)
"""


def row(name: str, values: list[float], unit: str, floor: list[float] | None = None) -> None:
    """Prints one line: median, best, and, above a floor, by how much."""
    median = statistics.median(values)
    above = f"  {median - statistics.median(floor):+8.1f}" if floor else ""
    print(f"{name:32} {median:9.1f} {unit} ({min(values):.1f}){above}")


def starts(rounds: int) -> None:
    """From spawning the process to READY, with the compilation at hand."""
    small, whole = core(), component()
    with start(small) as worker, start(whole) as other:
        worker.ready()
        other.ready()
    shared_object = native("")
    cases: dict[str, Callable[[], None]] = {
        "python -c pass": lambda: run("pass"),
        "python -c 'import wasmtime'": lambda: run("import wasmtime"),
        "core, cached": lambda: ready(start(small, worker.compiled, forked=False)),
        "core, compiled": lambda: ready(start(small, forked=False)),
        "component, cached": lambda: ready(start(whole, other.compiled, forked=False)),
        "native": lambda: ready(start(shared_object, plugin_type="native", forked=False)),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            times[name].append((time.perf_counter() - began) * 1e3)
    print("\nstart to ready, and beyond `import wasmtime`")
    for name, values in times.items():
        row(name, values, "ms", times["python -c 'import wasmtime'"])


def run(code: str) -> None:
    """One interpreter, start to end."""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT)


def ready(worker: Worker) -> None:
    """Until READY; the process is killed, for its end is not part of its start."""
    worker.ready()
    worker.process.kill()
    worker.close()


def calls(rounds: int) -> None:
    """Warm calls from a blocking client, and the worker's resident memory after them."""
    echo = core(memory="20", room=1 << 20)
    shared_object = native("")
    workers = {
        "core, fresh": (start(echo, forked=False), "echo"),
        "core, shared": (start(echo, instance="shared", forked=False), "echo"),
        "component, fresh": (start(component(), forked=False), "handle"),
        "component, shared": (start(component(), instance="shared", forked=False), "handle"),
        "wasi": (start(command(ECHO), forked=False), "handle"),
        "native": (start(shared_object, plugin_type="native", forked=False), "echo"),
    }
    ours, theirs = socket.socketpair()
    bare = subprocess.Popen([sys.executable, "-c", BARE, str(theirs.fileno())], cwd=PROJECT, pass_fds=[theirs.fileno()])
    theirs.close()
    peers = {"bare framed echo": (ours, "echo")}
    for name, (worker, function) in workers.items():
        worker.ready()
        peers[name] = (worker.connection, function)
    for label, size in SIZES.items():
        count = 300 if size < 1 << 20 else 10
        times: dict[str, list[float]] = {name: [] for name in peers}
        for _ in range(rounds):
            for name, (connection, function) in peers.items():
                request = frames.encode(frames.INVOKE, 1, frames.named_body(function, b"x" * size))
                times[name].append(call(connection, request, count) * 1e6)
        print(f"\nwarm call, {label}, and beyond the bare echo")
        for name, values in times.items():
            row(name, values, "µs", times["bare framed echo"])
    print("\nresident after the calls")
    for name, (worker, _) in workers.items():
        print(f"{name:32} {int(worker.status()['VmRSS'].split()[0]) / 1024:9.1f} MB")
        worker.close()
    ours.close()
    bare.wait()


def call(connection: socket.socket, request: bytes, count: int) -> float:
    """The median time of one round trip, in seconds."""
    buffer = memoryview(bytearray(2 << 20))
    times = []
    for _ in range(count):
        began = time.perf_counter()
        connection.sendall(request)
        received, wanted = 0, frames.HEADER.size
        while received < wanted:
            received += connection.recv_into(buffer[received:])
            if received >= frames.HEADER.size:
                length, kind, _ = frames.HEADER.unpack_from(buffer)
                assert kind == frames.RESULT
                wanted = frames.HEADER.size + length
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    starts(rounds)
    calls(rounds)
