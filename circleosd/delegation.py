"""What one may hand on to a user or a plugin: never more than one's own rights.

Globs are those that the contracts admit: `*` and `?`, no brackets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from circleosd.errors import Denied
from circleosd.policy import Access, Caller, Grant, Role, suffices


def includes(outer: str, inner: str) -> bool:
    """Whether every text that the glob `inner` matches is matched by `outer`. Errs, if at all, towards no."""
    # From the ends towards the starts: row[j] says it for outer[i:] and inner[j:].
    row = [False] * len(inner) + [True]
    for char in reversed(outer):
        after, row = row, [False] * (len(inner) + 1)
        for j in range(len(inner), -1, -1):
            if char == "*":
                row[j] = after[j] or (j < len(inner) and row[j + 1])
            elif j < len(inner) and inner[j] != "*" and char in ("?", inner[j]):
                row[j] = after[j + 1]
    return row[0]


def overlaps(one: str, other: str) -> bool:
    """Whether there is a text that both globs match."""
    row = [set(other[j:]) <= {"*"} for j in range(len(other) + 1)]
    for char in reversed(one):
        after, row = row, [False] * (len(other) + 1)
        for j in range(len(other), -1, -1):
            if j == len(other):
                row[j] = char == "*" and after[j]
            elif "*" in (char, other[j]):
                row[j] = after[j] or row[j + 1]
            elif char == other[j] or "?" in (char, other[j]):
                row[j] = after[j + 1]
    return row[0]


def require_within(caller: Caller, role: Role | None, rules: Iterable[Grant]) -> None:
    """Raises `Denied` if the caller lacks a right that this role and these rules give."""
    from circleosd.api import actions  # all services' contracts: only what hands on rights waits for them

    needs = {verb: contract.access for verb, contract in actions.BY_VERB.items()}
    if lacking := excess(caller, role, rules, needs):
        raise Denied(f"this needs a right that you do not have yourself: {lacking}")


def excess(caller: Caller, role: Role | None, rules: Iterable[Grant], needs: Mapping[str, Access]) -> str | None:
    """Which of these rights `caller` lacks, in words; None if none. `needs`: what each action needs.

    Rules that deny give no right. Who is bound by a rule that denies cannot hand on what it is about.
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
                return f"the role {role}, for you are bound by the rule: {rule}"
    for given_rule in rules:
        if not given_rule.deny and (lacking := _lacking(caller, given_rule, denials, needs)):
            return lacking
    return None


def _lacking(caller: Caller, given: Grant, denials: Iterable[Grant], needs: Mapping[str, Access]) -> str | None:
    for rule in denials:
        if overlaps(rule.verb, given.verb) and overlaps(rule.object, given.object):
            return f"{given.verb} on {given.object}, for you are bound by the rule: {rule}"
    if caller.role is Role.ADMIN:
        return None
    # A role gives the actions that there are today; a glob might give what a later version adds.
    if given.verb in needs and suffices(caller.role, needs[given.verb]):
        return None
    held = (rule for rule in caller.grants if not rule.deny)
    if any(includes(rule.verb, given.verb) and includes(rule.object, given.object) for rule in held):
        return None
    return f"{given.verb} on {given.object}"
