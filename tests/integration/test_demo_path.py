"""The main job from end to end, through circlectl and real processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import textwrap
from pathlib import Path

import pytest

from tests import PROJECT
from tests.core_text import wat
from tests.integration.embedded_host import BIN, EmbeddedHost


def test_a_plugin_is_loaded_called_and_unloaded(host: EmbeddedHost) -> None:
    host.ok("plugin", "load", "plugins/example.wasm")
    assert "example" in host.ok("plugin", "list")
    assert host.ok("plugin", "invoke", "example", "handle", "hello") == "5 bytes, 5 characters, 1 word: hello\n"
    assert host.ok("plugin", "unload", "example") == "unloaded example 1.0.0\n"
    gone = host.ctl("plugin", "invoke", "example", "handle", "hello")
    assert gone.returncode == 5
    assert "no plugin example is loaded" in gone.stderr


def test_the_messages_of_the_design_work_through_a_raw_socket(host: EmbeddedHost) -> None:
    lines = [
        '{"action":"load","path":"./plugins/example.wasm","manifest":null}',
        '{"action":"list"}',
        '{"action":"invoke","id":"example","func":"handle","payload":"hello"}',
        '{"action":"unload","id":"example"}',
    ]
    done = subprocess.run(
        ["socat", "-t30", "-", f"UNIX-CONNECT:{host.runtime}/plugin-manager.sock"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        cwd=PROJECT,
        timeout=60,
        check=True,
    )
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert [reply["ok"] for reply in replies] == [True] * 4, replies
    assert [list(reply) for reply in replies] == [["ok", "message", "data"]] * 4
    assert replies[1]["data"][0]["id"] == "example"
    assert replies[2]["data"] == "5 bytes, 5 characters, 1 word: hello"


DEMO = PROJECT / "scripts/demo"
# Starts that are slower than any should be.
SLOW = """
import sys, time
if "up" in sys.orig_argv:
    time.sleep(6)
"""


@pytest.mark.skipif(not (PROJECT / ".venv/bin/circlectl").exists(), reason="needs the .venv that make setup makes")
def test_the_demo_prints_what_readme_shows_of_it_however_slow_the_host_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([DEMO], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stderr == ""
    block = (PROJECT / "README.md").read_text(encoding="utf-8").partition("The output of `make demo`, shortened:")[2]
    told = [line[4:] for line in block.partition("\n## ")[0].splitlines() if line.startswith("    ")]
    assert len([line for line in told if line.startswith("$ circlectl ")]) > 5
    printed = {*map(alike, done.stdout.splitlines())}
    assert [line for line in told if alike(line) not in printed] == []
    (place,) = re.findall(r"embedded mode, in (.+)", done.stdout)
    assert not Path(place).exists()


def alike(line: str) -> str:
    """A line without what differs from run to run: when it was, whose uid, how wide a column is."""
    return " ".join(re.sub(r"^\d{4}-\d\d-\d\d [\d:]{8}|(?<=/)\d+(?= )", "", line).split())


def test_the_test_that_the_authors_guide_shows_passes_for_its_plugin_and_for_no_other() -> None:
    guide = (PROJECT / "plugins" / "README.md").read_text(encoding="utf-8")
    [plugin] = re.findall(r"```wat\n(.*?)```", guide, re.S)
    section = guide.partition("## Trying and testing")[2].partition("\n## ")[0]
    [commands] = re.findall(r"((?:^    .*\n)+)", section, re.M)
    script = f"trap 'kill $trial 2>/dev/null || :; wait $trial' EXIT\n{textwrap.dedent(commands)}"
    with tempfile.TemporaryDirectory(prefix="cosd-") as directory:  # short: a socket's path has 107 bytes
        environment = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": directory, "LANG": "C.UTF-8"}
        for text, status in ((plugin, 0), (plugin.replace("hello, ", "hallo, "), 1)):
            Path(directory, "hello.wasm").write_bytes(wat(text))
            done = subprocess.run(
                ["sh", "-euc", script],
                cwd=directory,
                env=environment,
                capture_output=True,
                text=True,
                timeout=100,
                check=False,
            )
            assert done.returncode == status, done.stderr
