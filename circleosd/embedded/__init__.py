"""The embedded mode: one foreground supervisor that stands in for systemd, to try CircleOSD without it.

It reads systemd's unit files, and runs sockets and services of Type simple, exec and notify; it does no more.
"""
