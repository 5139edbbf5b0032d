"""The page docs/access.md, generated from the contracts: `python -m circlectl.reference` prints it."""

from __future__ import annotations

import sys

from circleosd.api import actions
from circleosd.api.contract import Request
from circleosd.policy import Role, suffices

YES, NO, OWN = "yes", "–", "own"
COLUMNS = ("stranger", *Role, "root", "with a rule", "invalid session")

INTRO = """\
# Who may do what

Generated from the contracts in `circleosd/api/` by `python -m circlectl.reference`. One test fails when this page is
out of date; another checks every cell over the sockets.

The kernel identifies the process at the other end of the socket. The columns are:

- **root**: uid 0, and the uid that a service runs as. They are admin everywhere, no rule applies to them, and nobody
  can lock them out.
- **viewer**, **operator**, **admin**: a CircleOSD user with that role, who has a session (`circlectl user login`) or
  runs under the uid bound to that user (`circlectl user create NAME --uid UID`), which needs no login.
- **with a rule**: a user without a role who has a rule (`circlectl user grant NAME VERB OBJECT`) that allows the action
  on the object. A rule with `--deny` denies it instead, whatever role or rule allows it. `circlectl user can NAME VERB
  OBJECT` shows what decides.
- **stranger**: anybody else who may connect.
- **invalid session**: a token that has expired, was revoked, or is presented by a uid that did not open it.

`own`: users may do it to themselves. `rows`: a user with rules sees those rows of a listing on which the rules allow
something. The right to a stream is checked repeatedly while it is followed.
"""


def access() -> str:
    """The page: every action × role."""
    lines = [INTRO, f"| action | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for verb, contract in actions.BY_VERB.items():
        lines.append(f"| `{verb}` | {' | '.join(cells(contract))} |")
    return "\n".join(lines) + "\n"


def cells(contract: type[Request]) -> tuple[str, ...]:
    """The row of an action, in the order of `COLUMNS`."""

    def of(role: Role | None) -> str:
        if suffices(role, contract.access):
            return YES
        return OWN if role and contract.own_object else NO

    rule = of(None)
    if contract.takes_rules():
        rule = YES if contract.object_field else "rows"
    elif rule == NO and contract.own_object:
        rule = OWN
    return of(None), *(of(role) for role in Role), YES, rule, NO


if __name__ == "__main__":
    sys.stdout.write(access())
