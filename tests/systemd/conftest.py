"""A booted systemd for the tests here: this machine's own, or that of the tree in CIRCLEOSD_TEST_TREE."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.systemd.container import Container, leftovers, why_not
from tests.systemd.installed import install, package
from tests.systemd.machine import Machine

PROJECT = Path(__file__).parents[2]
PROJECT_INSIDE = "/src"


@pytest.fixture(scope="session")
def lower() -> str:
    """The root file system to boot. Skips where none can be booted; if CI is set and we are root, fails."""
    tree = os.environ.get("CIRCLEOSD_TEST_TREE") or "/"
    if reason := why_not(tree):
        if os.environ.get("CI") and os.geteuid() == 0:
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return tree


@pytest.fixture(scope="module")
def booted(lower: str, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A machine that has booted, one a module, with the project at /src, read-only."""
    module = request.module.__name__.rpartition(".")[2]
    name = f"{re.sub(r'[^a-z0-9]+', '-', module.lower())}-{os.getpid()}"
    with Container(name, lower, {str(PROJECT): PROJECT_INSIDE}) as container:
        machine = Machine(container)
        machine.start()
        yield machine
    assert leftovers(name) == []


@pytest.fixture(scope="session")
def deb(lower: str) -> Path:
    """The Debian package, built once a session."""
    return package()


@pytest.fixture(scope="module")
def installed(booted: Machine, deb: Path) -> Machine:
    """A machine with CircleOSD installed and started, and what nixos-test/scenario.py expects."""
    install(booted, deb)
    return booted
