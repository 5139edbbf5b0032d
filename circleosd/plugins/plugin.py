"""A loaded plugin as the manager has it in memory: what is stored of it, what it may do, how it does."""

from __future__ import annotations

from collections.abc import Mapping

from circleosd.config import PluginSettings
from circleosd.plugins import capabilities
from circleosd.plugins.health import Health
from circleosd.plugins.manifest import Manifest, bounds
from circleosd.plugins.store import Loaded, Record


class Plugin:
    """One version of one plugin. `loading` until it is on record: nothing that it does may last until then."""

    def __init__(
        self, manifest: Manifest, digest: str, record: Record, decided: Mapping[str, bool], settings: PluginSettings
    ) -> None:
        self.name = manifest.name
        self.manifest = manifest
        self.digest = digest
        self.health = Health(manifest.name, record, settings)
        self.bounds = bounds(manifest, settings)
        self.loading = True
        self.before: Plugin | None = None  # the version that this one replaces, while calls of it are in hand
        self.functions: frozenset[str] = frozenset()
        self.configured = tuple(settings.grants.get(manifest.name, ()))
        self.decide(decided)

    def adopt(self, loaded: Loaded) -> None:
        """It is on record now, as `loaded`."""
        self.loaded = loaded
        self.functions = frozenset(loaded.functions)
        self.loading = False

    def decide(self, decided: Mapping[str, bool]) -> None:
        """From now on what was granted (True) and revoked (False) is this."""
        self.decided = dict(decided)
        self.granted = capabilities.effective(self.manifest.asked, self.decided, self.configured)

    def revoke(self, capability: str) -> None:
        """From now on it lacks this one, and each `*` that it would have it by: a later version may ask for less."""
        wider = {item: False for item in self.granted if capabilities.covers(item, capability)}
        self.decide(self.decided | wider)

    def holds(self, capability: str) -> bool:
        """Whether the plugin has a capability now."""
        return capabilities.holds(self.granted, capability)
