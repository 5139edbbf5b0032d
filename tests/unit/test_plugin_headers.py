"""The headers for plugins in C: everything they declare reaches the host and comes back, through a real worker."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from circleosd.worker import frames
from tests import PROJECT
from tests.plugin_tools import ENVIRONMENT
from tests.worker_driver import CallFailed, Worker, start

SOURCES: Final = Path(__file__).parent / "plugin_headers"
PLUGINS: Final = PROJECT / "plugins"
GRANTED: Final = ("kv", "config", "clock", "services:read", "services:restart:name", "events:topic")

SSH: Final = {"name": "ssh", "state": "active", "description": "the shell"}
WEB: Final = {"name": "web", "state": "failed", "description": "é"}

# What the host answers, and what the plugin makes of it.
ANSWERS: Final[list[tuple[str, object, str]]] = [
    ("kv.get", "value", "=value"),
    ("kv.get", "", "="),
    ("kv.get", None, "absent"),
    ("kv.set", None, "done"),
    ("kv.delete", True, "yes"),
    ("kv.delete", False, "no"),
    ("kv.keys", ["a", "", "é"], "a;;é;"),
    ("kv.keys", [], ""),
    ("services.list", [SSH, WEB], "ssh/active/the shell;web/failed/é;"),
    ("services.list", [], ""),
    ("services.status", WEB, "web/failed/é;"),
    ("services.restart", None, "done"),
    ("events.emit", None, "done"),
]

ARGUMENTS: Final = {
    "kv.get": {"key": "key"},
    "kv.set": {"key": "key", "value": "value"},
    "kv.delete": {"key": "key"},
    "kv.keys": {"prefix": "prefix"},
    "services.list": {},
    "services.status": {"name": "name"},
    "services.restart": {"name": "name"},
    "events.emit": {"topic": "topic", "payload": "payload"},
}


def run(*command: str) -> None:
    """Runs a tool. Skips the test when it is not here."""
    try:
        result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip(f"{command[0]} is not here")
    assert result.returncode == 0, result.stderr


def compile_c(source: str, target: Path, *link: str, optimize: str) -> None:
    """One line, as the author's guide has it."""
    run(
        *("clang", "--target=wasm32", optimize, "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-mbulk-memory"),
        *("-nostdlib", "-I", str(PLUGINS / "include"), "-Wl,--no-entry", *link, "-o", str(target)),
        str(SOURCES / source),
    )


