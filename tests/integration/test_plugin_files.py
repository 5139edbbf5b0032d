"""What a load request names that is no artifact: an error with the reason, and nothing waits or grows."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from array import array
from pathlib import Path
from typing import Any

import pytest

from tests.core_text import core
from tests.door import acting_as
from tests.integration.embedded_host import EmbeddedHost, read_reply
from tests.integration.made import write
from tests.integration.people import ALICE, PLUGINS, ask, create, login
from tests.native_source import native
from tests.wasi_text import command


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("/", "bad-request", "not a regular file"),
        (".", "bad-request", "not a regular file"),
        ("..", "bad-request", "not a regular file"),
        ("/dev/zero", "bad-request", "not a regular file"),
        ("pipe.wasm", "bad-request", "not a regular file"),
        ("circle.wasm", "bad-request", "symbolic links"),
        ("x\0y.wasm", "bad-request", "embedded null"),
        ("sparse.wasm", "limit", "larger than 67108864 bytes"),
        ("empty.wasm", "bad-request", "it is empty"),
        ("/proc/self/maps", "bad-request", "it is empty"),
        ("nothing.wasm", "not-found", "no such file"),
    ],
)
def test_what_is_no_artifact_is_refused_with_the_reason(
    host: EmbeddedHost, tmp_path: Path, name: str, error: str, reason: str
) -> None:
    os.mkfifo(tmp_path / "pipe.wasm")
    (tmp_path / "circle.wasm").symlink_to("circle.wasm")
    (tmp_path / "empty.wasm").touch()
    with (tmp_path / "sparse.wasm").open("wb") as sparse:
        sparse.truncate(1 << 40)
    path = name if name.startswith(("/", ".")) else f"{tmp_path}/{name}"
    reply = host.call("plugin-manager", {"action": "load", "path": path})
    assert reply["error"] == error, reply
    assert reason in reply["message"]
    assert [*host.directory.rglob(".staged-*")] == []
    if "\0" not in path:  # which no argument can hold
        descriptors = Path(f"/proc/{host.pid('plugin-manager')}/fd").iterdir()
        assert os.path.realpath(path) not in map(os.path.realpath, descriptors)
        done = host.ctl("plugin", "load", path)
        assert f"[{error}]" in done.stderr, done
        assert reason in done.stderr
        assert "'path'" not in done.stderr


def test_a_manifest_that_was_changed_is_told_by_its_digest_and_on_record(host: EmbeddedHost, tmp_path: Path) -> None:
    """The version, and the artifact with its digest, may stay the same."""
    digests = []
    for url in ("one", "two"):
        path = write(tmp_path, "changed", core(), config={"url": url})
        host.load(path)
        (listed,) = (item for item in host.data("plugin-manager", "list") if item["id"] == "changed")
        digests.append(hashlib.sha256(path.with_suffix(".json").read_bytes()).hexdigest())
        assert listed["manifest_digest"] == digests[-1]
    row = host.data("plugin-manager", "history", object="changed")[-1]
    assert [row[when]["manifest_digest"] for when in ("before", "after")] == digests
    inline = []
    for url in ("one", "two"):
        manifest = {"name": "changed", "config": {"url": url}}
        inline.append(host.data("plugin-manager", "load", path=str(path), manifest=manifest)["manifest_digest"])
    assert len({*digests, *inline}) == 4
    host.unload("changed")


@pytest.mark.parametrize(("suffix", "field"), [(".json", "manifest"), (".json.sig", "signature")])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("pipe", "cannot read {}"), ("directory", "cannot read {}"), ("link", "no such file"),
        ("large", "is larger than"),
    ],
)  # fmt: skip
def test_what_is_beside_an_artifact_is_not_passed_over(
    host: EmbeddedHost, tmp_path: Path, suffix: str, field: str, kind: str, reason: str
) -> None:
    path = write(tmp_path, "accompanied", core())
    beside = path.with_suffix(suffix)
    beside.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(beside)
    elif kind == "directory":
        beside.mkdir()
    elif kind == "large":
        beside.write_bytes(b" " * 70_000)
    else:
        beside.symlink_to("nowhere")
    done = host.ctl("plugin", "load", str(path))
    assert done.returncode != 0
    assert reason.format(field) in done.stderr
    reply = host.call("plugin-manager", {"action": "load", "path": str(path)})
    assert reason.format(field) in reply["message"]


def test_a_webassembly_plugin_has_the_function_that_its_manifest_names(host: EmbeddedHost, tmp_path: Path) -> None:
    refused = host.ctl("plugin", "load", str(write(tmp_path, "entered", core(), entry="handle")))
    assert refused.returncode == 2
    assert "the manifest's entry 'handle' is not a function of the plugin; it has: echo" in refused.stderr
    assert host.data("plugin-manager", "list") == []
    host.load(write(tmp_path, "entered", core(), entry="echo"))
    host.unload("entered")


def test_what_is_shown_of_an_instance_is_what_the_plugin_has(host: EmbeddedHost, tmp_path: Path) -> None:
    artifacts = {
        "core": (core(), "shared"),
        "wasi": (command(""), "fresh"),  # also where the manifest says otherwise
        "native": (native(""), "shared"),
    }
    for name, (artifact, instance) in artifacts.items():
        asked: dict[str, Any] = {"plugin_type": "native"} if name == "native" else {"instance": "shared"}
        host.load(write(tmp_path, name, artifact, **asked), trust=True)
        assert host.data("plugin-manager", "show", id=name)["instance"] == instance, name
        host.unload(name)


def test_a_file_that_is_passed_is_read_from_its_beginning(host: EmbeddedHost, tmp_path: Path) -> None:
    path = write(tmp_path, "looked-at", core())
    request = {"action": "load", "path": "a", "manifest": "m", "files": ["path", "manifest"]}
    with path.open("rb") as artifact, path.with_suffix(".json").open("rb") as manifest, host.connect(PLUGINS) as sock:
        request["sha256"] = hashlib.sha256(artifact.read()).hexdigest()
        manifest.seek(1)
        socket.send_fds(sock, [json.dumps(request).encode() + b"\n"], [artifact.fileno(), manifest.fileno()])
        reply = read_reply(sock)
    assert reply["ok"], reply
    host.unload("looked-at")


@pytest.mark.usefixtures("other_users")
def test_nobody_reads_files_with_the_rights_of_the_service(host: EmbeddedHost, tmp_path: Path) -> None:
    path = write(tmp_path, "secret", core())
    create(host, "alice", role="admin")
    token = login(host, "alice", ALICE)
    messages = set()
    for name in (path, tmp_path / "nothing.wasm", tmp_path):
        for action, manifest in (("verify", str(path.with_suffix(".json"))), ("load", {"name": "secret"})):
            for more in ({}, {"manifest": manifest}):
                reply = ask(host, ALICE, PLUGINS, action, path=str(name), token=token, **more)
                assert reply["error"] == "bad-request", reply
                messages.add(reply["message"])
    assert messages == {"path names a file that this service does not open for you: pass its descriptor"}

    def passing(**more: Any) -> dict[str, Any]:
        request: dict[str, Any] = {"action": "load", "path": str(path), "files": ["path"], "token": token, **more}
        with acting_as(ALICE):
            sock = host.connect(PLUGINS)
        with sock, path.open("rb") as file:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [file.fileno()] * len(request["files"])))
            sock.sendmsg([json.dumps(request).encode() + b"\n"], [rights])
            return read_reply(sock)

    descriptors = Path(f"/proc/{host.pid(PLUGINS)}/fd")
    before = len([*descriptors.iterdir()])
    for _ in range(5):
        assert "manifest names a file" in passing(manifest=str(path.with_suffix(".json")))["message"]
        assert "files names path twice" in passing(files=["path", "path"])["message"]
    assert len([*descriptors.iterdir()]) < before + 5
    assert passing(manifest={"name": "secret"})["ok"]
    assert json.loads(path.with_suffix(".json").read_text())["version"] == "1"
    assert passing()["data"]["version"] == "0"  # what is beside the path that was passed is not looked at
    host.unload("secret")
