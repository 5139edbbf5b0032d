"""Capabilities: what a plugin may request, and whether it was granted. Pure functions of values.

A capability is one of `KINDS`; one that ends in a colon is followed by a name: `services:restart:nginx`,
`events:deploy`. A `*` as the name stands for every name. ABI.md lists the host calls of each.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from circleosd.api.plugins import PLUGIN_NAMES
from circleosd.api.registry import SERVICE_NAME
from circleosd.config import Settings
from circleosd.errors import BadRequest
from circleosd.policy import Grant
from circleosd.worker import host
from circleosd.worker.host import covers as covers
from circleosd.worker.host import is_covered as is_covered

ALWAYS = "log"
KINDS = (ALWAYS, *host.KINDS)
ALL = "all"  # in a grant, stands for everything that the plugin requests
_NAMED = {
    "services:restart:": (rf"\*|{SERVICE_NAME}", "the name of a service"),
    "events:": (  # topics are of the same form, but without a colon
        r"\*|[a-zA-Z0-9][a-zA-Z0-9_.@-]{0,127}",
        "a topic: at most 128 ASCII letters, digits, _ . @ or -, beginning with a letter or digit",
    ),
}

# Rights that people need for what a plugin may do with a capability of that kind; the object is its name, or any.
_RIGHTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((ALWAYS, "kv", "config", "clock", "events:"), ()),  # what plugins may do among themselves
    "services:read": ("service:list", "service:status"),
    "services:restart:": ("service:restart",),
}


def rights(held: Iterable[str]) -> tuple[Grant, ...]:
    """The rights that these capabilities are equivalent to, in the form of rules."""
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
    for kind, (names, what) in _NAMED.items():
        if capability.startswith(kind):
            if re.fullmatch(names, capability.removeprefix(kind)):
                return
            raise BadRequest(f"no capability {capability[:200]!r}; after {kind} comes *, or {what}")
    known = ", ".join(kind + "NAME" if kind.endswith(":") else kind for kind in KINDS)
    raise BadRequest(f"no capability {capability[:200]!r}; available: {known}")


def check_configured(settings: Settings) -> None:
    """Raises ValueError unless `plugins.grants` contains valid plugin names and existing capabilities."""
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
    """Raises `BadRequest` unless this is a valid topic."""
    names, what = _NAMED["events:"]
    if topic == "*" or not re.fullmatch(names, topic):
        raise BadRequest(f"{topic[:200]!r} is not {what}")


def holds(granted: Iterable[str], capability: str) -> bool:
    """Whether one of the granted capabilities covers this one; `log` is always available."""
    return capability == ALWAYS or is_covered(capability, granted)


def effective(asked: Iterable[str], decided: Mapping[str, bool], configured: Iterable[str]) -> tuple[str, ...]:
    """The capabilities that a plugin has: those that it requests and that were granted.

    `decided` says which ones were granted (True) or revoked (False) by name, `configured` which ones the configuration
    grants; a decision takes precedence over the configuration. If a plugin requests a `*`, single names can be granted.
    """
    asked, configured = tuple(asked), tuple(configured)
    single = (item for item in (*decided, *configured) if is_covered(item, asked))
    return tuple(item for item in dict.fromkeys((*asked, *single)) if decided.get(item, holds(configured, item)))


def inherited(asked: Collection[str], decided: Mapping[str, bool]) -> dict[str, bool]:
    """The decisions about a version that apply to the next, which requests `asked`. A `*` stands for each name.

    A `*` that would bring back a revoked name is not granted unless that was decided. What was revoked stays so even if
    `asked` lacks it: the version after the next may request it again.
    """
    wider = {item: False for name, yes in decided.items() if not yes for item in asked if covers(item, name)}
    narrower = {item: yes for name, yes in decided.items() for item in asked if covers(name, item)}
    return wider | narrower | {name: yes for name, yes in decided.items() if not yes or is_covered(name, asked)}


def split(text: str) -> tuple[str, ...]:
    """The capabilities of a comma-separated list. Raises `BadRequest` for one that does not exist."""
    found = tuple(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))
    for item in found:
        if item != ALL:
            check(item)
    return found
