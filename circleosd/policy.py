"""Who may do what: roles, rules and the one decision. Pure functions of values."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from enum import StrEnum
from fnmatch import translate
from functools import lru_cache
from typing import NamedTuple

from circleosd.errors import Denied
from circleosd.steering import word


class Role(StrEnum):
    """What a user may do everywhere; each role includes the previous ones."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"


class Access(StrEnum):
    """What an action needs. `ANYONE` is anybody who may connect to the socket."""

    ANYONE = "anyone"
    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"


_RANK: dict[str, int] = {access: rank for rank, access in enumerate(Access)}


_Matches = Callable[[str], re.Match[str] | None]


@lru_cache(4096)  # on Python 3.11, the cache of fnmatch is too small for the rules of one user, with two globs each
def _matches(glob: str) -> _Matches:
    return re.compile(translate(glob)).match


class Grant(NamedTuple):
    """A rule about `verb` (such as `service:restart`) on the objects that match the glob `object`.

    Both are globs of fnmatch(3), case-sensitive. The rule allows, or with `deny` denies, whatever else allows.
    """

    verb: str
    object: str
    deny: bool = False

    def covers(self, verb: str, name: str | None) -> bool:
        """Whether this is a rule about `verb` on the object `name`; without an object, one about all of them."""
        if not _matches(self.verb)(verb):
            return False
        return not self.object.strip("*") if name is None else _matches(self.object)(name) is not None

    def __str__(self) -> str:
        return f"{'deny' if self.deny else 'allow'} {self.verb} {self.object}"


class Peer(NamedTuple):
    """The process at the other end of a connection, as identified by the kernel (SO_PEERCRED, unix(7)).

    A negative uid belongs to nobody: it stands for a user that a question is about.
    """

    uid: int
    gid: int
    pid: int


class Caller(NamedTuple):
    """The caller of a request: the kernel's information about the process and, if there is one, the CircleOSD user.

    `role` is the higher of those of the uid and of the user; None is a stranger. `privileged`: the uid alone makes it
    admin, so no rule applies to it and nobody can lock it out. `vouches`: it is CircleOSD itself, and may state on
    behalf of which plugin it acts; that is `plugin`.
    """

    peer: Peer
    role: Role | None = None
    user: str | None = None
    session: str | None = None
    grants: tuple[Grant, ...] = ()
    privileged: bool = False
    vouches: bool = False
    plugin: str | None = None

    @property
    def bounded(self) -> int | None:
        """The uid to which limits per uid apply; None for a caller who is admin by the uid."""
        return None if self.privileged else self.peer.uid

    def __str__(self) -> str:
        if self.plugin is not None:
            return f"the plugin {self.plugin}"
        if self.user is None:
            return f"uid {self.peer.uid}"
        return f"{self.user} (uid {self.peer.uid})" if self.peer.uid >= 0 else self.user


class Decision(NamedTuple):
    """An answer: `why` says in a sentence what decided, `rule` is the rule that decided, if one did."""

    allowed: bool
    why: str
    rule: Grant | None = None


def higher(one: Role | None, other: Role | None) -> Role | None:
    """The role that allows more."""
    return max((one, other), key=lambda role: _RANK[role] if role else 0)


def suffices(role: Role | None, access: Access) -> bool:
    """Whether a role gives what an action needs."""
    return (_RANK[role] if role else 0) >= _RANK[access]


def role_of_uid(uid: int, own_uid: int) -> Role | None:
    """The role by the uid alone: root and the uid that runs the service are admin."""
    return Role.ADMIN if uid in (0, own_uid) else None


def decide(
    caller: Caller,
    access: Access,
    verb: str,
    name: str | None,
    *,
    own: bool = False,
    among: Collection[str] = (),
) -> Decision:
    """Whether `caller` may do `verb` on the object `name` (None: no object), which needs `access`.

    `own`: users may do it to the object with their own name. `among`, for listings: a rule that allows one of these
    verbs on the object, or on any object if there is none, is enough to see the listing; `sees` decides which rows are
    shown. In this order: the uid, what anyone may do, a rule that denies, the role, what is one's own, a rule that
    allows. The default is to deny.
    """
    what = f"{verb} {word(name)}" if name is not None else verb
    if caller.privileged:
        return Decision(True, f"uid {caller.peer.uid} is always admin; no rule applies to it")
    if access is Access.ANYONE:  # even a stranger, so a rule could not stop a user
        return Decision(True, f"anyone may do {verb}")
    for rule in caller.grants:
        if rule.deny and rule.covers(verb, name):
            return Decision(False, f"{what} is denied to {caller} by the rule: {rule}", rule)
    if suffices(caller.role, access):
        return Decision(True, f"{verb} needs the role {access}, and {caller} has the role {caller.role}")
    if own and name is not None and name == caller.user:
        return Decision(True, f"{caller.user} may do {verb} for their own user")
    verbs = among if name is None else (verb, *among)
    for rule in caller.grants:
        if rule.deny or not (name is None or _matches(rule.object)(name)):  # most rules are about other objects
            continue
        if any(map(_matches(rule.verb), verbs)):
            return Decision(True, f"{what} is allowed to {caller} by the rule: {rule}", rule)
    has = f"has the role {caller.role}" if caller.role else "has no role here"
    return Decision(False, f"{what} needs the role {access}, but {caller} {has}")


def sees(caller: Caller, access: Access, verb: str, name: str, *, among: Collection[str]) -> bool:
    """Whether the listing `verb`, which needs `access`, shows `caller` the object `name`.

    Callers without the role see the objects on which a rule allows one of the verbs in `among`.
    """
    if caller.privileged:
        return True
    denied, allowed = _of_listing(caller.grants, verb, tuple(among))
    if any(matches(name) for matches in denied):
        return False
    return suffices(caller.role, access) or any(matches(name) for matches in allowed)


@lru_cache(64)  # for all rows of a listing: there may be thousands of them, and hundreds of rules
def _of_listing(grants: tuple[Grant, ...], verb: str, among: tuple[str, ...]) -> tuple[list[_Matches], list[_Matches]]:
    """The objects on which these rules deny a listing, and those on which they allow one of the verbs in `among`."""
    denied = [_matches(rule.object) for rule in grants if rule.deny and _matches(rule.verb)(verb)]
    allowed = [_matches(rule.object) for rule in grants if not rule.deny and any(map(_matches(rule.verb), among))]
    return denied, allowed


def authorize(
    caller: Caller, access: Access, verb: str, name: str | None, *, own: bool = False, among: Collection[str] = ()
) -> None:
    """Return if `decide` allows. Raises `Denied` with why not."""
    if caller.privileged:  # the first case of `decide`, without the sentence
        return
    decision = decide(caller, access, verb, name, own=own, among=among)
    if not decision.allowed:
        raise Denied(decision.why)
