"""What a rule can be about, and what a user's rules allow. No I/O here."""

from __future__ import annotations

from circleosd.api.auth import Answer
from circleosd.api.contract import Request
from circleosd.auth import store
from circleosd.auth.store import Account
from circleosd.errors import BadRequest
from circleosd.policy import Access, Caller, Grant, Peer, decide


def action(verb: str) -> type[Request]:
    """The contract of an action such as service:restart. Raises `BadRequest` if there is none."""
    from circleosd.api import actions  # imports the contracts of all services, which only rules need

    contract = actions.BY_VERB.get(verb)
    if contract is None:
        raise BadRequest(f"no action {verb}; available: {', '.join(actions.similar(verb))}")
    return contract


def answer(account: Account, grants: tuple[Grant, ...], contract: type[Request], verb: str, name: str | None) -> Answer:
    """Whether a user with these rules may perform an action, on the object `name` if given, and what decides.

    For an action that defaults to oneself, `name` is the user by default; for one without an object it is ignored.
    """
    from circleosd.api import actions

    if account.disabled:
        return Answer(allowed=False, why=f"the user {account.name} is disabled", rule=None)
    if not contract.has_object():
        name = None
    elif name is None and contract.own_object:
        name = account.name
    listing = contract.row_field is not None
    decision = decide(
        Caller(Peer(-1, -1, -1), account.role, account.name, grants=grants),
        contract.access,
        verb,
        name,
        own=contract.own_object,
        among=actions.object_verbs(verb.partition(":")[0]) if listing else (),
    )
    rule = store.rules((decision.rule,))[0] if decision.rule else None
    shown = "; lists only objects on which rules allow something" if listing and rule and decision.allowed else ""
    return Answer(allowed=decision.allowed, why=decision.why + shown, rule=rule)


def require_known(given: Grant) -> None:
    """Refuse a rule that can never apply, for example because of a misspelt verb. Raises `BadRequest`."""
    from circleosd.api import actions

    covered = [verb for verb in actions.BY_VERB if given._replace(object="*").covers(verb, None)]
    if not covered:
        raise BadRequest(f"no action {given.verb}; available: {', '.join(actions.similar(given.verb))}")
    if given.deny:
        covered = [verb for verb in covered if actions.BY_VERB[verb].access is not Access.ANYONE]
        if not covered:
            raise BadRequest(f"no rule can deny {given.verb}: anyone may do it")
        if not any(actions.BY_VERB[verb].has_object() or given.covers(verb, None) for verb in covered):
            raise BadRequest(f"{given.verb} can be denied only for all objects; deny it for *")
        return
    if not any(actions.BY_VERB[verb].takes_rules() for verb in covered):
        needs = actions.BY_VERB[covered[0]].access
        why = "anyone may do it" if needs is Access.ANYONE else f"it needs the role {needs}"
        raise BadRequest(f"a rule about an object cannot allow {given.verb}: {why}")
