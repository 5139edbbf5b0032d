"""What verifying a token costs, with few and with very many users, and during a storm of logins.

`python -m bench.verify` prints the figures; tests/integration/alone/test_scale.py holds the service to them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sqlite3
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from circleosd.config import AuthSettings
from tests.integration.embedded_host import COSTLY, EmbeddedHost

AUTH = "auth-service"
PASSWORD = "a long enough one"
FEW, USERS, SESSIONS_EACH = 10, 10_000, 10
VERIFICATIONS = 3000
LOGINS = 50


@dataclass(frozen=True)
class Times:
    """Durations of many requests, in milliseconds."""

    median: float
    p99: float
    longest: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        ordered = sorted(seconds)
        return cls(
            *(1000 * item for item in (statistics.median(ordered), ordered[int(len(ordered) * 0.99)], ordered[-1]))
        )

    def __str__(self) -> str:
        return f"median {self.median:.2f} ms, p99 {self.p99:.2f} ms, longest {self.longest:.2f} ms"


@dataclass(frozen=True)
class Storm:
    """Many logins at once: how long they took, and what was meanwhile verified and used. Memory in bytes.

    `login` is how long each took without the wait for its turn, in milliseconds.
    """

    seconds: float
    login: float
    verify: Times
    verifications: int
    memory: int
    refused: int


def token_of(number: int) -> str:
    """The token of the session of that number, as `fill` makes them."""
    return f"bench-token-{number:08d}-{'x' * 20}"


def fill(host: EmbeddedHost, users: int, sessions_each: int) -> int:
    """Put users and sessions into the database of a host that is stopped; return the number of sessions."""
    now, uid = time.time(), os.getuid()
    connection = sqlite3.connect(host.database("auth"))
    with connection:
        connection.executemany(
            "INSERT OR IGNORE INTO users (name, password, role, created) VALUES (?, '$argon2id$none', 'viewer', ?)",
            ((f"user{number}", now) for number in range(users)),
        )
        connection.executemany(
            "INSERT OR IGNORE INTO sessions (hash, id, user, uid, created, used, expires) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                (
                    hashlib.sha256(token_of(number).encode()).digest(),
                    f"{number:012x}",
                    f"user{number % users}",
                    uid,
                    now,
                    now,
                    now + 36000,
                )
                for number in range(users * sessions_each)
            ),
        )
    connection.close()
    return users * sessions_each


class Verifier:
    """A connection on which tokens are verified one after another."""

    def __init__(self, host: EmbeddedHost) -> None:
        self._sock: socket.socket = host.connect(AUTH)
        self._replies = self._sock.makefile("rb")

    def verify(self, number: int) -> float:
        """Verify the token of a session; return the seconds that it took."""
        line = json.dumps({"action": "verify", "presented": token_of(number)}).encode() + b"\n"
        begun = time.perf_counter()
        self._sock.sendall(line)
        reply = self._replies.readline()
        seconds = time.perf_counter() - begun
        assert b'"ok":true' in reply, reply
        return seconds

    def close(self) -> None:
        self._replies.close()
        self._sock.close()


def in_turn(hosts: Sequence[tuple[EmbeddedHost, int]], number: int = VERIFICATIONS) -> list[Times]:
    """Verify so many tokens on each of some hosts, of which each has so many sessions.

    The hosts take turns, so that what else the machine does slows down all of them. The tokens are all over the table,
    each the next but 7919, so that no two are neighbors.
    """
    verifiers = [(Verifier(host), sessions, list[float]()) for host, sessions in hosts]
    try:
        for each in range(200 + number):
            for verifier, sessions, times in verifiers:
                times.append(verifier.verify(each * 7919 % sessions))
        return [Times.of(times[200:]) for _, _, times in verifiers]
    finally:
        for verifier, _, _ in verifiers:
            verifier.close()


def memory(host: EmbeddedHost) -> int:
    """Resident bytes of auth-service."""
    return int(host.data(AUTH, "health")["memory"])


def storm(host: EmbeddedHost, sessions: int, logins: int = LOGINS) -> Storm:
    """Log in so many times at once, verifying all the while, every few milliseconds."""
    pid, refused = host.pid(AUTH), []
    ready = threading.Barrier(logins + 1)

    def log_in() -> None:
        with host.connect(AUTH, 120) as sock, sock.makefile("rb") as replies:
            ready.wait()
            sock.sendall(json.dumps({"action": "login", "name": "storm", "password": PASSWORD}).encode() + b"\n")
            if b'"ok":true' not in (reply := replies.readline()):
                refused.append(reply)

    threads = [threading.Thread(target=log_in) for _ in range(logins)]
    for thread in threads:
        thread.start()
    verifier, times, most = Verifier(host), list[float](), 0
    verifier.verify(0)
    ready.wait()
    begun = time.perf_counter()
    while any(thread.is_alive() for thread in threads):
        times.append(verifier.verify(len(times) * 7919 % sessions))
        most = max(most, int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        time.sleep(0.003)  # the pace of the verifications
    seconds = time.perf_counter() - begun
    verifier.close()
    for thread in threads:
        thread.join()
    login = 1000 * seconds * AuthSettings().hashing / logins
    return Storm(seconds, login, Times.of(times), len(times), most, len(refused))


def restart_with(host: EmbeddedHost, users: int, sessions_each: int) -> int:
    """Stop, fill and start a host; return the number of sessions there are to verify."""
    host.data(AUTH, "health")
    host.stop()
    sessions = fill(host, users, sessions_each)
    host.start()
    return sessions


def main() -> None:
    """Measure, and print the figures."""
    host, large = EmbeddedHost(COSTLY), EmbeddedHost(COSTLY)
    try:
        host.start()
        large.start()
        host.data(AUTH, "create", name="storm", password=PASSWORD)
        few, sessions = restart_with(host, FEW, 1), restart_with(large, USERS, SESSIONS_EACH)
        small, big = in_turn([(host, few), (large, sessions)])
        print(f"verify, {FEW} users and sessions: {small}; memory {memory(host) / 2**20:.1f} MiB")
        print(f"verify, {USERS} users and {sessions} sessions: {big}; memory {memory(large) / 2**20:.1f} MiB")
        print(f"ratio of the medians: {big.median / small.median:.2f}")
        one = time.perf_counter()
        host.data(AUTH, "login", name="storm", password=PASSWORD)
        print(f"one login: {1000 * (time.perf_counter() - one):.0f} ms")
        stormy = storm(host, few)
        print(
            f"{LOGINS} logins at once: all done in {stormy.seconds:.2f} s, each in {stormy.login:.0f} ms, "
            f"{stormy.refused} refused; "
            f"{stormy.verifications} verifications meanwhile: {stormy.verify}; "
            f"memory up to {stormy.memory / 2**20:.1f} MiB, afterwards {memory(host) / 2**20:.1f} MiB"
        )
    finally:
        for each in (host, large):
            if each.process:
                each.stop()
            shutil.rmtree(each.directory)


if __name__ == "__main__":
    main()
