"""The name of a compilation changes with all that the compilation depends on."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest

from circleosd.worker import cachekey


def test_a_key_is_the_same_for_the_same_artifact_and_mode_only() -> None:
    keys = [cachekey.cache_key(digest, deterministic=mode) for digest in ("a" * 64, "b" * 64) for mode in (False, True)]
    assert len(set(keys)) == 4
    assert all(re.fullmatch("[0-9a-f]{64}", key) for key in keys)
    assert cachekey.cache_key("a" * 64) == keys[0]


def test_a_key_changes_with_configuration_and_wasmtime(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cachekey.cache_key("a" * 64)
    monkeypatch.setattr(cachekey, "CONFIGURATION", cachekey.CONFIGURATION + 1)
    changed = cachekey.cache_key("a" * 64)
    monkeypatch.setattr(cachekey, "_wasmtime", lambda: "another wasmtime")
    assert len({before, changed, cachekey.cache_key("a" * 64)}) == 3


def test_a_key_changes_with_a_library_that_is_not_wasmtimes_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # As in nixpkgs: a link to a package that has releases of its own.
    (tmp_path / "wasmtime-46.0.1.dist-info").mkdir()
    (tmp_path / "wasmtime-46.0.1.dist-info/METADATA").write_text("Name: wasmtime\nVersion: 46.0.1\n")
    library = tmp_path / f"wasmtime/linux-{platform.machine()}/_libwasmtime.so"
    library.parent.mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for release in ("46.0.1", "46.0.2", "46.0.1"):
        library.unlink(missing_ok=True)
        library.symlink_to(f"/nix/store/wasmtime-{release}-lib/lib/libwasmtime.so")
        cachekey._wasmtime.cache_clear()
        keys.append(cachekey.cache_key("a" * 64))
    cachekey._wasmtime.cache_clear()
    assert keys[0] == keys[2] != keys[1]
