"""What the NixOS module runs: the script that bundles a declared plugin, and the one that has the bundles loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import PROJECT
from tests.integration.embedded_host import BIN, EmbeddedHost

SCRIPTS = PROJECT / "units/nixos"
EXAMPLES = PROJECT / "plugins/examples"

pytestmark = pytest.mark.skipif(not shutil.which("jq"), reason="jq is not on PATH: no plugin is bundled")


def run(script: str, environment: Mapping[str, str], *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Run a script as the module has it run (nixpkgs: runCommand, writeShellApplication)."""
    command: list[str | Path] = ["bash", "-euo", "pipefail", SCRIPTS / script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def bundled(host: EmbeddedHost, out: Path, name: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Bundle an example plugin into `out`. `changes` are to what the module passes in the environment."""
    given = {
        "plugin": name,
        "artifact": str(EXAMPLES / name / f"{name}.wasm"),
        "manifest": str(EXAMPLES / name / f"{name}.json"),
        "extension": "wasm",
        "signature": "",
        "trust": "",
        "expected": "",
        "grants": "",
    }
    return run("plugin-bundle.sh", {"PATH": host.environment["PATH"], "out": str(out), **given, **changes})


def bundle(host: EmbeddedHost, out: Path, name: str, **changes: str) -> Path:
    done = bundled(host, out, name, **changes)
    assert done.returncode == 0, done.stderr
    return out


def sync(host: EmbeddedHost, state: Path, *bundles: Path) -> subprocess.CompletedProcess[str]:
    """Have exactly these bundles loaded."""
    state.mkdir(exist_ok=True)
    path = f"{BIN}:{host.environment['PATH']}"
    return run("declared-plugins.sh", {**host.environment, "PATH": path, "STATE_DIRECTORY": str(state)}, *bundles)


def loaded(host: EmbeddedHost) -> set[str]:
    return {plugin["id"] for plugin in host.data("plugin-manager", "list")}


def test_a_bundle_is_checked(host: EmbeddedHost, tmp_path: Path) -> None:
    digest = hashlib.sha256((EXAMPLES / "reverse/reverse.wasm").read_bytes()).hexdigest()
    good = bundle(host, tmp_path / "good", "reverse", expected=digest)
    assert (good / "sha256").read_text() == f"{digest}\n"
    other = bundled(host, tmp_path / "other", "reverse", expected=digest[::-1])
    assert (other.returncode, f"its SHA-256 digest is {digest}" in other.stderr) == (1, True)
    strange = bundled(host, tmp_path / "strange", "reverse", manifest=str(EXAMPLES / "counter/counter.json"))
    assert (strange.returncode, "is not a JSON object with the name reverse" in strange.stderr) == (1, True)
    stale = tmp_path / "stale.json"
    stale.write_text(json.dumps({"name": "reverse", "sha256": "0" * 64}))
    old = bundled(host, tmp_path / "old", "reverse", manifest=str(stale))
    assert (old.returncode, "its manifest is for another artifact" in old.stderr) == (1, True)
    stale.write_text(json.dumps({"name": "reverse", "sha256": digest}))
    bundle(host, tmp_path / "new", "reverse", manifest=str(stale))
    assert [name for name in ("other", "strange", "old") if (tmp_path / name).exists()] == []


def test_a_signature_beside_the_manifest_comes_along(host: EmbeddedHost, tmp_path: Path) -> None:
    manifest = Path(shutil.copy(EXAMPLES / "reverse/reverse.json", tmp_path))
    (tmp_path / "reverse.json.sig").write_text("beside")
    (tmp_path / "named.sig").write_text("named")
    beside = bundle(host, tmp_path / "beside", "reverse", manifest=str(manifest))
    named = bundle(host, tmp_path / "named", "reverse", manifest=str(manifest), signature=str(tmp_path / "named.sig"))
    assert [(out / "reverse.json.sig").read_text() for out in (beside, named)] == ["beside", "named"]


@pytest.mark.parametrize(
    ("extension", "trust", "signed", "bundles"),
    [("wasm", "warn", False, True), ("wasm", "require", False, False), ("wasm", "require", True, True),
     ("so", "off", False, False), ("so", "off", True, True)],
)  # fmt: skip
def test_a_plugin_that_would_be_refused_without_a_signature_is_not_bundled(
    host: EmbeddedHost, tmp_path: Path, extension: str, trust: str, signed: bool, bundles: bool
) -> None:
    signature = tmp_path / "signature"
    signature.write_text("signed")
    given = str(signature) if signed else ""
    done = bundled(host, tmp_path / "out", "reverse", extension=extension, trust=trust, signature=given)
    assert (done.returncode == 0, "it has no signature" in done.stderr) == (bundles, not bundles), done.stderr
    assert (tmp_path / "out").exists() == bundles


def test_what_is_declared_is_loaded_and_what_no_longer_is_unloaded(host: EmbeddedHost, tmp_path: Path) -> None:
    state = tmp_path / "state"
    reverse = bundle(host, tmp_path / "reverse", "reverse")
    counter = bundle(host, tmp_path / "counter", "counter", grants="kv\n")
    host.load(EXAMPLES / "wordcount/wordcount.wasm")
    for _ in range(2):
        done = sync(host, state, reverse, counter)
        assert done.returncode == 0, done.stderr
        assert loaded(host) == {"reverse", "counter", "wordcount"}
    asked = host.data("plugin-manager", "show", id="counter")["capabilities"]
    assert [(one["name"], one["granted"]) for one in asked] == [("kv", True)]
    done = sync(host, state, reverse)
    assert done.returncode == 0, done.stderr
    assert loaded(host) == {"reverse", "wordcount"}
    host.ok("plugin", "unload", "reverse")  # by hand: there is nothing left to do
    done = sync(host, state)
    assert done.returncode == 0, done.stderr
    assert loaded(host) == {"wordcount"}
    assert (state / "names").read_text() == ""


def granted(host: EmbeddedHost, plugin: str) -> set[str]:
    asked = host.data("plugin-manager", "show", id=plugin)["capabilities"]
    return {capability["name"] for capability in asked if capability["granted"]}


def test_what_is_no_longer_granted_is_revoked(host: EmbeddedHost, tmp_path: Path) -> None:
    manifest = json.loads((EXAMPLES / "counter/counter.json").read_text())
    manifest["capabilities"] = [{"name": name} for name in ("log", "kv", "clock", "events:a", "events:*")]
    path = tmp_path / "asking.json"
    path.write_text(json.dumps(manifest))
    host.load(EXAMPLES / "counter/counter.wasm", manifest=str(path), grant="all")
    counter = bundle(host, tmp_path / "counter", "counter", manifest=str(path))

    def sync_with(*grants: str) -> set[str]:
        (counter / "grants").write_text("".join(f"{name}\n" for name in grants))
        done = sync(host, tmp_path / "state", counter)
        assert done.returncode == 0, done.stderr
        return granted(host, "counter") - {"log"}

    assert sync_with("kv", "events:*") == {"kv", "events:a", "events:*"}
    assert sync_with("kv", "events:b") == {"kv", "events:b"}
    assert sync_with("kv", "events:*") == {"kv", "events:b", "events:*"}
    assert sync_with("all") == {"kv", "clock", "events:a", "events:b", "events:*"}
    assert sync_with() == set()


def test_what_is_no_longer_granted_is_revoked_from_a_plugin_that_cannot_be_loaded_again(
    host: EmbeddedHost, tmp_path: Path
) -> None:
    counter = bundle(host, tmp_path / "counter", "counter", grants="kv\n")
    assert sync(host, tmp_path / "state", counter).returncode == 0
    assert granted(host, "counter") == {"kv"}
    (counter / "sha256").write_text("0" * 64 + "\n")
    (counter / "grants").write_text("")
    assert sync(host, tmp_path / "state", counter).returncode == 1
    assert granted(host, "counter") == set()


def test_one_plugin_that_fails_does_not_keep_back_the_others(host: EmbeddedHost, tmp_path: Path) -> None:
    broken = bundle(host, tmp_path / "broken", "reverse")
    (broken / "sha256").write_text("0" * 64 + "\n")
    done = sync(host, tmp_path / "state", broken, bundle(host, tmp_path / "counter", "counter"))
    assert (done.returncode, "sha256" in done.stderr.lower()) == (1, True), done.stderr
    assert "cannot load the declared plugin reverse" in done.stderr
    assert "counter" in loaded(host)
    assert "reverse" not in loaded(host)
    assert sync(host, tmp_path / "state").returncode == 0
    assert "counter" not in loaded(host)
