"""Manifests of plugins."""

from __future__ import annotations

import json
from typing import Any

import pytest

from circleosd.config import PluginSettings
from circleosd.errors import BadRequest, Limit
from circleosd.plugins import manifest

WASM = b"\0asm\1\0\0\0"


def test_defaults_and_short_capabilities() -> None:
    found = manifest.parse(b'{"name":"a","capabilities":["kv",{"name":"services:restart:nginx","reason":"heals it"}]}')
    assert (found.version, found.plugin_type, found.instance) == ("0", "wasm", "fresh")
    assert [item.name for item in found.capabilities] == ["kv", "services:restart:nginx"]
    assert found.capabilities[1].reason == "heals it"
    assert manifest.parse(found.model_dump_json().encode()) == found


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"name": "A"},
        {"name": "a.b"},
        {"name": "../a"},
        {"name": "a" * 49},
        {"name": 5},
        {"name": "a", "colour": "red"},
        {"name": "a", "limits": {"memory": "64M"}},
        {"name": "a", "limits": {"memory": 1}},
        {"name": "a", "limits": {"time": 0}},
        {"name": "a", "limits": {"time": float("inf")}},
        {"name": "a", "plugin_type": "docker"},
        {"name": "a", "capabilities": "kv"},
        {"name": "a", "capabilities": [5]},
        {"name": "a", "config": {"k": 5}},
        {"name": "a", "sha256": "xyz"},
        [],
        None,
        "a",
    ],
)
def test_what_is_no_manifest(value: Any) -> None:
    with pytest.raises(BadRequest, match="manifest is"):
        manifest.parse(json.dumps(value).encode())


def test_bytes_that_are_no_json() -> None:
    for content in (b"", b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(BadRequest):
            manifest.parse(content)


def test_a_name_is_derived_from_the_file() -> None:
    assert manifest.derive("/tmp/My Plugin.v2.wasm", WASM).name == "my-plugin-v2"
    assert manifest.derive("x.so", b"\x7fELF").plugin_type == "native"
    with pytest.raises(BadRequest, match="cannot make a plugin name"):
        manifest.derive("/tmp/….wasm", WASM)
    with pytest.raises(BadRequest, match="neither WebAssembly nor"):
        manifest.derive("README.md", b"# CircleOSD")


def test_a_manifest_is_held_against_its_artifact_and_the_hosts_ceilings() -> None:
    ceiling = PluginSettings(memory=1 << 20, time=2)
    asks = manifest.parse(b'{"name":"a","limits":{"memory":2097152}}')
    with pytest.raises(Limit, match=r"asks for memory .*; this host allows"):
        manifest.check(asks, WASM, ceiling)
    with pytest.raises(BadRequest, match="says plugin_type native, but the artifact is wasm"):
        manifest.check(manifest.parse(b'{"name":"a","plugin_type":"native"}'), WASM, ceiling)
