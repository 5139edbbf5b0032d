"""The store's disk does not do its part: the error says so with a code of its own, and what was loaded goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core_text import core
from tests.integration.embedded_host import EmbeddedHost
from tests.integration.made import write


@pytest.fixture
def store(host: EmbeddedHost, tmp_path: Path) -> Iterator[Path]:
    """The directory of the artifacts of a host that has loaded `echo`."""
    host.load(write(tmp_path, "echo", core()))
    digest = host.data("plugin-manager", "show", id="echo")["digest"]
    yield next(host.directory.rglob(digest)).parent
    host.unload("echo")


def _renewed(host: EmbeddedHost) -> dict[str, object]:
    """The reply to a call that needs a new worker."""
    host.ok("plugin", "disable", "echo")
    host.ok("plugin", "enable", "echo")
    return host.invoke("echo", "echo", "x")


def test_a_missing_artifact_is_named_and_does_not_count_against_its_plugin(host: EmbeddedHost, store: Path) -> None:
    digest = host.data("plugin-manager", "show", id="echo")["digest"]
    away = store.parent / "away"
    (store / digest).rename(away)
    try:
        reply = _renewed(host)
        assert reply["error"] == "unavailable", reply
        assert f"{digest} in {store}: No such file or directory; load the plugin again" in str(reply["message"])
        (store / digest).mkdir()
        reply = _renewed(host)
        assert reply["error"] == "unavailable", reply
        assert "not a regular file" in str(reply["message"])
        (store / digest).rmdir()
    finally:
        away.rename(store / digest)
    assert host.data("plugin-manager", "show", id="echo")["failures"] == 0
    assert _renewed(host)["data"] == "x"


def test_a_store_that_takes_no_artifact_is_unavailable_until_it_does(
    host: EmbeddedHost, store: Path, tmp_path: Path
) -> None:
    other = str(write(tmp_path, "other", core()))
    away = store.parent / "away"
    store.rename(away)
    try:
        done = host.ctl("plugin", "load", other)
        assert done.returncode == 12, done
        assert f"cannot store the artifact in {store}: No such file or directory [unavailable]" in done.stderr
        assert "start CircleOSD" not in done.stderr
    finally:
        away.rename(store)
    host.ok("plugin", "load", other)
    host.unload("other")


def test_what_is_no_artifact_in_the_store_keeps_nobody_from_loading_or_starting(
    host: EmbeddedHost, store: Path, tmp_path: Path
) -> None:
    (store / "lost+found" / "deep").mkdir(parents=True)
    try:
        host.load(write(tmp_path, "other", core()))
        host.stop()
        host.start()
        assert host.ok("plugin", "invoke", "other", "echo", "still here") == "still here\n"
        host.unload("other")
    finally:
        shutil.rmtree(store / "lost+found")


@pytest.mark.parametrize("instead", ["directory", "link", "pipe"])
def test_what_is_no_compilation_is_compiled_anew(host: EmbeddedHost, store: Path, instead: str) -> None:
    found = [path for path in host.directory.rglob("cache/circleosd/plugins/*") if path.is_file()]
    assert found
    for path in found:
        path.unlink()
        if instead == "directory":
            path.mkdir()
        elif instead == "link":
            path.symlink_to("/etc/passwd")
        else:
            os.mkfifo(path)
    try:
        assert _renewed(host)["data"] == "x", host.log
    finally:
        for path in found:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
