"""Who may do what, as a function of values."""

from __future__ import annotations

import pytest

from circleosd.errors import Denied
from circleosd.policy import Access, Caller, Grant, Peer, Role, authorize, higher, role_of_uid

PEER = Peer(uid=1000, gid=1000, pid=1)


@pytest.mark.parametrize("access", Access)
@pytest.mark.parametrize("role", [None, *Role])
def test_a_role_includes_the_ones_before_it(role: Role | None, access: Access) -> None:
    order = [None, "viewer", "operator", "admin"]
    needed = {"anyone": 0, "viewer": 1, "operator": 2, "admin": 3}[access]
    caller = Caller(PEER, role)
    if order.index(role) >= needed:
        authorize(caller, access, "service:stop", "nginx")
    else:
        with pytest.raises(Denied, match=f"needs the role {access}"):
            authorize(caller, access, "service:stop", "nginx")


def test_a_grant_allows_its_verb_on_its_objects_and_nothing_else() -> None:
    caller = Caller(PEER, grants=(Grant("service:restart", "web-*"),))
    authorize(caller, Access.OPERATOR, "service:restart", "web-1")
    for verb, name in [("service:stop", "web-1"), ("service:restart", "db"), ("service:restart", "xweb-1")]:
        with pytest.raises(Denied):
            authorize(caller, Access.OPERATOR, verb, name)


def test_a_grant_on_every_object_is_no_right_to_an_action_without_one() -> None:
    with pytest.raises(Denied):
        authorize(Caller(PEER, grants=(Grant("*", "*"),)), Access.ADMIN, "user:list", None)


def test_only_root_and_the_own_uid_are_admin_by_uid() -> None:
    assert role_of_uid(0, 500) is Role.ADMIN
    assert role_of_uid(500, 500) is Role.ADMIN
    assert role_of_uid(501, 500) is None


def test_the_higher_role_counts() -> None:
    assert higher(None, Role.VIEWER) is Role.VIEWER
    assert higher(Role.ADMIN, Role.VIEWER) is Role.ADMIN
    assert higher(None, None) is None
