"""A booted systemd for the tests here: this machine's own, or that of the tree in CIRCLEOSD_TEST_TREE."""

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests import PROJECT
from tests.systemd.container import Container, leftovers, systemd_version, why_not
from tests.systemd.installed import install
from tests.systemd.machine import Machine

PROJECT_INSIDE = "/src"


def give_up(reason: str) -> NoReturn:
    """Skip what cannot be tested here. As root in CI it must be: there, fail."""
    if os.environ.get("CI") and os.geteuid() == 0:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def lower() -> str:
    """The root file system to boot. Gives up where none can be booted."""
    tree = os.environ.get("CIRCLEOSD_TEST_TREE") or "/"
    if reason := why_not(tree):
        give_up(reason)
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
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Debian package: CIRCLEOSD_TEST_DEB, or one built anew in this run. Gives up where none can be built."""
    if given := os.environ.get("CIRCLEOSD_TEST_DEB"):
        return Path(given)
    if not shutil.which("dpkg-deb") or not os.access("/usr/bin/python3", os.X_OK):
        give_up("a Debian package needs dpkg-deb and /usr/bin/python3 to be built")
    directory = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        directory = directory.parent  # which the processes of a run share (pytest-xdist)
    with (directory / "package.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (found := list(directory.glob("circleosd_*.deb"))):
            found = [Path(shutil.copy(build_package(), directory))]
    return found[0]


def build_package(**environment: str) -> Path:
    """Build the Debian package in dist/."""
    variables = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    variables.update(environment)
    done = subprocess.run(["make", "deb"], cwd=PROJECT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (PROJECT / "dist").glob("circleosd_*.deb")
    return path


@pytest.fixture(scope="module")
def deb(booted: Machine, package: Path, lower: str) -> str:
    """Where the package is on the machine, which does not have it installed."""
    if "CIRCLEOSD_TEST_DEB" not in os.environ and systemd_version(lower) != systemd_version("/"):
        pytest.skip("the package is for this machine's distribution, and another one is booted; set CIRCLEOSD_TEST_DEB")
    booted.copy_from_host(str(package), "/tmp/circleosd.deb")
    return "/tmp/circleosd.deb"


@pytest.fixture(scope="module")
def installed(booted: Machine, package: Path) -> Machine:
    """A machine with CircleOSD installed and started, and what nixos-test/scenario.py expects."""
    install(booted, package)
    return booted
