"""Messages to the service manager (sd_notify(3)). Without a service manager they are not sent."""

from __future__ import annotations

import os

from sdnotify import SystemdNotifier


class Notifier:
    """Reports the state of this service to the service manager."""

    def __init__(self) -> None:
        self._notifier = SystemdNotifier()
        # Half of the time after which the service manager would kill us, sd_watchdog_enabled(3); None: no watchdog.
        usec = int(os.environ.get("WATCHDOG_USEC", "0"))
        ours = os.environ.get("WATCHDOG_PID") in (None, str(os.getpid()))
        self.watchdog_interval: float | None = usec / 2e6 if usec and ours else None

    def ready(self, status: str) -> None:
        """The service is ready to answer requests."""
        self._notifier.notify(f"READY=1\nSTATUS={status}")

    def status(self, text: str) -> None:
        """One line about what the service is doing, shown by systemctl status."""
        self._notifier.notify(f"STATUS={text}")

    def alive(self) -> None:
        """The event loop is running."""
        self._notifier.notify("WATCHDOG=1")

    def stopping(self) -> None:
        """The service is shutting down."""
        self._notifier.notify("STOPPING=1\nSTATUS=exiting")
