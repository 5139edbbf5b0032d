"""Reading what a request brings along, where the request is given up meanwhile."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from circleosd.api.plugins import Load
from circleosd.config import PluginSettings
from circleosd.errors import BadRequest
from circleosd.plugins import store
from circleosd.plugins.files import Given
from circleosd.plugins.loading import Loading
from circleosd.plugins.signatures import Signatures
from circleosd.plugins.store import Artifacts


def test_an_artifact_that_is_still_being_copied_keeps_its_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = tmp_path / "p.wasm"
    artifact.write_bytes(b"\0asm" + bytes(100))
    waits, goes_on, ended = threading.Event(), threading.Event(), threading.Event()
    read, found, seen = store._read, [], []

    def slow_read(source: int) -> bytes:
        waits.set()
        goes_on.wait(5)
        seen.append(source)
        found.append(read(source))
        ended.set()
        return b""

    monkeypatch.setattr(store, "_read", slow_read)
    loading = Loading(Artifacts(tmp_path / "store"), Signatures([], "off", os.environ), PluginSettings())

    async def load() -> None:
        async with loading.candidate(Given({}, os.getpid()), Load(path=str(artifact))):
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

    asyncio.run(given_up())
    assert found == [artifact.read_bytes()]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(seen[0])


def test_the_files_of_a_request_that_has_ended_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "p.wasm").write_bytes(b"\0asm")
    passed = os.open(tmp_path / "p.wasm", os.O_RDONLY)
    files = Given({"path": passed}, os.getpid())
    os.close(files.open("path", "p.wasm"))
    files.close()
    other = os.open(os.devnull, os.O_RDONLY)  # gets the number of what was closed
    for field in ("path", "manifest"):
        with pytest.raises(BadRequest, match="has ended"):
            files.open(field, str(tmp_path / "p.wasm"))
    os.close(other)
