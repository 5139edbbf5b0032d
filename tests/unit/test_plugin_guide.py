"""The author's guide, plugins/README.md: what it tells a reader to type works, and its reference is right."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Final

import pytest

from circleosd.config import PluginSettings
from circleosd.plugins.manifest import Limits, Manifest, parse
from circleosd.worker import frames
from circleosd.worker.host import CALLS
from tests import PROJECT
from tests.plugin_tools import ENVIRONMENT, SEARCH
from tests.worker_driver import CallFailed, start

GUIDE: Final = (PROJECT / "plugins" / "README.md").read_text(encoding="utf-8")
SECTIONS: Final = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", GUIDE, re.M | re.S))
WAYS: Final = [title for title, body in SECTIONS.items() if "```sh" in body]

# What each way needs beyond what CircleOSD itself needs.
TOOLS: Final = {
    "WebAssembly text": (),
    "C": ("clang", "wasm-ld"),
    "C component": ("clang", "wasm-ld", "wasm-tools"),
    "JavaScript": ("componentize-qjs",),
    "Python": ("componentize-py",),
    "WASI program": ("clang", "wasm-ld"),
    "Native": ("gcc",),
}


def files(section: str) -> dict[str, str]:
    """The files that a section shows, by the last file name in backquotes before each."""
    found = {}
    for before, language, content in re.findall(r"(.*?)^```(\w+)\n(.*?)^```$", section, re.M | re.S):
        if language != "sh":
            found[re.findall(r"`([\w/]+\.\w+)`", before)[-1]] = content
    return found


def shell(section: str) -> list[str]:
    """The commands that a section shows, joined where a line goes on."""
    block = re.search(r"^```sh\n(.*?)^```$", section, re.M | re.S)
    assert block is not None
    return block[1].replace("\\\n", " ").splitlines()


def test_guide_shows_every_way() -> None:
    assert list(TOOLS) == WAYS


def missing(way: str) -> list[str]:
    """The tools that a way to write plugins needs and that are not here."""
    tools = [tool for tool in TOOLS[way] if shutil.which(tool, path=SEARCH) is None]
    if way == "WASI program" and not tools:
        probe = subprocess.run(
            ["clang", "--target=wasm32-wasi", "-x", "c", "-o", os.devnull, "-"],
            input=b"#include <stdio.h>\nint main(void) { return 0; }",
            capture_output=True,
            check=False,
        )
        return ["wasi-libc"] if probe.returncode else []
    return tools


@pytest.mark.parametrize("way", WAYS)
def test_following_the_guide_leads_to_a_plugin_that_greets(way: str, tmp_path: Path) -> None:
    if tools := missing(way):
        pytest.skip(f"not here: {', '.join(tools)}")
    for name, content in files(SECTIONS[way]).items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
    commands = shell(SECTIONS[way])
    build = [command for command in commands if not command.startswith("circlectl ")]
    result = subprocess.run(
        ["/bin/sh", "-euc", "\n".join(build)],
        cwd=tmp_path,
        env={**ENVIRONMENT, "CIRCLEOSD": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr

    load = next(command for command in commands if command.startswith("circlectl plugin load "))
    artifact = tmp_path / load.split()[3]
    native = artifact.suffix == ".so"
    assert native == ("--trust" in load)
    granted = tuple(re.findall(r"--grant (\S+)", load))
    manifest = tmp_path / "hello.json"
    asked = parse(manifest.read_bytes()).capabilities if manifest.exists() else ()
    assert tuple(capability.name for capability in asked) == granted
    kept: dict[str, str] = {}

    def answer(call: str, args: dict[str, str]) -> bytes:
        if call == "kv.set":
            kept[args["key"]] = args["value"]
        return frames.host_reply_body(kept.get(args["key"]) if call == "kv.get" else None)

    with start(artifact.read_bytes(), plugin_type="native" if native else "wasm", granted=granted) as worker:
        worker.ready()
        worker.answer = answer
        assert commands[-1] == "circlectl plugin invoke hello handle Zoë"
        replies = [worker.invoke("handle", "Zoë") for _ in range(2)]
    assert replies == (["hello", "hello again"] if granted else ["hello, Zoë"] * 2)


def test_what_the_guide_says_of_rust_leads_to_a_plugin_that_greets(tmp_path: Path) -> None:
    command = re.findall(r"`(rustc .+? hello\.rs)`", SECTIONS["C"])[0].split()
    declared = re.findall(r"`(#\[no_mangle\])` before `(pub static .+?;)`", SECTIONS["C"])[0]
    source = f"""
