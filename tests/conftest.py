"""Tests run side by side in several processes (pytest-xdist), but for those that measure the machine: each alone.

A test in a directory `alone`, or marked so, begins when the tests of the other processes have ended, and holds back
their next ones; several of them in a row are not interrupted. Every test holds the lock on `ROOM`, shared or not
(flock(2)). The way to it is by that on `GATE`, so that who waits for the room is not overtaken for ever. Both are files
that are there anyway.

One process runs the directories `alone`, before all else: later each test would wait until a long one of every process
has ended. Any other file is for one process.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final

import pytest

TESTS: Final = Path(__file__).parent
ALONE: Final = "alone"
GATE: Final = TESTS / "conftest.py"
ROOM: Final = TESTS / "__init__.py"
LONGEST: Final = (
    "systemd/test_deb.py",
    "integration/test_plugin_store.py",
    "integration/test_crash.py",
    "integration/test_lifecycle.py",
    "integration/test_plugin_failures.py",
    "integration/test_plugin_capabilities.py",
    "unit/test_linters.py",
    "systemd/test_scenario.py",
    "systemd/test_inside.py",
    "systemd/test_native_form.py",
    "systemd/test_container.py",
)


class Turns:
    """The turns of one of the processes that run tests."""

    def __init__(self) -> None:
        self._gate = GATE.open("rb")
        self._room = ROOM.open("rb")
        self._alone = False
        self._first = True

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        """Wait for the test's turn: outside of its time limit, and with its fixtures within the turn."""
        if self._first and not together(item):
            time.sleep(0.3)  # so that those, if there are any, are before it at the gate
        self._first = False
        if not self._alone:
            self._alone = alone(item)
            fcntl.flock(self._gate, fcntl.LOCK_EX)
            fcntl.flock(self._room, fcntl.LOCK_EX if self._alone else fcntl.LOCK_SH)
            fcntl.flock(self._gate, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            self._alone = self._alone and nextitem is not None and alone(nextitem)
            if not self._alone:
                fcntl.flock(self._room, fcntl.LOCK_UN)

    def pytest_unconfigure(self) -> None:
        self._gate.close()
        self._room.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file is for one process: the run would end with that process if a long one came late.

    What is to be alone begins, in its file and with its file.
    """
    longest = {TESTS / name: place for place, name in enumerate(LONGEST)}
    waits = {item.path for item in items if alone(item)}
    files = {item.path: place for place, item in enumerate(reversed(items))}

    def place(item: pytest.Item) -> tuple[int, int, int, bool]:
        kind = 0 if together(item) else 1 if item.path in waits else 2
        return kind, longest.get(item.path, len(longest)), -files[item.path], not alone(item)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What `--dist loadfile` does, with the directories `alone` as if they were one file."""
    from xdist.scheduler import LoadFileScheduling

    scheduler = LoadFileScheduling(config, log)
    file = scheduler._split_scope
    scheduler._split_scope = lambda nodeid: ALONE if ALONE in file(nodeid).split("/")[:-1] else file(nodeid)
    return scheduler


def alone(item: pytest.Item) -> bool:
    return together(item) or item.get_closest_marker(ALONE) is not None


def together(item: pytest.Item) -> bool:
    """Whether it is in a directory `alone`."""
    return item.path.parent.name == ALONE


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "alone: measures the machine, so no other test runs meanwhile")
    if hasattr(config, "workerinput"):  # one of several processes
        config.pluginmanager.register(Turns())
