"""The main job from end to end, through circlectl and real processes."""

from __future__ import annotations

import json
import subprocess

from tests.integration.embedded_host import PROJECT, EmbeddedHost


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