static mut TEXT: [u8; 1024] = [0; 1024];
{" ".join(declared)}
#[no_mangle] pub extern "C" fn circleosd_buffer(len: u32) -> *mut u8 {{
    if len > 1000 {{ std::ptr::null_mut() }} else {{ unsafe {{ TEXT.as_mut_ptr().add(7) }} }}
}}
#[no_mangle] pub extern "C" fn handle(len: u32) -> u64 {{
    unsafe {{ TEXT[..7].copy_from_slice(b"hello, "); (TEXT.as_ptr() as u64) << 32 | (len as u64 + 7) }}
}}
"""
    (tmp_path / "hello.rs").write_text(source, encoding="utf-8")
    try:
        build = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("not here: rustc")
    if "may not be installed" in build.stderr:
        pytest.skip("not here: Rust's library for wasm32-unknown-unknown")
    assert build.returncode == 0, build.stderr
    with start((tmp_path / "hello.wasm").read_bytes()) as worker:
        worker.ready()
        assert worker.invoke("handle", "Zoë") == "hello, Zoë"


def test_guide_says_how_the_offset_of_a_trap_leads_to_its_line(tmp_path: Path) -> None:
    name, offset = "wasm-tools addr2line hello.wasm", " 0x1a3"
    assert f"`{name}{offset}`" in GUIDE
    if missing := [tool for tool in ("clang", "wasm-ld", "wasm-tools") if shutil.which(tool, path=SEARCH) is None]:
        pytest.skip(f"not here: {', '.join(missing)}")
    crash = "CIRCLEOSD_HANDLER(handle) {\n    *(volatile int *)-16 = 0;\n    return 0;\n}\n"
    source = f"#include <circleosd_core.h>\n{crash}"
    (tmp_path / "hello.c").write_text(source, encoding="utf-8")
    include, target = f"-I{PROJECT / 'plugins' / 'include'}", "--target=wasm32"
    compiled = ["clang", target, "-g", "-O2", "-ffreestanding", "-mbulk-memory", include, "-c", "hello.c"]
    linked = ["clang", target, "-nostdlib", "-o", "hello.wasm", "hello.o"]
    for command in (compiled, [*linked, "-Wl,--no-entry", "-Wl,--export=circleosd_abi"]):
        subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, check=True)
    with start((tmp_path / "hello.wasm").read_bytes()) as worker:
        worker.ready()
        with pytest.raises(CallFailed) as caught:
            worker.invoke("handle")
    (place,) = re.findall(r"\(offset (0x[0-9a-f]+)\)", caught.value.backtrace[0])
    lines = subprocess.run(
        [*name.split(), place], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert "hello.c:3" in lines.stdout


def test_guide_warns_that_a_component_of_javascript_draws_the_same_numbers_at_every_call(tmp_path: Path) -> None:
    assert "`Math.random` is seeded" in SECTIONS["JavaScript"]
    if shutil.which("componentize-qjs", path=SEARCH) is None:
        pytest.skip("not here: componentize-qjs")
    (tmp_path / "hello.wit").write_text(files(SECTIONS["JavaScript"])["hello.wit"], encoding="utf-8")
    (tmp_path / "hello.js").write_text("export const handle = () => String(Math.random());", encoding="utf-8")
    build = shell(SECTIONS["JavaScript"])[0].split()
    subprocess.run(build, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, check=True)
    with start((tmp_path / "hello.wasm").read_bytes()) as worker:
        worker.ready()
        assert worker.invoke("handle", "") == worker.invoke("handle", "")


def rows(title: str) -> dict[str, str]:
    """A section's table: what stands in the first column, without backquotes, to the rest of the row."""
    return {
        name: rest
        for names, rest in re.findall(r"^\| (.+?) \| (.+) \|$", SECTIONS[title], re.M)
        for name in names.replace("`", "").split(", ")
    }


def test_guide_has_every_member_of_a_manifest() -> None:
    wanted = {item.name for item in fields(Manifest)} | {f"limits.{item.name}" for item in fields(Limits)}
    assert set(rows("The manifest")) - {"member"} == wanted


def test_guide_says_what_the_least_manifest_is() -> None:
    least = re.findall(r"`(\{.+?\})`", SECTIONS["Signing"])
    assert [parse(manifest.encode()).name for manifest in least] == ["hello"]


def size(value: float, name: str) -> str:
    if name in ("memory", "output", "storage"):
        return f"{value / (1 << 20):g} MiB"
    return f"{value:g} s" if name == "time" else f"{value:g}"


def test_guide_has_the_limits_that_hold() -> None:
    settings = vars(PluginSettings())
    for name in (item.name for item in fields(Limits)):
        row = rows("The manifest")[f"limits.{name}"]
        assert row.startswith(f"{size(settings[f'default_{name}'], name)} |"), name
        assert row.endswith(f"ceiling {size(settings[name], name)}"), name


def test_guide_has_every_capability() -> None:
    wanted = {re.sub(r"\{(\w+)\}", lambda match: match[1].upper(), call.capability) for call in CALLS.values()}
    assert set(rows("Capabilities")) - {"capability", "–", "---"} == wanted
    assert rows("Capabilities")["events:TOPIC"].startswith("publishing and receiving"), "no other is delivered"
