"""The plugins of nixos-test/scenario.py in the embedded mode, where the worker's own limits hold them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import PROJECT
from tests.integration.embedded_host import EmbeddedHost


@pytest.fixture(scope="module")
def hostile(host: EmbeddedHost, tmp_path_factory: pytest.TempPathFactory) -> EmbeddedHost:
    """A host with both plugins loaded."""
    out = tmp_path_factory.mktemp("hostile")
    wat2wasm = f"{sys.executable} {PROJECT}/plugins/wat2wasm.py"
    make = ["make", "--silent", "-C", f"{PROJECT}/nixos-test/plugins", f"OUT={out}", "CC=gcc", f"WAT2WASM={wat2wasm}"]
    subprocess.run(make, check=True, stdin=subprocess.DEVNULL)
    host.load(out / "hostile-wasm.wasm")
    host.load(out / "hostile-native.so", trust=True)
    return host


@pytest.mark.parametrize("plugin", ["hostile-wasm", "hostile-native"])
@pytest.mark.parametrize(("function", "status"), [("crash", 10), ("hang", 9), ("eat", 0)])
def test_whatever_one_call_does_the_next_is_answered_soon(
    hostile: EmbeddedHost, plugin: str, function: str, status: int
) -> None:
    assert hostile.ok("plugin", "invoke", plugin, "ok", "before") == "before\n"
    done = hostile.ctl("plugin", "invoke", plugin, function, "x")
    assert done.returncode == status, done
    begun = time.monotonic()
    assert hostile.ok("plugin", "invoke", plugin, "ok", "after") == "after\n"
    assert time.monotonic() - begun < 20, "the next call waited for the worker that had failed"


def test_a_native_plugin_makes_no_process_no_socket_and_no_file(hostile: EmbeddedHost, tmp_path: Path) -> None:
    said = hostile.ok("plugin", "invoke", "hostile-native", "escape")
    assert said.split("\n")[:3] == ["fork refused", "exec refused", "socket refused"]
    paths = [tmp_path / "x", "/tmp/x", "/var/tmp/x", "/dev/shm/x", hostile.directory / "state/x", "/proc/self/comm"]
    assert hostile.ok("plugin", "invoke", "hostile-native", "scribble", "\n".join(map(str, paths))).strip() == ""
