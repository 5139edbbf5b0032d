"""Very many users and sessions, and very many logins at once: what bench/verify.py measures, held to its bounds."""

from __future__ import annotations

import pytest

from bench import verify
from circleosd.config import AuthSettings
from tests.integration.conftest import NewHost
from tests.integration.embedded_host import COSTLY, EmbeddedHost

MIB = 2**20


@pytest.fixture
def host(new_host: NewHost) -> EmbeddedHost:
    host = new_host(COSTLY)
    host.data(verify.AUTH, "create", name="storm", password=verify.PASSWORD)
    return host


def test_verify_takes_as_long_with_very_many_users_as_with_ten(host: EmbeddedHost) -> None:
    few_sessions = verify.restart_with(host, verify.FEW, 1)
    # The fastest of several: what a busy machine adds is in neither.
    few = min(verify.verifications(host, few_sessions, 200).median for _ in range(3))
    sessions = verify.restart_with(host, verify.USERS, verify.SESSIONS_EACH)
    many = min(verify.verifications(host, sessions, 200).median for _ in range(3))
    assert sessions == 100_000
    assert many <= 1.5 * few, f"{many:.2f} ms with {sessions} sessions, {few:.2f} ms with {few_sessions}"
    assert verify.memory(host) < 60 * MIB


def test_a_storm_of_logins_leaves_verify_answering_and_memory_bounded(host: EmbeddedHost) -> None:
    sessions = verify.restart_with(host, verify.FEW, 1)
    host.data(verify.AUTH, "login", name="storm", password=verify.PASSWORD)  # what the first one imports stays
    quiet = verify.memory(host)
    storms = []
    for _ in range(3):  # what a busy machine adds is not in every one
        storms.append(verify.storm(host, sessions, logins=24))
        if storms[-1].verify.p99 <= 50:
            break
    last = storms[-1]
    assert last.refused == 0
    assert last.verify.p99 <= 50, storms
    hashing = AuthSettings().hashing * AuthSettings().hash_memory * 1024
    assert max(storm.memory for storm in storms) <= quiet + hashing + 12 * MIB
    assert verify.memory(host) <= quiet + 12 * MIB, "what hashing took is given back"
