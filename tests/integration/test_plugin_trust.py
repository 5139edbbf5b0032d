"""Signing, verifying and loading signed plugins, from circlectl to the worker."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core_text import core
from tests.integration.conftest import NewHost
from tests.integration.embedded_host import BIN, EmbeddedHost
from tests.integration.keys import NAMESPACE, new_key, public, sign
from tests.integration.made import write
from tests.native_source import native


class Signer:
    """A host that trusts alice, and a signed plugin."""

    def __init__(self, host: EmbeddedHost, directory: Path) -> None:
        self.host = host
        self.directory = directory
        self.key = new_key(directory, "alice")
        self.signers = host.directory / "config" / "trusted-signers"
        self.signers.write_text(f"alice@example.org {public(self.key)}\n")
        self.path = write(directory, "signed", core(), capabilities=["kv"])
        self.manifest = self.path.with_suffix(".json")
        self.signature = Path(f"{self.manifest}.sig")
        self.sign()

    def sign(self) -> None:
        self.host.ok("plugin", "sign", str(self.path), "--key", str(self.key))

    def refused(self, *more: str) -> str:
        """The reason why the plugin is not loaded."""
        done = self.host.ctl("plugin", "load", str(self.path), *more)
        assert done.returncode in (2, 4), done
        assert self.host.data("plugin-manager", "list") == []
        return done.stderr


@pytest.fixture
def signer(host: EmbeddedHost, tmp_path: Path) -> Iterator[Signer]:
    yield Signer(host, tmp_path)
    for plugin in host.data("plugin-manager", "list"):
        host.data("plugin-manager", "unload", id=plugin["id"])
    for path in (host.directory / "config").glob("*-signers"):
        path.unlink()


def test_a_signed_plugin_is_verified_and_loaded_with_its_signers_name(signer: Signer) -> None:
    verified = signer.host.ok("plugin", "verify", str(signer.path))
    assert "good signature by alice@example.org with ED25519 SHA256:" in verified
    assert signer.host.data("plugin-manager", "list") == []
    assert "signed by alice@example.org" in signer.host.ok("plugin", "load", str(signer.path))
    shown = json.loads(signer.host.ok("plugin", "show", "signed", "--json"))
    assert shown["signer"] == "alice@example.org"
    assert shown["key"].startswith("ED25519 SHA256:")
    row = signer.host.data("plugin-manager", "history", object="signed")[-1]
    assert (row["action"], row["after"]["signer"]) == ("load", "alice@example.org")


def test_ssh_keygen_accepts_our_signature_and_we_accept_its(signer: Signer) -> None:
    done = subprocess.run(
        ["ssh-keygen", "-Y", "verify", "-f", signer.signers, "-I", "alice@example.org", "-n", NAMESPACE,
         "-s", signer.signature],
        input=signer.manifest.read_bytes(), capture_output=True, check=True,
    )  # fmt: skip
    assert b"Good" in done.stdout
    signer.signature.write_bytes(sign(signer.key, signer.manifest.read_bytes()))
    assert "signed by alice@example.org" in signer.host.ok("plugin", "load", str(signer.path))


def test_signing_keeps_what_the_author_wrote_and_fills_in_the_artifact(signer: Signer) -> None:
    manifest = json.loads(signer.manifest.read_text())
    assert list(manifest) == ["name", "version", "capabilities", "sha256", "size"]
    assert manifest["size"] == signer.path.stat().st_size
    before = signer.manifest.read_bytes()
    signer.sign()
    assert signer.manifest.read_bytes() == before
    elsewhere = signer.manifest.rename(signer.manifest.parent / "elsewhere")
    elsewhere.chmod(0o640)
    signer.manifest.symlink_to("elsewhere")
    signer.sign()
    assert (signer.manifest.is_symlink(), elsewhere.stat().st_mode & 0o777) == (True, 0o640)


def test_signing_writes_to_no_other_file_than_manifest_and_signature(signer: Signer, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    signer.signature.unlink()
    signer.signature.symlink_to(precious)  # as it may come with somebody's plugin
    command = [str(BIN / "circlectl"), "plugin", "sign", str(signer.path), "--key", str(signer.key)]
    with subprocess.Popen(["sh", "-c", 'read go; exec "$0" "$@"', *command], stdin=subprocess.PIPE) as signing:
        for path in (signer.manifest, signer.signature):
            path.with_name(f"{path.name}.{signing.pid}").symlink_to(precious)
        signing.communicate(b"\n")
    assert signing.returncode == 0
    assert precious.read_text() == "mine"
    assert not signer.signature.is_symlink()
    assert "signed by alice@example.org" in signer.host.ok("plugin", "load", str(signer.path))


def test_a_changed_artifact_is_refused(signer: Signer) -> None:
    content = bytearray(signer.path.read_bytes())
    content[-1] ^= 1
    signer.path.write_bytes(content)
    assert "its sha256 is" in signer.refused()
    assert "its sha256 is" in signer.refused("--trust")
    signer.path.write_bytes(content + b"\0")
    assert "bytes, the manifest says" in signer.refused()


def test_an_artifact_can_be_named_by_its_digest(signer: Signer) -> None:
    digest = json.loads(signer.manifest.read_text())["sha256"]
    assert "sha256 is" in signer.refused("--sha256", "0" * 64)
    signer.host.ok("plugin", "load", str(signer.path), "--sha256", digest)


def test_a_changed_manifest_is_refused(signer: Signer) -> None:
    signer.manifest.write_text(signer.manifest.read_text().replace('"kv"', '"clock"'))
    assert "changed after signing" in signer.refused()
    assert "changed after signing" in signer.refused("--trust")


def test_an_unknown_signer_is_refused_unless_whoever_loads_says_otherwise(signer: Signer, tmp_path: Path) -> None:
    signer.key = new_key(tmp_path, "mallory")
    signer.sign()
    assert "trusted-signers does not name" in signer.refused()
    done = signer.host.ctl("plugin", "load", str(signer.path), "--trust")
    assert done.returncode == 0
    assert "not signed by a trusted signer" in done.stdout
    assert "does not name" in done.stderr


def test_a_revoked_key_is_refused(signer: Signer) -> None:
    (signer.signers.parent / "revoked-signers").write_text(public(signer.key) + "\n")
    assert "is revoked" in signer.refused()
    assert "is revoked" in signer.refused("--trust")


@pytest.mark.parametrize("named", [[], ["sha256"], ["size"]])
def test_a_signed_manifest_without_the_artifacts_digest_and_size_is_refused(signer: Signer, named: list[str]) -> None:
    complete = json.loads(signer.manifest.read_text())
    write(signer.directory, "signed", core(), **{key: complete[key] for key in named})
    signer.signature.write_bytes(sign(signer.key, signer.manifest.read_bytes()))
    assert "lacks the artifact's sha256" in signer.refused()


def test_an_upgrade_does_not_lose_its_signer_unnoticed(signer: Signer) -> None:
    for _ in range(2):  # one that is signed too is an upgrade like any
        assert "signed by alice@example.org" in signer.host.ok("plugin", "load", str(signer.path))
    signer.signature.unlink()
    refused = signer.host.ctl("plugin", "load", str(signer.path))
    assert refused.returncode == 4
    assert "is signed by alice@example.org, but this one is not" in refused.stderr
    signer.host.ok("plugin", "load", str(signer.path), "--trust")


def test_where_signatures_are_not_looked_at_an_upgrade_needs_none(new_host: NewHost, tmp_path: Path) -> None:
    signer = Signer(new_host({}), tmp_path)
    signer.host.ok("plugin", "load", str(signer.path))
    (signer.host.directory / "config" / "config.toml").write_text('[plugins]\ntrust = "off"\n')
    os.kill(signer.host.pid("plugin-manager"), signal.SIGKILL)
    signer.signature.unlink()
    signer.host.ok("plugin", "load", str(signer.path))
    assert signer.host.data("plugin-manager", "show", id="signed")["signer"] is None


def test_verify_takes_other_signers_and_says_what_is_missing(signer: Signer, tmp_path: Path) -> None:
    other = tmp_path / "others"
    other.write_text(f"bob@example.org {public(signer.key)}\n")
    assert "good signature by bob" in signer.host.ok("plugin", "verify", str(signer.path), "--signers", str(other))
    other.write_bytes(b" " * ((256 << 10) + 1))
    refused = signer.host.ctl("plugin", "verify", str(signer.path), "--signers", str(other))
    assert refused.stderr.startswith(f"circlectl: {other} is larger than 262144 bytes"), refused
    signer.signature.unlink()
    refused = signer.host.ctl("plugin", "verify", str(signer.path))
    assert refused.returncode == 4
    assert "is not signed" in refused.stderr


def test_a_host_that_requires_signatures_loads_nothing_else(new_host: NewHost, tmp_path: Path) -> None:
    signer = Signer(new_host({"CIRCLEOSD_PLUGINS_TRUST": "require"}), tmp_path)
    signer.host.ok("plugin", "load", str(signer.path))
    path = write(tmp_path, "unsigned", core())
    for more in ([], ["--trust"]):
        refused = signer.host.ctl("plugin", "load", str(path), *more)
        assert refused.returncode == 4
        assert "plugins.trust = require" in refused.stderr


def test_native_code_runs_only_signed_or_on_somebodys_word(signer: Signer, tmp_path: Path) -> None:
    host = signer.host
    path = write(tmp_path, "greeter", native(""), plugin_type="native")
    refused = host.ctl("plugin", "load", str(path))
    assert refused.returncode == 4
    assert "--trust" in refused.stderr
    host.ok("plugin", "load", str(path), "--trust")
    assert host.ok("plugin", "invoke", "greeter", "echo", "hello") == "hello\n"
    host.unload("greeter")
    host.ok("plugin", "sign", str(path), "--key", str(signer.key))
    assert "signed by alice" in host.ok("plugin", "load", str(path))


def test_a_signature_is_found_beside_what_a_raw_request_names(signer: Signer) -> None:
    reply = signer.host.call("plugin-manager", {"action": "load", "path": str(signer.path)})
    assert reply["data"]["signer"] == "alice@example.org"
    inline = json.loads(signer.manifest.read_text())
    reply = signer.host.call("plugin-manager", {"action": "load", "path": str(signer.path), "manifest": inline})
    assert reply["error"] == "denied"  # what is signed are the bytes of a file


def test_a_signature_that_is_named_is_looked_at_wherever_it_is(signer: Signer) -> None:
    elsewhere = signer.signature.rename(signer.directory / "elsewhere")
    for action in ("verify", "load"):
        said = signer.host.ok("plugin", action, str(signer.path), "--signature", str(elsewhere))
        assert "alice@example.org" in said
    request = {"action": "load", "path": str(signer.path)}
    assert signer.host.call("plugin-manager", {**request, "signature": str(elsewhere)})["data"]["signer"]
    assert signer.host.call("plugin-manager", {**request, "signature": str(signer.signature)})["error"] == "not-found"


def test_signing_says_what_is_wrong(signer: Signer, tmp_path: Path) -> None:
    alone = tmp_path / "alone.wasm"
    shutil.copy(signer.path, alone)
    os.mkfifo(pipe := tmp_path / "pipe.wasm")
    for arguments, status, reason in (
        ([str(pipe), "--key", str(signer.key)], 2, f"{pipe} is not a regular file"),
        ([str(signer.path), "--key", str(signer.key), "--manifest", str(pipe)], 2, f"{pipe} is not a regular file"),
        ([str(alone), "--key", str(signer.key)], 5, "without a manifest"),
        ([str(signer.path), "--key", "/nonexistent"], 5, "no such key: /nonexistent"),
        ([str(signer.path), "--key", str(signer.manifest)], 2, f"cannot sign with {signer.manifest}: "),
        ([str(tmp_path / "none.wasm"), "--key", str(signer.key)], 5, f"no such file: {tmp_path}/none.wasm"),
        ([str(signer.path)], 2, "needs --key"),
        ([str(signer.manifest), "--key", str(signer.key)], 2, "is not a plugin"),
        (
            [str(signer.path), "--key", str(signer.key), "--manifest", str(tmp_path)],
            2,
            f"circlectl: cannot read the manifest {tmp_path}: Is a directory [bad-request]",
        ),
    ):
        done = signer.host.ctl("plugin", "sign", *arguments)
        assert done.returncode == status, arguments
        assert reason in done.stderr


def test_a_manifest_that_cannot_be_signed_is_left_as_it_is(signer: Signer) -> None:
    for content in ('{"name":"a","description":"\\ud800"}', '{"name":"a","size":NaN}', "[" * 100_000):
        signer.manifest.write_text(content)
        done = signer.host.ctl("plugin", "sign", str(signer.path), "--key", str(signer.key))
        assert done.returncode == 2
        assert done.stderr.startswith("circlectl: cannot read the manifest ")
        assert done.stderr.count("\n") == 1
        assert signer.manifest.read_text() == content


def test_a_manifest_that_no_host_would_load_is_not_signed(signer: Signer) -> None:
    signed = signer.signature.read_bytes()
    for manifest, reason in (
        ({"name": "No Name"}, "name: 'No Name' is not a plugin name"),
        ({"name": "a", "nme": "b"}, "nme: no such member"),
        ({"name": "a", "capabilities": ["kv", "kv"]}, "asks for 'kv' twice"),
        ({"name": "a", "plugin_type": "native"}, 'needs "plugin_type": "wasm"'),
        ({"name": "a", "config": {"b": "c" * (64 << 10)}}, "is larger than 65536 bytes"),
    ):
        signer.manifest.write_text(json.dumps(manifest))
        refused = signer.host.call("plugin-manager", {"action": "load", "path": str(signer.path)})
        assert reason in refused["message"]
        done = signer.host.ctl("plugin", "sign", str(signer.path), "--key", str(signer.key))
        assert done.returncode == 2
        assert reason in done.stderr
        assert json.loads(signer.manifest.read_text()) == manifest
        assert signer.signature.read_bytes() == signed


def test_a_manifest_with_a_member_that_stands_twice_is_not_signed_without_one_of_them(signer: Signer) -> None:
    content = '{"name":"a","limits":{"time":1},"limits":{"memory":65536}}'
    signer.manifest.write_text(content)
    done = signer.host.ctl("plugin", "sign", str(signer.path), "--key", str(signer.key))
    assert done.returncode == 2
    assert "'limits' appears twice" in done.stderr
    assert signer.manifest.read_text() == content


def test_a_signature_that_cannot_be_put_in_its_place_leaves_nothing_behind(signer: Signer) -> None:
    signer.signature.unlink()
    signer.signature.mkdir()
    done = signer.host.ctl("plugin", "sign", str(signer.path), "--key", str(signer.key))
    assert done.returncode == 2
    assert f"cannot write {signer.signature}: Is a directory" in done.stderr
    assert [path.name for path in signer.directory.glob("*.json.sig*")] == [signer.signature.name]


def test_who_is_refused_for_a_signature_is_not_told_to_log_in(signer: Signer) -> None:
    signer.signers.unlink()
    refused = signer.host.ctl("plugin", "verify", str(signer.path))
    assert refused.returncode == 4
    assert "add it with its owner to trusted-signers" in refused.stderr
    assert "log in" not in refused.stderr
