"""Calls a plugin at a steady pace: `pacer.py SOCKET PLUGIN FUNCTION RATE`. One JSON line a call on standard output."""

from __future__ import annotations

import json
import socket
import sys
import time


def main(path: str, plugin: str, function: str, rate: float) -> None:
    """Each line has `at` (monotonic seconds), `took` (seconds) and `reply`: what came instead of the right one.

    A call that is late, because the one before it took so long, counts from when it was due.
    """
    request = {"action": "invoke", "id": plugin, "func": function, "payload": "steady"}
    line = json.dumps(request).encode() + b"\n"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(path)
        due = time.monotonic()
        while True:
            began = time.monotonic()
            sock.sendall(line)
            reply = b""
            while not reply.endswith(b"\n"):
                piece = sock.recv(65536)
                if not piece:
                    break
                reply += piece
            took = time.monotonic() - min(due, began)
            wrong = None if b'"data":"steady"' in reply else reply.decode("utf-8", "replace")
            print(json.dumps({"at": began, "took": took, "reply": wrong}), flush=True)
            if not reply:
                return
            due = max(due + 1 / rate, time.monotonic() - 1)
            time.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]))
