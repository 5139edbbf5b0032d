"""Capabilities: what a plugin may ask of its host, and whether it was granted. Pure functions of values.

A capability is one of `KINDS`, the last two with a name behind them: `services:restart:nginx`, `events:deploy`. A `*`
for the name stands for every name. What the host calls of each are is in ABI.md.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from circleosd.api.plugins import PLUGIN_NAMES
from circleosd.config import Settings
from circleosd.errors import BadRequest
from circleosd.policy import Grant
from circleosd.worker.host import covers as covers
from circleosd.worker.host import is_covered as is_covered

KINDS = {
    "log": "writes to the host's log; every plugin may",
    "kv": "stores texts of its own in the host's database",
    "config": "reads its configuration",
    "clock": "reads the clocks",
    "services:read": "sees the services of the catalog and their states",
    "services:restart:": "restarts the service of that name",
    "events:": "emits and receives the events of that topic",
}
ALWAYS = "log"
ALL = "all"  # stands for everything that a plugin asks for, where somebody grants
_NAMED = {
    # what the registry takes for a service's name, and topics of the same form without a colon
    "services:restart:": r"\*|[a-zA-Z0-9][a-zA-Z0-9_.@:-]{0,127}",
    "events:": r"\*|[a-zA-Z0-9][a-zA-Z0-9_.@-]{0,127}",
}

# What people need a right for and a plugin does by a capability of that kind; the object is the name behind it, or any.
_RIGHTS = {
    "services:read": ("service:list", "service:status"),
    "services:restart:": ("service:restart",),
}


def rights(held: Iterable[str]) -> tuple[Grant, ...]:
    """The rights that these capabilities are as good as, in the words of rules."""
    return tuple(
        Grant(verb, capability.removeprefix(kind) or "*")
        for capability in held
        for kind, verbs in _RIGHTS.items()
        if capability.startswith(kind)
        for verb in verbs
    )


def check(capability: str) -> None:
    """Raises `BadRequest` unless `capability` is one that this host has."""
    if capability in KINDS and not capability.endswith(":"):
        return
    for kind, names in _NAMED.items():
        if capability.startswith(kind) and re.fullmatch(names, capability.removeprefix(kind)):
            return
    known = ", ".join(kind + "NAME" if kind.endswith(":") else kind for kind in KINDS)
    raise BadRequest(f"no capability {capability[:200]!r}; available: {known}")


def check_configured(settings: Settings) -> None:
    """Raises ValueError unless `plugins.grants` has names that plugins can have, and capabilities that there are."""
    for plugin, names in settings.plugins.grants.items():
        try:
            PLUGIN_NAMES.check(plugin)
        except ValueError as exc:
            raise ValueError(f"setting plugins.grants: {exc}") from exc
        for name in names:
            try:
                check(name)
            except BadRequest as exc:
                raise ValueError(f"setting plugins.grants.{plugin}: {exc}") from exc


def check_topic(topic: str) -> None:
    """Raises `BadRequest` unless events can have this topic."""
    if topic == "*" or not re.fullmatch(_NAMED["events:"], topic):
        raise BadRequest(f"{topic[:200]!r} is not a topic: at most 128 ASCII letters, digits, _ . @ or -")


def holds(granted: Iterable[str], capability: str) -> bool:
    """Whether any of the granted capabilities covers this one; `log` is always there."""
    return capability == ALWAYS or is_covered(capability, granted)


def effective(asked: Iterable[str], decided: Mapping[str, bool], configured: Iterable[str]) -> tuple[str, ...]:
    """What a plugin has: of what it asks for, what was granted.

    `decided` is what was granted (True) or revoked (False) by name, `configured` what the configuration grants; a
    decision comes before the configuration. Of a kind with `*` that it asks for, single names can be granted.
    """
    asked, configured = tuple(asked), tuple(configured)
    single = (item for item in (*decided, *configured) if is_covered(item, asked))
    return tuple(item for item in dict.fromkeys((*asked, *single)) if decided.get(item, holds(configured, item)))


def inherited(asked: Collection[str], decided: Mapping[str, bool]) -> dict[str, bool]:
    """What `decided` about a version says of the next, which asks for `asked`: of `*`, each name.

    A `*` that would bring back a name which was revoked is not held unless that is decided.
    """
    wider = {item: False for name, yes in decided.items() if not yes for item in asked if covers(item, name)}
    narrower = {item: yes for name, yes in decided.items() for item in asked if covers(name, item)}
    return wider | narrower | {name: yes for name, yes in decided.items() if is_covered(name, asked)}


def split(text: str) -> tuple[str, ...]:
    """The capabilities of a comma-separated list. Raises `BadRequest` for one that there is not."""
    found = tuple(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))
    for item in found:
        if item != ALL:
            check(item)
    return found
