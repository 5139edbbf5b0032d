"""A service as it is, but that gives requests in hand only a moment once it is told to end: `hasty_service.py NAME`."""

from __future__ import annotations

import sys

from circleosd import __main__, server

if __name__ == "__main__":
    server.SHUTDOWN = 0.5
    sys.exit(__main__.run(sys.argv[1:]))
