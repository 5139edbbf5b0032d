"""Fixtures of the integration tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

from tests.integration import attacks
from tests.integration.embedded_host import CHEAP, EmbeddedHost

NewHost = Callable[[Mapping[str, str]], EmbeddedHost]


@pytest.fixture(scope="module")
def host() -> Iterator[EmbeddedHost]:
    """One running CircleOSD for the tests of a module, open to processes of every uid."""
    for host in running({}):
        host.open_to_everybody()
        yield host


@pytest.fixture(scope="module")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[attacks.Paced]:
    """A host with a well-behaved plugin that is called all the time."""
    for host in running(attacks.SETTINGS):
        paced = attacks.Paced(host, tmp_path_factory.mktemp("plugins"))
        yield paced
        paced.close()


@pytest.fixture
def other_users() -> None:
    """The test acts as other Unix users. Skips without root."""
    if os.geteuid() != 0:
        pytest.skip("needs root: it acts as other Unix users")


@pytest.fixture
def new_host() -> Iterator[NewHost]:
    """Makes running hosts with settings of one's own."""
    made: list[Iterator[EmbeddedHost]] = []

    def make(settings: Mapping[str, str]) -> EmbeddedHost:
        one = running(settings)
        made.append(one)
        return next(one)

    yield make
    for one in made:
        assert next(one, None) is None


def running(settings: Mapping[str, str], wrapper: Sequence[str] = ()) -> Iterator[EmbeddedHost]:
    """A host whose passwords cost little: it runs while it is in use, and must have left nothing behind then."""
    host = EmbeddedHost({**CHEAP, **settings}, wrapper)
    try:
        host.start()
        yield host
        if host.process:
            assert host.stop() == 0, host.log
        left = host.processes()
        assert left == [], f"processes were left behind: {left}\n{host.log}"
        assert "Traceback" not in host.log, host.log
    finally:
        if host.process:
            host.process.kill()
            host.process.wait()
        shutil.rmtree(host.directory)
