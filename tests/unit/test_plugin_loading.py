"""From the files of a request to a plugin that may be loaded."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from pathlib import Path

import pytest

from circleosd.api.plugins import Load, Verified, Verify
from circleosd.config import PluginSettings
from circleosd.errors import BadRequest, CircleError, Limit, NotFound, Unavailable
from circleosd.plugins import artifacts
from circleosd.plugins.artifacts import Artifacts
from circleosd.plugins.failures import WorkerGone
from circleosd.plugins.files import Given
from circleosd.plugins.loading import VERIFIED_AT_ONCE, Loading
from circleosd.plugins.runner import Runners
from circleosd.plugins.signatures import Signatures, Signer
from circleosd.plugins.workerunits import WorkerUnits
from circleosd.policy import Peer
from circleosd.wire import encode
from tests.unit.fakes import with_worker
from tests.waiting import SECONDS, until

US = Peer(os.getuid(), os.getgid(), os.getpid())
WASM = b"\0asm\1\0\0\0"


def test_an_artifact_that_is_still_being_copied_keeps_its_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = tmp_path / "p.wasm"
    artifact.write_bytes(b"\0asm" + bytes(100))
    waits, goes_on, ended = threading.Event(), threading.Event(), threading.Event()
    read, found, seen = artifacts._read, [], []

    def slow_read(source: int, offset: int) -> bytes:
        waits.set()
        goes_on.wait(SECONDS)
        seen.append(source)
        found.append(read(source, offset))
        ended.set()
        return b""

    monkeypatch.setattr(artifacts, "_read", slow_read)
    loading = Loading(Artifacts(tmp_path / "store"), Signatures([], os.environ), PluginSettings())

    async def load() -> None:
        async with loading.candidate(Given({}, US), Load(path=str(artifact))):
            pytest.fail("it was given up")

    async def given_up() -> None:
        task = asyncio.create_task(load())
        await asyncio.to_thread(waits.wait)
        task.cancel()
        await asyncio.wait([task])
        other = os.open(os.devnull, os.O_RDONLY)  # may get the number of what was closed
        goes_on.set()
        await asyncio.to_thread(ended.wait)
        os.close(other)
        async with asyncio.timeout(SECONDS):
            await until(lambda: not [*(tmp_path / "store").iterdir()])  # the copy that nobody wants any more

    asyncio.run(given_up())
    assert found == [artifact.read_bytes()]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(seen[0])


@pytest.mark.parametrize("kept", [True, False])
def test_what_a_disk_does_not_let_go_fails_no_load_and_takes_the_place_of_no_error(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    artifact = tmp_path / "p.wasm"
    artifact.write_bytes(WASM)
    artifacts = Artifacts(tmp_path / "store")
    loading = Loading(artifacts, Signatures([], os.environ), PluginSettings())

    async def load() -> None:
        async with loading.candidate(Given({}, US), Load(path=str(artifact))) as candidate:
            os.close(artifacts.open(candidate.staged.path.name))
            monkeypatch.setattr(Path, "unlink", read_only)
            if not kept:
                raise Limit("something else")
            artifacts.keep(candidate.staged)

    with pytest.raises(Limit, match="something else") if not kept else contextlib.nullcontext():
        asyncio.run(load())
    assert "cannot remove an unused artifact: [Errno 30] Read-only file system" in caplog.text


@pytest.mark.parametrize(
    ("number", "error"), [(errno.EIO, Unavailable), (errno.ENOENT, Unavailable), (errno.EMFILE, Limit)]
)
def test_an_artifact_that_cannot_be_opened_is_told_with_the_reason(
    number: int, error: type[CircleError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, flags: int) -> int:
        raise OSError(number, os.strerror(number), str(path))

    artifacts = Artifacts(tmp_path)
    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(error, match=os.strerror(number)):
        artifacts.open("digest")


def test_a_pipe_in_the_place_of_an_artifact_keeps_nobody_waiting_and_no_descriptor(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "digest")
    artifacts = Artifacts(tmp_path)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(Unavailable, match="not a regular file"):
        artifacts.open("digest")
    assert os.listdir("/proc/self/fd") == before


def test_an_artifact_may_be_as_large_as_the_setting_says_and_no_larger(tmp_path: Path) -> None:
    (tmp_path / "p.wasm").write_bytes(WASM)
    artifacts = Artifacts(tmp_path / "store")
    with (tmp_path / "p.wasm").open("rb") as file:
        with pytest.raises(Limit, match=r"larger than 7 bytes \(plugins.max_artifact\)"):
            artifacts.stage(file.fileno(), len(WASM) - 1)
        assert [*(tmp_path / "store").iterdir()] == []
        assert artifacts.stage(file.fileno(), len(WASM)).size == len(WASM)


@pytest.mark.parametrize(
    ("number", "error", "step"),
    [
        (errno.EACCES, BadRequest, "; this service opens it with its own rights, so pass its descriptor"),
        (errno.EMFILE, Limit, ""),
    ],
)
def test_a_file_that_a_request_names_and_cannot_be_opened_is_told_with_the_reason(
    number: int, error: type[CircleError], step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str, flags: int) -> int:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(error, match=f"{os.strerror(number)}{step}"):
        Given({}, US).open("path", "p.wasm")


def test_the_files_of_a_request_that_has_ended_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "p.wasm").write_bytes(b"\0asm")
    passed = os.open(tmp_path / "p.wasm", os.O_RDONLY)
    files = Given({"path": passed}, US)
    os.close(files.open("path", "p.wasm"))
    files.close()
    other = os.open(os.devnull, os.O_RDONLY)  # gets the number of what was closed
    for field in ("path", "manifest"):
        with pytest.raises(BadRequest, match="has ended"):
            files.open(field, str(tmp_path / "p.wasm"))
    os.close(other)


class Waiting(Signatures):
    """Signatures that nobody has verified yet."""

    def __init__(self) -> None:
        super().__init__([], {})
        self.asked = 0

    async def verify(self, manifest: bytes, signature: bytes, signers: bytes | None = None) -> Signer:
        self.asked += 1
        await asyncio.Event().wait()
        raise AssertionError("nobody does")


def test_of_verifications_at_once_few_have_a_copy_and_a_load_does_not_wait_for_them(tmp_path: Path) -> None:
    plugin = tmp_path / "plugin.wasm"
    plugin.write_bytes(WASM)
    digest = "93a44bbb96c751218e4c00d479e4c14358122a389acca16205b1e4d0dc5f9476"
    plugin.with_suffix(".json").write_bytes(encode({"name": "plugin", "sha256": digest, "size": len(WASM)}))
    (tmp_path / "plugin.json.sig").write_bytes(b"-")
    store, files, nobody = tmp_path / "store", Given({}, US), Waiting()
    loading = Loading(Artifacts(store), nobody, PluginSettings())

    async def scenario() -> int:
        async with asyncio.timeout(SECONDS):
            asking = [asyncio.create_task(loading.verify(files, Verify(str(plugin)), None)) for _ in range(20)]
            await until(lambda: nobody.asked >= VERIFIED_AT_ONCE)
            async with loading.candidate(files, Load(str(plugin))):
                copies = len([*store.iterdir()])
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            return copies

    assert asyncio.run(scenario()) == VERIFIED_AT_ONCE + 1
    assert not [*store.iterdir()]


def test_who_verifies_much_at_once_leaves_places_for_others(tmp_path: Path) -> None:
    loading = Loading(Artifacts(tmp_path / "store"), Waiting(), PluginSettings())

    async def verify(uid: int) -> Verified:
        return await loading.verify(Given({}, US), Verify(str(tmp_path / "absent.wasm")), uid)

    async def scenario() -> list[object]:
        return await asyncio.gather(*(verify(uid) for uid in [4242] * 20 + [4243]), return_exceptions=True)

    found = asyncio.run(scenario())
    assert [isinstance(item, Limit) for item in found] == [False] * 16 + [True] * 4 + [False]
    assert isinstance(found[-1], NotFound)


def test_a_load_that_is_given_up_while_it_asks_why_its_worker_ended_leaves_no_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, removed = asyncio.Event(), list[str]()

    async def dies(*about: object) -> None:
        raise WorkerGone("the worker of p ended while it loaded the plugin")

    async def no_answer(*about: object) -> None:
        asked.set()
        await asyncio.Event().wait()

    async def remove(units: WorkerUnits, instance: str) -> None:
        removed.append(instance)

    monkeypatch.setattr(Runners, "_connect", dies)
    monkeypatch.setattr(WorkerUnits, "held_back", no_answer)
    monkeypatch.setattr(WorkerUnits, "remove", remove)

    async def given_up() -> None:
        runners, plugin = with_worker(tmp_path, None)
        loading = asyncio.create_task(runners.probe(plugin, -1, upgrade=True))
        async with asyncio.timeout(SECONDS):
            await asked.wait()
        loading.cancel()
        await asyncio.wait([loading])
        assert loading.cancelled()

    asyncio.run(given_up())
    assert removed == ["p.staged"]
