"""Manifests of plugins."""

from __future__ import annotations

import json
from typing import Any

import pytest

from circleosd.api.plugins import once
from circleosd.config import PluginSettings
from circleosd.errors import BadRequest, Limit
from circleosd.plugins import capabilities, manifest
from circleosd.worker.frames import MAX_PAYLOAD

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
        {"name": "a", "version": "1.0: core, signed by ada"},
        {"name": "a", "version": "1.0\u200b"},
        {"name": "a", "version": "1.0\u2800"},
        {"name": "a", "config": {"": "v"}},
        {"name": "a", "config": {"k=v": "w"}},
        {"name": "a", "config": {"k\0": "v"}},
        {"name": "a", "config": {"k": "v\0"}},
        {"name": "a", "limits": {"time": float("inf")}},
        {"name": "a", "plugin_type": "docker"},
        {"name": "a", "capabilities": "kv"},
        {"name": "a", "capabilities": [5]},
        {"name": "a", "capabilities": ["sudo"]},
        {"name": "a", "capabilities": [""]},
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


@pytest.mark.parametrize(
    ("member", "least", "most"), [("name", 1, 48), ("version", 1, 64), ("description", 0, 500), ("entry", 1, 128)]
)
def test_a_text_has_the_length_that_the_guide_says(member: str, least: int, most: int) -> None:
    for length in (least, most):
        assert getattr(manifest.parse({"name": "a", member: "x" * length}), member) == "x" * length
    for length in {least - 1, most + 1} - {-1}:
        with pytest.raises(BadRequest, match=f"the manifest is invalid: {member}: "):
            manifest.parse({"name": "a", member: "x" * length})


@pytest.mark.parametrize(
    ("limit", "least"), [("memory", 64 * 1024), ("time", 0.001), ("output", 1), ("concurrency", 1), ("storage", 0)]
)
def test_a_limit_is_at_least_what_the_guide_says(limit: str, least: float) -> None:
    assert getattr(manifest.parse({"name": "a", "limits": {limit: least}}).limits, limit) == least
    with pytest.raises(BadRequest, match=f"the manifest is invalid: limits.{limit}: "):
        manifest.parse({"name": "a", "limits": {limit: least * 0.99 if limit == "time" else least - 1}})


def test_capabilities_are_known_few_and_have_short_reasons() -> None:
    with pytest.raises(BadRequest, match=r"capabilities\.0\.name: no capability 'sudo'; available: log, kv"):
        manifest.parse({"name": "a", "capabilities": ["sudo"]})
    most = [f"services:restart:s{number}" for number in range(64)]
    assert manifest.parse({"name": "a", "capabilities": most}).asked == tuple(most)
    with pytest.raises(BadRequest, match="capabilities: may have at most 64, not 65"):
        manifest.parse({"name": "a", "capabilities": [*most, "kv"]})
    reason = "x" * 500
    assert manifest.parse({"name": "a", "capabilities": [{"name": "kv", "reason": reason}]}).capabilities[0].reason
    with pytest.raises(BadRequest, match=r"capabilities\.0\.reason: "):
        manifest.parse({"name": "a", "capabilities": [{"name": "kv", "reason": reason + "x"}]})


def test_what_another_version_has_stored_is_refused() -> None:
    stored = json.loads(manifest.dump(manifest.parse({"name": "a"})))
    without = {name: value for name, value in stored.items() if name != "capabilities"}
    for text in ("", "{", "[]", json.dumps(stored | {"colour": "red"}), json.dumps(without)):
        with pytest.raises(BadRequest, match="its stored manifest cannot be read: "):
            manifest.restore(text)


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
    twice = {"name": b'{"name":"a","name":"b"}', "k": b'{"name":"a","config":{"j":"v","k":"v","k":"w"}}'}
    for name, content in twice.items():
        with pytest.raises(BadRequest, match=f"'{name}' appears twice"):
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
    assert manifest.derive("_x_.so", b"\x7fELF") == manifest.parse({"name": "x", "plugin_type": "native"})
    assert manifest.derive(f"{'x' * 60}.wasm", WASM).name == "x" * 48
    for name in ("…", "ünï", "-"):
        with pytest.raises(BadRequest, match=f"cannot derive a plugin name from {name!r}"):
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
    manifest.check(asks, WASM, PluginSettings(memory=2097152))
    manifest.check(manifest.parse({"name": "a", "abi": "component"}), WASM, PluginSettings(memory=1))
    for kind, head in (("wasm", WASM), ("native", b"\x7fELF")):
        manifest.check(manifest.parse({"name": "a", "plugin_type": kind}), head, ceiling)
    with pytest.raises(BadRequest, match='the artifact is native, so its manifest needs "plugin_type": "native"'):
        manifest.check(manifest.parse({"name": "a"}), b"\x7fELF", ceiling)
    with pytest.raises(BadRequest, match='the artifact is wasm, so its manifest needs "plugin_type": "wasm"'):
        manifest.check(manifest.parse(b'{"name":"a","plugin_type":"native"}'), WASM, ceiling)
    for kind, head, abi in (("wasm", WASM, "native"), ("native", b"\x7fELF", "core")):
        claims = manifest.parse({"name": "a", "plugin_type": kind, "abi": abi})
        with pytest.raises(BadRequest, match=f"says abi {abi}, but the artifact is {kind}"):
            manifest.check(claims, head, ceiling)
    manifest.check(manifest.parse({"name": "a", "deterministic": True}), WASM, ceiling)
    native = manifest.parse({"name": "a", "plugin_type": "native", "deterministic": True})
    with pytest.raises(BadRequest, match="says deterministic, but the artifact is native"):
        manifest.check(native, b"\x7fELF", ceiling)


def test_no_host_allows_more_than_manager_and_worker_can_say_to_each_other() -> None:
    lavish = PluginSettings(output=1 << 40, concurrency=1000, default_output=1 << 40, default_concurrency=1000)
    for limit, most in (("output", MAX_PAYLOAD), ("concurrency", 64)):
        manifest.check(manifest.parse({"name": "a", "limits": {limit: most}}), WASM, lavish)
        with pytest.raises(Limit, match=f"asks for {limit} {most + 1}; this host allows {most} "):
            manifest.check(manifest.parse({"name": "a", "limits": {limit: most + 1}}), WASM, lavish)
        assert getattr(manifest.bounds(manifest.parse({"name": "a"}), lavish), limit) == most


def test_a_wrong_manifest_does_not_take_the_longer_the_more_of_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = looked_at = 0

    class Name(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return super().__eq__(other)

    def check(name: str) -> None:
        nonlocal looked_at
        looked_at += 1

    with pytest.raises(BadRequest, match="'7' appears twice"):
        once([(Name(number % 999), 0) for number in range(7, 1007)])
    assert compared < 100  # of names with one hash, and no others
    monkeypatch.setattr(capabilities, "check", check)
    with pytest.raises(BadRequest, match="capabilities: may have at most 64, not 65"):
        manifest.parse({"name": "x", "capabilities": ["kv"] * 65})
    assert looked_at == 0
