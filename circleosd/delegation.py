"""Which rights a caller may pass on to a user or a plugin: never more than the caller's own.

Globs are those that the contracts allow: `*` and `?`, no brackets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from circleosd.errors import Denied
from circleosd.policy import Access, Caller, Grant, Role, suffices

# Rules may have hundreds of characters, and hundreds of rules of two users are compared with each other. So the set of
# possible positions within a glob is a number with one bit per position, and all positions advance at once.


def includes(outer: str, inner: str) -> bool:
    """Whether `outer` matches every text that the glob `inner` matches. If in doubt, the answer is no."""
    glob = _read(outer)
    places = glob.start
    for char in inner:  # only a star covers a star, and only what matches any character covers a question mark
        taking = 0 if char == "*" else glob.taking.get(char, glob.taking_any)
        places = glob.after(places, taking)
    return bool(places & glob.end)


def overlaps(one: str, other: str) -> bool:
    """Whether there is a text that both globs match."""
    glob = _read(one)
    places, characters = glob.start, glob.end - 1 & ~glob.stars
    for char in other:
        if char == "*":
            places = 2 * glob.end - (places & -places)  # from the first position on
            continue
        taking = characters if char == "?" else glob.taking.get(char, glob.taking_any)
        places = glob.after(places, taking)
    return bool(places & glob.end)


class _Glob(NamedTuple):
    """The positions of a glob as bits: the start, those that take a character, or any, the stars, and the end.

    A star may match nothing: a position at a star includes the position after it.
    """

    start: int
    taking: dict[str, int]
    taking_any: int
    stars: int
    end: int

    def after(self, places: int, taking: int) -> int:
        """The possible positions after a character that only the positions `taking` take."""
        places = (places & taking) << 1 | places & self.stars
        return places | (places & self.stars) << 1


@lru_cache(1024)
def _read(glob: str) -> _Glob:
    glob = re.sub(r"\*+", "*", glob)
    at = {char: sum(1 << place for place, found in enumerate(glob) if found == char) for char in {*glob, "*", "?"}}
    taking = {char: places | at["?"] for char, places in at.items()}
    return _Glob(1 | (at["*"] & 1) << 1, taking, at["?"], at["*"], 1 << len(glob))


def require_within(caller: Caller, role: Role | None, rules: Iterable[Grant]) -> None:
    """Raises `Denied` if the caller lacks a right that this role and these rules give."""
    from circleosd.api import actions  # imports the contracts of all services, which only passing on rights needs

    needs = {verb: contract.access for verb, contract in actions.BY_VERB.items()}
    if lacking := excess(caller, role, rules, needs):
        raise Denied(f"this needs a right that you do not have yourself: {lacking}")


def excess(caller: Caller, role: Role | None, rules: Iterable[Grant], needs: Mapping[str, Access]) -> str | None:
    """Which of these rights `caller` lacks, in words; None if none. `needs`: the access that each action needs.

    Rules that deny give no right. A caller who is denied something by a rule cannot pass on rights to it.
    """
    if caller.privileged:
        return None
    denials = [rule for rule in caller.grants if rule.deny]
    if role is not None:
        if caller.role is None or not suffices(caller.role, Access(role.value)):
            return f"the role {role}"
        given = [verb for verb, access in needs.items() if access is not Access.ANYONE and suffices(role, access)]
        for rule in denials:
            if any(overlaps(rule.verb, verb) for verb in given):
                return f"the role {role}, because this rule binds you: {rule}"
    for given_rule in rules:
        if not given_rule.deny and (lacking := _lacking(caller, given_rule, denials, needs)):
            return lacking
    return None


def _lacking(caller: Caller, given: Grant, denials: Iterable[Grant], needs: Mapping[str, Access]) -> str | None:
    for rule in denials:
        if overlaps(rule.verb, given.verb) and overlaps(rule.object, given.object):
            return f"{given.verb} on {given.object}, because this rule binds you: {rule}"
    if caller.role is Role.ADMIN:
        return None
    # A role allows the actions that exist today; a glob might also cover those of a later version.
    if given.verb in needs and suffices(caller.role, needs[given.verb]):
        return None
    held = (rule for rule in caller.grants if not rule.deny)
    if any(includes(rule.verb, given.verb) and includes(rule.object, given.object) for rule in held):
        return None
    return f"{given.verb} on {given.object}"
