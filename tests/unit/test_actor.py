"""What a row says of who acted."""

from __future__ import annotations

import io
import os

import pytest

from circleosd.actor import actor
from circleosd.policy import Caller, Peer

MANAGED = "/user.slice/user-1000.slice/user@1000.service/app.slice"


def test_the_actor_is_told_with_program_unit_and_login_session() -> None:
    told = actor(Caller(Peer(os.getuid(), os.getgid(), os.getpid()), user="alice", session="s", plugin="p"))
    assert told["exe"] == os.readlink("/proc/self/exe")
    assert (told["user"], told["session"], told["plugin"]) == ("alice", "s", "p")
    for gone in (Peer(os.getuid(), os.getgid(), 2**22), Peer(os.getuid() + 1, 1, os.getpid())):
        told = actor(Caller(gone))
        assert (told["exe"], told["unit"], told["login"]) == (None, None, None)


@pytest.mark.parametrize(
    ("groups", "unit", "login"),
    [
        ("0::/", None, None),
        ("0::/system.slice/nginx.service", "nginx.service", None),
        ("0::/system.slice/nginx.service/worker", "nginx.service", None),
        ("0::/user.slice/user-1000.slice/session-3.scope", "session-3.scope", "3"),
        (f"0::{MANAGED}/a:b.service", "user@1000.service/a:b.service", None),
        ("2:cpu:/\n1:name=systemd:/user.slice/user-1000.slice/session-c1.scope", "session-c1.scope", "c1"),
        # units of the user's own manager, named by the user
        (f"0::{MANAGED}/session-7.scope", "user@1000.service/session-7.scope", None),
        (
            f"8:memory:/\n1:name=systemd:{MANAGED}/sshd.service\n0::{MANAGED}/sshd.service",
            "user@1000.service/sshd.service",
            None,
        ),
        (f"0::{MANAGED}/a.scope/b.service", "user@1000.service/b.service", None),
        ("0::/user.slice/user-1000.slice/session-3.scope/session-7.scope", "session-3.scope/session-7.scope", "3"),
    ],
)
def test_the_unit_of_an_actor_is_told_with_those_around_it_and_a_login_by_the_outermost(
    monkeypatch: pytest.MonkeyPatch, groups: str, unit: str | None, login: str | None
) -> None:
    def instead(path: str, **more: object) -> io.StringIO:
        return io.StringIO(f"{groups}\n" if path.endswith("/cgroup") else "Uid:\t7\t7\t7\t7\n")

    monkeypatch.setattr("circleosd.actor.open", instead, raising=False)
    told = actor(Caller(Peer(7, 7, 2**22)))
    assert (told["unit"], told["login"]) == (unit, login)
