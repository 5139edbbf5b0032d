"""The embedded mode: a supervisor in the foreground that replaces systemd, to try CircleOSD without it.

It reads systemd's unit files, and runs sockets and services of Type simple, exec and notify; nothing else.
"""
