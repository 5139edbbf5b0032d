"""The embedded mode: one foreground supervisor that stands in for systemd, to try CircleOSD without it.

It reads the unit files that systemd would, holds their sockets, starts a service on its first connection, and speaks
sd_listen_fds(3), sd_notify(3) and the watchdog. It runs services of Type simple, exec and notify, and does no more.
"""
