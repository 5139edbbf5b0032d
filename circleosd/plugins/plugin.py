"""A loaded plugin in the manager's memory: its stored data, its capabilities, its health."""

from __future__ import annotations

from collections.abc import Mapping

from circleosd.config import PluginSettings
from circleosd.plugins import capabilities
from circleosd.plugins.health import Health
from circleosd.plugins.manifest import Manifest, bounds
from circleosd.plugins.store import Loaded, Record
from circleosd.plugins.voice import Voice


class Plugin:
    """One version of one plugin. Until it is recorded, it is `loading` and cannot change anything permanently."""

    def __init__(
        self, manifest: Manifest, digest: str, record: Record, decided: Mapping[str, bool], settings: PluginSettings
    ) -> None:
        self.name = manifest.name
        self.manifest = manifest
        self.digest = digest
        self.health = Health(manifest.name, record, settings)
        self.bounds = bounds(manifest, settings)
        self.voice = Voice(manifest.name)
        self.loading = True
        self.before: Plugin | None = None  # the version that this one replaces, while calls of that are running
        self.functions: frozenset[str] = frozenset()
        self.configured = tuple(settings.grants.get(manifest.name, ()))
        self.decide(decided)

    def adopt(self, loaded: Loaded) -> None:
        """It is now recorded, as `loaded`."""
        self.loaded = loaded
        self.functions = frozenset(loaded.functions)
        self.loading = False

    def decide(self, decided: Mapping[str, bool]) -> None:
        """From now on, these are the capabilities granted (True) and revoked (False)."""
        self.decided = dict(decided)
        self.granted = capabilities.effective(self.manifest.asked, self.decided, self.configured)

    def revoke(self, capability: str) -> None:
        """Revoke a capability, and each `*` that includes it: a later version may request less."""
        wider = {item: False for item in self.granted if capabilities.covers(item, capability)}
        self.decide(self.decided | wider)

    def holds(self, capability: str) -> bool:
        """Whether the plugin currently has a capability."""
        return capabilities.holds(self.granted, capability)
