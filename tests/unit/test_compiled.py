"""The cache of compilations: what arrives in it."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from circleosd.plugins.compiled import Compiled
from tests.waiting import SECONDS


def test_a_compilation_is_kept_also_when_nobody_waits_for_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncing, may_sync, sync = threading.Event(), threading.Event(), os.fsync

    def slowly(file: int) -> None:
        syncing.set()
        assert may_sync.wait(SECONDS)
        sync(file)

    async def given_up() -> int:
        incoming = Compiled(tmp_path, 1 << 20).incoming("key")
        incoming.write(memoryview(b"code"))
        incoming.finish()
        keeping = asyncio.create_task(incoming.keep())
        assert await asyncio.to_thread(syncing.wait, 10)
        keeping.cancel()
        await asyncio.wait([keeping])
        assert keeping.cancelled()
        incoming.discard()
        other = os.open(os.devnull, os.O_RDONLY)  # must not get the number of what the thread still uses
        may_sync.set()
        return other

    monkeypatch.setattr(os, "fsync", slowly)
    other = asyncio.run(given_up())  # waits for the thread
    os.close(other)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"key": b"code"}


def test_a_compilation_for_which_no_thread_is_free_is_kept_later_also_when_nobody_waits_for_that(
    tmp_path: Path,
) -> None:
    free = threading.Event()

    async def given_up() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, free.wait, SECONDS)
        incoming = Compiled(tmp_path, 1 << 20).incoming("key")
        incoming.write(memoryview(b"code"))
        keeping = asyncio.create_task(incoming.keep())
        await asyncio.sleep(0)
        keeping.cancel()
        await asyncio.wait([keeping])
        incoming.discard()
        free.set()
        assert await busy

    before = os.listdir("/proc/self/fd")
    asyncio.run(given_up())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"key": b"code"}
    assert os.listdir("/proc/self/fd") == before


def test_a_compilation_belongs_to_no_thread_if_none_can_be_started(tmp_path: Path) -> None:
    async def refused() -> None:
        incoming = Compiled(tmp_path, 1 << 20).incoming("key")
        incoming.write(memoryview(b"code"))
        executor = ThreadPoolExecutor(1)
        executor.shutdown()
        asyncio.get_running_loop().set_default_executor(executor)
        with pytest.raises(RuntimeError):
            await incoming.keep()
        incoming.discard()

    before = os.listdir("/proc/self/fd")
    asyncio.run(refused())
    assert [*tmp_path.iterdir()] == []
    assert os.listdir("/proc/self/fd") == before


def test_what_is_not_kept_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()  # which no file replaces
    compiled = Compiled(tmp_path, 1 << 20)

    async def arrive() -> None:
        incoming = compiled.incoming("taken")
        incoming.write(memoryview(b"code"))
        await incoming.keep()

    asyncio.run(arrive())
    incoming = compiled.incoming("other")
    incoming.write(memoryview(b"co"))
    incoming.discard()
    incoming.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_a_compilation_is_not_kept_where_the_disk_takes_it_no_more_and_lets_nothing_go(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(*given: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    incoming = Compiled(tmp_path, 1 << 20).incoming("key")
    incoming.write(memoryview(b"co"))
    monkeypatch.setattr(os, fails, read_only)
    monkeypatch.setattr(os, "unlink", read_only)
    incoming.write(memoryview(b"de"))
    incoming.finish()
    assert incoming.complete == (fails == "fsync")
    if incoming.complete:
        asyncio.run(incoming.keep())
    incoming.discard()
    assert not (tmp_path / "key").exists()
    assert caplog.messages == ["cannot cache a compilation: [Errno 30] Read-only file system"]


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    compiled = Compiled(tmp_path, 8)
    for age, name in enumerate(("newest", "older", "oldest")):
        (tmp_path / name).write_bytes(b"code")
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    used = compiled.open("oldest")
    assert used is not None
    os.close(used)
    compiled.sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["newest", "oldest"]


def test_it_is_logged_that_compilations_are_removed_which_plugins_may_need(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for name in ("one", "two", "three"):
        (tmp_path / name).write_bytes(b"code")
    Compiled(tmp_path, 12).sweep()
    assert not caplog.messages
    Compiled(tmp_path, 4).sweep()
    (said,) = caplog.messages
    assert said.startswith("removed 2 cached compilations, ")
    assert said.endswith("may have 4 bytes (plugins.cache)")
    Compiled(tmp_path, 0).sweep()  # where none are kept, none is missed
    assert [*tmp_path.iterdir()] == []
    assert caplog.messages == [said]


def test_what_was_begun_goes_when_a_manager_starts_and_not_while_one_writes(tmp_path: Path) -> None:
    compiled = Compiled(tmp_path, 0)
    incoming = compiled.incoming("key")
    incoming.write(memoryview(b"co"))
    compiled.sweep()
    assert len([*tmp_path.iterdir()]) == 1
    compiled.sweep(starting=True)
    assert [*tmp_path.iterdir()] == []
    incoming.discard()


@pytest.mark.parametrize(
    "make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/null"), lambda path: path.symlink_to(__file__)]
)
def test_what_is_no_file_is_no_compilation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[Path], object]
) -> None:
    compiled = Compiled(tmp_path, 1 << 20)
    assert compiled.open("key") is None
    assert not caplog.messages
    make(tmp_path / "key")
    assert compiled.open("key") is None
    (said,) = caplog.messages
    assert said.startswith("cannot use a cached compilation: ")
