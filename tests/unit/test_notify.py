"""What a service takes from its manager about the watchdog (sd_watchdog_enabled(3))."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from circleosd.systemd.notify import Notifier

OWN = str(os.getpid())


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "20000000"}, 10.0),
        ({"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": OWN}, 10.0),
        ({"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_PID": OWN}, None),
    ],
)
def test_a_service_tells_that_it_is_alive_twice_as_often_as_it_must(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], seconds: float | None
) -> None:
    monkeypatch.setattr("circleosd.systemd.notify.SystemdNotifier", lambda: None)
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Notifier().watchdog_interval == seconds


def test_a_service_manager_is_told_how_the_service_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notifier = Notifier()
        notifier.ready("listening")
        notifier.status("one plugin")
        notifier.alive()
        notifier.stopping()
        told = [manager.recv(1024).decode() for _ in range(4)]
        notifier._notifier.socket.close()
    assert told == ["READY=1\nSTATUS=listening", "STATUS=one plugin", "WATCHDOG=1", "STOPPING=1\nSTATUS=exiting"]