@pytest.fixture(scope="module", params=["-O0", "-O2", "-xc++"])
def everything(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("everything")
    core, embedded, component = (directory / name for name in ("core.wasm", "embedded.wasm", "everything.wasm"))
    compile_c("everything.c", core, optimize=request.param)
    wit = str(PLUGINS / "wit")
    run("wasm-tools", "component", "embed", wit, "--world", "plugin", str(core), "-o", str(embedded))
    run("wasm-tools", "component", "new", str(embedded), "-o", str(component))
    return component


@pytest.fixture(scope="module")
def component(everything: Path) -> Iterator[Worker]:
    with start(everything.read_bytes(), granted=GRANTED, config={"key": "set", "é": "x"}) as worker:
        assert worker.ready().description == "uses everything"
        yield worker


@pytest.mark.parametrize("header", ["circleosd_core.h", "circleosd_component.h"])
@pytest.mark.parametrize("option", ["--target=wasm32-wasi", "-D__EMSCRIPTEN__"])
def test_headers_are_refused_with_a_c_library_whose_heap_is_where_they_put_texts(
    tmp_path: Path, header: str, option: str
) -> None:
    source = tmp_path / "plugin.c"
    source.write_text(f"#include <{header}>\n")
    options = ("-ffreestanding", "-fsyntax-only", "-I", str(PLUGINS / "include"), str(source))
    run("clang", "--target=wasm32", *options)
    with pytest.raises(AssertionError, match="compile with --target=wasm32: "):
        run("clang", "--target=wasm32", option, *options)


def refusing(call: str, args: dict[str, str]) -> bytes:
    return frames.host_error_body("conflict", f"not now: {call}")


@pytest.mark.parametrize(("call", "answer", "reply"), ANSWERS)
def test_component_header_makes_each_call_and_reads_its_result(
    call: str, answer: object, reply: str, component: Worker
) -> None:
    component.host_calls.clear()
    component.answer = lambda call, args: frames.host_reply_body(answer)
    assert component.invoke("handle", call) == reply
    assert component.host_calls == [(call, ARGUMENTS[call])]
    component.answer = refusing
    with pytest.raises(CallFailed, match=f"conflict: not now: {call}$"):
        component.invoke("handle", call)


def test_component_header_reads_configuration_and_clocks(component: Worker) -> None:
    assert component.invoke("handle", "config.get") == "=set"
    assert component.invoke("handle", "config.keys") == "key;é;"
    assert int(component.invoke("handle", "clock.now")) > 1_600_000_000_000
    first, second = (int(component.invoke("handle", "clock.monotonic")) for _ in range(2))
    assert 0 < first < second


def test_component_header_is_refused_what_is_not_granted(everything: Path) -> None:
    with start(everything.read_bytes()) as worker:
        worker.ready()
        for call in (*ARGUMENTS, "config.get", "config.keys", "clock.now", "clock.monotonic"):
            with pytest.raises(CallFailed, match="denied: this plugin has not been granted the capability "):
                worker.invoke("handle", call)


def test_component_header_serves_init_and_events(component: Worker) -> None:
    component.logs.clear()
    component.wait_for(component.send("topic", "é", kind=frames.EVENT))
    assert (3, "topic: é") in [(level, text) for _, level, text in component.logs]
    with pytest.raises(CallFailed, match="an empty event"):
        component.wait_for(component.send("topic", "", kind=frames.EVENT))
    assert (2, "init ran") in [(level, text) for _, level, text in component.logs]


def test_component_header_frees_what_a_call_used(everything: Path) -> None:
    keys = ["k" * 1000] * 100
    with start(everything.read_bytes(), granted=GRANTED, instance="shared", memory=16 << 20) as worker:
        worker.ready()
        worker.answer = lambda call, args: frames.host_reply_body(keys)
        # Each takes 5 MB of the 16.
        for _ in range(20):
            assert worker.invoke("handle", "kv.keys") == "".join(f"{key};" for key in keys)


@pytest.fixture(params=["-O0", "-O2", "-xc++"])
def core(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    target = tmp_path / "calls.wasm"
    compile_c("calls.c", target, "-Wl,--export=circleosd_abi", optimize=request.param)
    return target


def test_core_header_passes_calls_and_answers_on(core: Path) -> None:
    request = json.dumps({"call": "kv.get", "args": {"key": "é"}}, ensure_ascii=False)
    with start(core.read_bytes(), granted=GRANTED) as worker:
        worker.ready()
        worker.answer = lambda call, args: frames.host_reply_body("x" * 300_000)
        assert worker.invoke("handle", request) == json.dumps("x" * 300_000) * 2
        assert worker.host_calls == [("kv.get", {"key": "é"})]
        assert [(level, text) for _, level, text in worker.logs] == [(2, request)]
        worker.answer = refusing
        with pytest.raises(CallFailed, match=r"^plugin-failed: conflict: not now: kv.get$"):
            worker.invoke("handle", request)


def test_core_header_reports_a_reached_memory_limit(core: Path) -> None:
    with start(core.read_bytes(), granted=GRANTED, memory=1 << 20) as worker:
        worker.ready()
        worker.answer = lambda call, args: frames.host_reply_body("x" * 600_000)
        with pytest.raises(CallFailed, match=r"^plugin-failed: no memory$"):
            worker.invoke("handle", '{"call": "kv.get", "args": {"key": "x"}}')
        with pytest.raises(CallFailed, match=r"^limit: "):
            worker.invoke("handle", "x" * (1 << 20))


def test_core_header_gives_other_memory_each_time_and_frees_it_after_the_call(tmp_path: Path) -> None:
    target = tmp_path / "reserve.wasm"
    compile_c("reserve.c", target, "-Wl,--export=circleosd_abi", optimize="-O2")
    with start(target.read_bytes(), instance="shared", memory=3 << 20) as worker:
        worker.ready()
        for text in ("abc", "", "x" * 1000, "de"):
            assert worker.invoke("handle", text) == text
        with pytest.raises(CallFailed, match=r"^plugin-failed: no memory$"):
            worker.invoke("all", "")
        assert worker.invoke("handle", "on") == "on"
