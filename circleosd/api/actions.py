"""The actions of all services, by their names in rules."""

from __future__ import annotations

from collections.abc import Mapping

from circleosd.api import auth, plugins, registry
from circleosd.api.contract import Request

MODULES = (auth, registry, plugins)
SERVICES: Mapping[str, str] = {module.GROUP: module.SERVICE for module in MODULES}  # by the groups of their actions
BY_VERB: Mapping[str, type[Request]] = {
    f"{module.GROUP}:{contract.action}": contract for module in MODULES for contract in module.CONTRACTS
}


def similar(verb: str) -> list[str]:
    """The actions that an unknown `verb` may stand for: those of its group, or all if there is no such group."""
    return [known for known in BY_VERB if known.partition(":")[0] == verb.partition(":")[0]] or [*BY_VERB]


def object_verbs(group: str) -> frozenset[str]:
    """The verbs of a group that rules can allow; one about any of them lets its user see the object in a listing."""
    return frozenset(
        verb for verb, contract in BY_VERB.items() if verb.startswith(f"{group}:") and contract.takes_rules()
    )
