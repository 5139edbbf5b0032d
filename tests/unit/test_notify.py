"""What a service takes from its manager about the watchdog (sd_watchdog_enabled(3))."""

from __future__ import annotations

import os

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
