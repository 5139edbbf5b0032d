"""Very many users and sessions, and very many logins at once: what bench/verify.py measures, held to its bounds."""

from __future__ import annotations

from bench import verify
from circleosd.config import AuthSettings
from tests.integration.conftest import NewHost
from tests.integration.embedded_host import COSTLY
from tests.measuring import once_it_holds

MIB = 2**20


def test_verify_takes_about_as_long_with_very_many_users_as_with_ten(new_host: NewHost) -> None:
    small, large = new_host({}), new_host({})
    hosts = [(small, verify.restart_with(small, verify.FEW, 1))]
    hosts.append((large, verify.restart_with(large, verify.USERS, verify.SESSIONS_EACH)))
    assert hosts[1][1] == 100_000

    def ratio() -> float:
        few, many = verify.in_turn(hosts, 200)
        return many.median / few.median

    once_it_holds(ratio, lambda ratio: ratio <= 1.5)
    assert verify.memory(large) < 60 * MIB


def test_a_storm_of_logins_leaves_verify_answering_and_memory_bounded(new_host: NewHost) -> None:
    host = new_host(COSTLY)
    host.data(verify.AUTH, "create", name="storm", password=verify.PASSWORD)
    sessions = verify.restart_with(host, verify.FEW, 1)
    host.data(verify.AUTH, "login", name="storm", password=verify.PASSWORD)  # what the first one imports stays
    quiet = verify.memory(host)
    hashing = AuthSettings().hashing * AuthSettings().hash_memory * 1024

    def storm() -> verify.Storm:
        storm = verify.storm(host, sessions, logins=24)
        assert storm.refused == 0
        assert storm.memory <= quiet + hashing + 12 * MIB
        return storm

    # A thirtieth of it where nothing else runs.
    once_it_holds(storm, lambda storm: storm.verify.p99 <= storm.login / 4, tries=10)
    assert verify.memory(host) <= quiet + 12 * MIB, "what hashing took is given back"
