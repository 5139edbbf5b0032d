"""A plugin as callers and the ledger see it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from circleosd.api import plugins as api
from circleosd.plugins.plugin import Plugin
from circleosd.plugins.store import Loaded, Record
from circleosd.plugins.trust import Trust
from circleosd.policy import Caller, Peer


def shown(plugin: Plugin) -> api.Plugin:
    """A plugin in a reply."""
    manifest, loaded = plugin.manifest, plugin.loaded
    served = "held-back" if plugin.health.held_for(time.monotonic()) else "ready"
    return api.Plugin(
        id=manifest.name,
        version=manifest.version,
        plugin_type=manifest.plugin_type,
        abi=loaded.abi,
        functions=[*loaded.functions],
        capabilities=_requests(plugin),
        description=loaded.description,
        digest=loaded.digest,
        manifest_digest=loaded.manifest_digest,
        loaded=loaded.loaded,
        signer=loaded.signer,
        calls=plugin.health.record.calls,
        failures=plugin.health.record.failures,
        state=plugin.health.record.aside or served,
    )


def details(plugin: Plugin, *, stored: int, running: bool, waiting: int) -> api.Details:
    """A plugin in the reply to `plugin show`: with the bytes that it stores, whether it has a worker, and its calls."""
    record, loaded = plugin.health.record, plugin.loaded
    return api.Details(
        **shown(plugin),
        reason=record.reason,
        since=record.since,
        key=loaded.key,
        imports=[*loaded.imports],
        instance=_instance_of(loaded),
        deterministic=plugin.manifest.deterministic,
        limits=plugin.bounds._asdict(),
        stored=stored,
        last_error=record.last_error,
        last_failed=record.last_failed,
        worker="running" if running else "none",
        waiting=waiting,
    )


def _instance_of(loaded: Loaded) -> str:
    """Whether calls share an instance; for two ABIs, this does not depend on the manifest (ABI.md, "Instances")."""
    return {"native": "shared", "wasi": "fresh"}.get(loaded.abi, loaded.manifest.instance)


def to_say(plugin: Plugin, trust: Trust) -> str | None:
    """The message for the caller who loaded a plugin."""
    said = [f"warning: {trust.warning}"] if trust.warning else []
    missing = [name for name in plugin.manifest.asked if not plugin.holds(name)]
    if missing:
        said.append(f"not granted: {', '.join(missing)}; see: circlectl plugin grant --help")
    return "; ".join(said) or None


def state_of(record: Record) -> str:
    """Whether a plugin is set aside, and why, in the form of the ledger."""
    return f"{record.aside}: {record.reason}" if record.aside else "ready"


def brief(plugin: Plugin | None) -> dict[str, Any] | None:
    """See `brief_of`."""
    return brief_of(plugin.loaded, plugin.granted) if plugin else None


def brief_of(loaded: Loaded, granted: Sequence[str]) -> dict[str, Any]:
    """A plugin that is `loaded` with the capabilities `granted`, in the form of the ledger."""
    brief: dict[str, Any] = {"version": loaded.manifest.version, "digest": loaded.digest}
    if loaded.manifest_digest:
        brief["manifest_digest"] = loaded.manifest_digest
    if granted:
        brief["granted"] = [*granted]
    if loaded.signer:
        brief["signer"] = loaded.signer
    return brief


def _requests(plugin: Plugin) -> list[api.Capability]:
    """The capabilities that a plugin requests, and for each `*` the names that are granted."""
    shown = [
        api.Capability(name=item.name, reason=item.reason, granted=item.name in plugin.granted)
        for item in plugin.manifest.capabilities
    ]
    single = [name for name in plugin.granted if name not in plugin.manifest.asked]
    return shown + [api.Capability(name=name, reason="", granted=True) for name in single]


def itself(plugin: str) -> Caller:
    """The actor when the manager acts for a plugin."""
    return Caller(Peer(os.getuid(), os.getgid(), os.getpid()), plugin=plugin)
