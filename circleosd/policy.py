"""Who may do what: roles, grants and the one decision. Pure functions of values."""

from __future__ import annotations

from enum import StrEnum
from fnmatch import fnmatchcase
from typing import NamedTuple

from circleosd.errors import Denied


class Role(StrEnum):
    """What a user may do everywhere; each role includes the ones before it."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"


class Access(StrEnum):
    """What an action needs. `ANYONE` is whoever may connect to the socket."""

    ANYONE = "anyone"
    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"


_RANK: dict[str, int] = {"anyone": 0, "viewer": 1, "operator": 2, "admin": 3}


class Grant(NamedTuple):
    """Permission for `verb` (such as `service:restart`) on the objects that match the glob `object`."""

    verb: str
    object: str

    def covers(self, verb: str, name: str) -> bool:
        """Whether this grant allows `verb` on the object `name`. Globs are those of fnmatch(3), case-sensitive."""
        return fnmatchcase(verb, self.verb) and fnmatchcase(name, self.object)


class Peer(NamedTuple):
    """The process at the other end of a connection, as the kernel names it (SO_PEERCRED, unix(7))."""

    uid: int
    gid: int
    pid: int


class Caller(NamedTuple):
    """Who makes a request: the kernel's word about the process and, where there is one, the CircleOSD user.

    `role` is the higher of what the uid and the user give; None is a stranger.
    """

    peer: Peer
    role: Role | None = None
    user: str | None = None
    session: str | None = None
    grants: tuple[Grant, ...] = ()

    def __str__(self) -> str:
        return f"{self.user} (uid {self.peer.uid})" if self.user else f"uid {self.peer.uid}"


def higher(one: Role | None, other: Role | None) -> Role | None:
    """The role that allows more."""
    return max((one, other), key=lambda role: _RANK[role] if role else 0)


def role_of_uid(uid: int, own_uid: int) -> Role | None:
    """What the kernel's word alone gives: root and the uid that runs the service are admin."""
    return Role.ADMIN if uid in (0, own_uid) else None


def authorize(caller: Caller, access: Access, verb: str, name: str | None) -> None:
    """Return if `caller` may do `verb` on the object `name` (None: no object), which needs `access`.

    Raises `Denied` with what is missing. Default is to deny.
    """
    held = _RANK[caller.role] if caller.role else 0
    if held >= _RANK[access]:
        return
    if name is not None and any(grant.covers(verb, name) for grant in caller.grants):
        return
    what = f"{verb} {name}" if name is not None else verb
    has = f"has the role {caller.role}" if caller.role else "has no role here"
    raise Denied(f"{what} needs the role {access}, and {caller} {has}")
