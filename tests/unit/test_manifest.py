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
    assert manifest.restore(manifest.dump(found)) == found


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
        {"name": "a", "limits": {"time": 1e-9}},
        {"name": "a", "limits": {"time": "5"}},
        {"name": "a", "limits": {"time": float("nan")}},
        {"name": "a", "size": 10**30},
        {"name": "a", "capabilities": None},
        {"name": "a", "capabilities": {"kv": "counts"}},
        {"name": "a", "description": "\ud800"},
        {"name": "a", "config": {"": "v"}},
        {"name": "a", "config": {"k=v": "w"}},
        {"name": "a", "config": {"k\0": "v"}},
        {"name": "a", "config": {"k": "v\0"}},
        {"name": "a", "limits": {"time": float("inf")}},
        {"name": "a", "plugin_type": "docker"},
        {"name": "a", "capabilities": "kv"},
        {"name": "a", "capabilities": [5]},
        {"name": "a", "capabilities": [f"services:restart:s{number}" for number in range(65)]},
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
    for content in (
        b"",
        b"{",
        b"\xff",
        b"[" * 100_000,
        '{"name":"a"}'.encode("utf-16"),
        b'{"name":"a","size":NaN}',
        b"9" * 5000,
    ):
        with pytest.raises(BadRequest, match="the manifest is not JSON"):
            manifest.parse(content)


def test_a_member_that_stands_twice_is_refused() -> None:
    for content in (b'{"name":"a","name":"b"}', b'{"name":"a","config":{"k":"v","k":"w"}}'):
        with pytest.raises(BadRequest, match="twice"):
            manifest.parse(content)


def test_one_that_was_sent_inline_is_bounded_like_a_file() -> None:
    frame = len('{"name":"a","config":{"k":""}}')
    text = "x" * (manifest.MAX_MANIFEST - frame)
    assert manifest.parse({"name": "a", "config": {"k": text}}).config == {"k": text}
    for more in (text + "x", text[:-1] + "ü"):
        with pytest.raises(BadRequest, match="larger than 65536 bytes"):
            manifest.parse({"name": "a", "config": {"k": more}})
    with pytest.raises(BadRequest, match="surrogate"):
        manifest.parse({"name": "a", "description": "\ud800"})


def test_a_capability_is_asked_for_once() -> None:
    asked = ["kv", "log", {"name": "kv", "reason": "counts"}]
    with pytest.raises(BadRequest, match="capabilities: asks for 'kv' twice"):
        manifest.parse({"name": "a", "capabilities": asked})


def test_lines_may_end_as_they_like_and_a_byte_order_mark_is_no_matter() -> None:
    assert manifest.parse(b'\xef\xbb\xbf{\r\n"name": "a"\r\n}\r\n').name == "a"


def test_a_name_is_derived_from_the_file() -> None:
    assert manifest.derive("/tmp/My Plugin.v2.wasm", WASM).name == "my-plugin-v2"
    assert manifest.derive("x.so", b"\x7fELF").plugin_type == "native"
    for name in ("…", "ünï", "-"):
        with pytest.raises(BadRequest, match=f"cannot make a plugin name of {name!r}"):
            manifest.derive(f"/tmp/{name}.wasm", WASM)
    with pytest.raises(BadRequest, match="neither WebAssembly nor"):
        manifest.derive("README.md", b"# CircleOSD")
    for text in (b"(module", b"\n  (component", b";; a module"):
        with pytest.raises(BadRequest, match="is WebAssembly text"):
            manifest.derive("plugin.wat", text)


def test_an_instance_that_is_shared_serves_one_call_at_a_time() -> None:
    settings = PluginSettings(concurrency=8)
    for kind, instance, most in (("wasm", "shared", 1), ("wasm", "fresh", 4), ("native", "shared", 4)):
        asked = {"name": "a", "plugin_type": kind, "instance": instance, "limits": {"concurrency": 4}}
        assert manifest.bounds(manifest.parse(asked), settings).concurrency == most


def test_a_manifest_is_held_against_its_artifact_and_the_hosts_ceilings() -> None:
    ceiling = PluginSettings(memory=1 << 20, time=2)
    asks = manifest.parse(b'{"name":"a","limits":{"memory":2097152}}')
    with pytest.raises(Limit, match="asks for memory 2097152; this host allows 1048576"):
        manifest.check(asks, WASM, ceiling)
    with pytest.raises(BadRequest, match="says plugin_type native, but the artifact is wasm"):
        manifest.check(manifest.parse(b'{"name":"a","plugin_type":"native"}'), WASM, ceiling)
    for kind, head, abi in (("wasm", WASM, "native"), ("native", b"\x7fELF", "core")):
        claims = manifest.parse({"name": "a", "plugin_type": kind, "abi": abi})
        with pytest.raises(BadRequest, match=f"says abi {abi}, but the artifact is {kind}"):
            manifest.check(claims, head, ceiling)
