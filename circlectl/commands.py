"""The commands: those of the contracts by group, and the few that circlectl carries out itself."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from circleosd.api.contract import Mark, Parameter, parameters

if TYPE_CHECKING:
    from circlectl.asking import Asking
    from circleosd.api.contract import Request
    from circleosd.errors import CircleError

    Local = Callable[[Asking, dict[str, Any]], tuple[Any, CircleError | None]]

GROUPS = {
    "user": "users, logins, sessions",
    "service": "services and the systemd units behind them",
    "plugin": "load, call and unload plugins",
    "system": "CircleOSD as a whole",
}
_MODULES = {
    "user": ("circleosd.api.auth",),
    "service": ("circleosd.api.registry",),
    "plugin": ("circleosd.api.plugins", "circlectl.signing"),
    "system": ("circlectl.system",),
}


class Command(NamedTuple):
    """One command, which `service` carries out, or `local` in circlectl itself: it returns the data, and the error."""

    group: str
    verb: str
    contract: type[Request]
    service: str
    local: Local | None

    @property
    def parameters(self) -> list[Parameter]:
        """The parameters that can be given on the command line, in order."""
        hidden = {Mark.HIDDEN, Mark.SECRET}
        found = [item for item in parameters(self.contract) if not item.marks & hidden]
        return found + [_on_stdin(item.name) for item in found if Mark.STDIN in item.marks]

    @property
    def secrets(self) -> list[Parameter]:
        """The parameters that are prompted for without echo, in order: the current password before the new one."""
        found = [item for item in parameters(self.contract) if item.marks & {Mark.SECRET, Mark.HIDDEN} == {Mark.SECRET}]
        return sorted(found, key=lambda item: Mark.NEW in item.marks)


def _on_stdin(name: str) -> Parameter:
    """The switch to read a parameter from standard input. It is not part of the request."""
    word, doc = f"{name}_stdin", f"read the {name} from standard input, unchanged"
    return Parameter(word, word, bool, False, False, doc, frozenset({Mark.OPTION}), ())


def of_group(group: str) -> Mapping[str, Command]:
    """The commands of a group by verb. Imports only that group's contracts, because each costs time at every start."""
    found = {}
    for name in _MODULES[group]:
        module = importlib.import_module(name)
        service, local = getattr(module, "SERVICE", ""), getattr(module, "COMMANDS", {})
        for contract in module.CONTRACTS:
            if verb := contract.command:
                found[verb] = Command(group, verb, contract, service, local.get(verb))
    return found
