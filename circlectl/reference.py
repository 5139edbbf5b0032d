"""Reference pages, made from the contracts: `python -m circlectl.reference PAGE`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from circleosd.api import actions
from circleosd.api.contract import Request
from circleosd.policy import Role, suffices

YES, NO, OWN = "yes", "–", "own"
COLUMNS = ("stranger", "viewer", "operator", "admin", "root", "with a rule", "session not in force")

INTRO = """\
# Who may do what

Made from the contracts in `circleosd/api/` by `python -m circlectl.reference access`; a test fails when it is out of
date, and another walks every cell of it over the sockets.

Who asks is what the kernel says of the process at the other end of the socket:

- **root**: uid 0, and the uid that a service runs as. They are admin everywhere, no rule binds them and nobody can
  lock them out.
- **viewer**, **operator**, **admin**: a CircleOSD user of that role, with a session (`circlectl user login`) or by the
  uid that the user is bound to (`circlectl user create NAME --uid UID`), which needs no login.
- **with a rule**: a user without a role whom `circlectl user grant NAME VERB OBJECT` allows the action on the object.
  A rule with `--deny` takes it away instead, whatever role or rule allows it. `circlectl user can NAME VERB OBJECT`
  tells what decides.
- **stranger**: everybody else who may connect.
- **session not in force**: a token that has expired, was revoked, or was opened by another uid than presents it.

`own` is the right to do it to oneself: to the user that one is. Of a listing, one with rules gets the rows (`rows`) of
what the rules allow something on. A stream's right is looked at again while it goes on.
"""


def access() -> str:
    """The page `docs/access.md`: every action × role."""
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


PAGES: Mapping[str, Callable[[], str]] = {"access": access}


def main() -> None:
    """Print a page."""
    if len(sys.argv) != 2 or sys.argv[1] not in PAGES:
        sys.exit(f"usage: python -m circlectl.reference {{{','.join(PAGES)}}}")
    sys.stdout.write(PAGES[sys.argv[1]]())


if __name__ == "__main__":
    main()
