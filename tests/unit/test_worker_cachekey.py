"""The name of a compilation changes with all that the compilation depends on."""

from __future__ import annotations

import re

import pytest

from circleosd.worker import cachekey


def test_a_key_is_the_same_for_the_same_artifact_and_mode_only() -> None:
    keys = [cachekey.cache_key(digest, deterministic=mode) for digest in ("a" * 64, "b" * 64) for mode in (False, True)]
    assert len(set(keys)) == 4
    assert all(re.fullmatch("[0-9a-f]{64}", key) for key in keys)
    assert cachekey.cache_key("a" * 64) == keys[0]


def test_a_key_changes_with_configuration_and_host(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cachekey.cache_key("a" * 64)
    monkeypatch.setattr(cachekey, "CONFIGURATION", cachekey.CONFIGURATION + 1)
    changed = cachekey.cache_key("a" * 64)
    monkeypatch.setattr(cachekey, "_host", lambda: "another wasmtime or CPU")
    assert len({before, changed, cachekey.cache_key("a" * 64)}) == 3
