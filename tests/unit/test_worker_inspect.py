"""Which ABI an artifact has, and why it has none."""

from __future__ import annotations

import platform
import random
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest

from circleosd.worker.binary import MAX_ENTRIES
from circleosd.worker.failure import PluginFailure
from circleosd.worker.inspect import inspect, inspect_native
from tests import PROJECT
from tests.component_text import another, component
from tests.core_text import core, wat
from tests.wasi_text import ECHO, command

ABI = '(global (export "circleosd_abi") i32 (i32.const 1))'
VARIABLE = '(global (export "circleosd_abi") i32 (i32.const 1024))'
MEMORY = '(memory (export "memory") 1)'
BUFFER = '(func (export "circleosd_buffer") (param i32) (result i32) i32.const 0)'
HANDLER = '(func (export "handle") (param i32) (result i64) i64.const 0)'

INITIALIZE = '(func (export "_initialize") (param i32))'


def refusal(data: bytes) -> str:
    with pytest.raises(PluginFailure) as caught:
        inspect(data)
    assert caught.value.code == "bad-request"
    return caught.value.message


def test_a_core_plugins_functions_are_its_exports_of_the_handler_type() -> None:
    artifact = inspect(
        core(
            '(func (export "other") (param i32) (result i32) local.get 0) (func (export "größe") (param i32)'
            " (result i64) i64.const 0)",
            imports='(import "circleosd" "log" (func (param i32 i32 i32)))' * 2,
        )
    )
    assert artifact.abi == "core"
    assert artifact.functions == ["echo", "explode", "größe"]
    assert artifact.imports == ["circleosd.log"]


def test_a_command_is_wasi_and_its_function_is_handle() -> None:
    artifact = inspect(command(ECHO))
    assert (artifact.abi, artifact.functions) == ("wasi", ["handle"])
    assert "wasi_snapshot_preview1.fd_read" in artifact.imports


def test_a_component_is_found_with_its_functions_and_imports() -> None:
    imports = '(import "circleosd:plugin/clock@0.1.0" (instance))'
    artifact = inspect(component(imports=imports, exports=another("second", "handle")))
    assert artifact.abi == "component"
    assert artifact.functions == ["handle", "second"]
    assert artifact.imports == ["circleosd:plugin/clock@0.1.0"]


def test_an_artifact_of_another_abi_than_its_manifest_says_is_refused() -> None:
    assert inspect(core(), "core").abi == "core"
    with pytest.raises(PluginFailure, match="is of the ABI core, not wasi as its manifest says"):
        inspect(core(), "wasi")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is not WebAssembly"),
        (b"hello, world", "is not WebAssembly"),
        (b"\0asm\1\0\0", "is truncated"),
        (b"\0asm\2\0\0\0", "version 2"),
        (b"\0asm\1\0\0\0\1", "truncated or damaged"),
        (b"\0asm\1\0\0\0\2\7\1\1A\1f\x20\0", "has an import of the kind 32, which this host does not support"),
        (b"\0asm\1\0\0\0", "but exports nothing"),
    ],
)
def test_what_is_no_module_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    assert reason in refusal(data)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (HANDLER, "exports neither circleosd_abi (a core plugin) nor _start (a wasi command), but exports handle"),
        (ABI + BUFFER + HANDLER, "exports no memory"),
        (ABI + MEMORY + HANDLER, "exports no function circleosd_buffer"),
        (ABI + MEMORY + BUFFER, "exports no handler"),
        (ABI + MEMORY + HANDLER.replace("handle", "circleosd_buffer"), "circleosd_buffer with a type other"),
        (ABI.replace("1)", "2)") + MEMORY + BUFFER + HANDLER, "has version 2 of the core ABI"),
        (ABI.replace("i32 (", "(mut i32) (") + MEMORY + BUFFER + HANDLER, "constant i32 global"),
        (ABI.replace("i32 (i32.const 1)", "i64 (i64.const 1)") + MEMORY + BUFFER + HANDLER, "constant i32 global"),
        (MEMORY + BUFFER + HANDLER.replace('"handle"', '"circleosd_abi"'), "not as a global"),
        (ABI + MEMORY + "(memory 1)" + BUFFER + HANDLER, "has 2 memories"),
        (VARIABLE + "(memory 1 2 shared)" + BUFFER + HANDLER, "has a shared memory, which this host does not support"),
        (VARIABLE.replace("i32", "i64") + "(memory i64 1)" + HANDLER, "has a 64-bit memory, which this host does not"),
        ('(import "env" "memory" (memory 1))' + ABI + BUFFER + HANDLER, "imports env.memory: a core plugin may import"),
        (ABI + MEMORY + BUFFER + HANDLER + INITIALIZE, "_initialize with a type other"),
        ('(import "env" "memory" (memory 1 2 shared)) (func (export "_start"))', "has a shared memory"),
        ('(import "env" "memory" (memory 1)) (func (export "_start"))', "imports env.memory: a wasi command may"),
        ('(func (export "_start")) ', "exports no memory"),
        (MEMORY + '(func (export "_start") (param i32))', "not as a function of the type () -> ()"),
    ],
)  # fmt: skip
def test_a_module_that_is_no_plugin_is_refused_with_what_is_missing(body: str, reason: str) -> None:
    assert reason in refusal(wat(f"(module {body})"))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("extism:host/env", "nor _start (a wasi command), but exports memory, and imports from env, extism:host/env"),
        ("", "nor _start (a wasi command), but exports memory, and imports from env, ''"),
        (
            "wasi_snapshot_preview1",
            "from env, wasi_snapshot_preview1: a WASI library (reactor) is not a plugin, build a command instead",
        ),
        (
            "circleosd:plugin/kv@0.1.0",
            "the core of a component is not a plugin, make the component with wasm-tools component new",
        ),
    ],
)
def test_a_module_for_another_host_is_told_what_it_is_made_for(source: str, reason: str) -> None:
    imports = '(import "env" "table" (table 1 9 funcref))'
    imports += "".join(f'(import "{module}" "call" (func))' for module in ("env", source, source))
    assert reason in refusal(wat(f"(module {imports} {MEMORY})"))


def test_the_core_of_a_component_without_imports_is_known_by_what_it_exports() -> None:
    allocator = '(func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) (i32.const 0))'
    assert "the core of a component is not a plugin" in refusal(wat(f"(module {MEMORY} {allocator})"))


def test_an_object_file_is_told_from_a_module() -> None:
    imports = '(import "env" "__linear_memory" (memory 1))'
    data = wat(f"(module {imports} {BUFFER})") + b"\0\x08\x07linking"
    assert "imports from env: an object file is not a plugin, link it" in refusal(data)


def variable(address: int, *segments: str) -> bytes:
    """A plugin whose version is a variable, as compilers export one, and memory that holds these segments."""
    return wat(f"(module {ABI.replace('1)', f'{address})')} {MEMORY} {BUFFER} {HANDLER} {''.join(segments)})")


ONE = r'"\01\00\00\00"'


@pytest.mark.parametrize(
    "plugin",
    [
        variable(1024, f"(data (i32.const 1024) {ONE})"),
        variable(16, f'(data (i32.const 0) "0123456789abcdef" {ONE})'),
        variable(1024, f"(data (i32.const 1024) {ONE})", f"(data (i32.const 4096) {ONE})"),
        variable(1024, r'(data (i32.const 1022) "\ff\ff\01")', r'(data (i32.const 1025) "\00\00\00\ff")'),
        variable(1024, r'(data (i32.const 1024) "\02\02\02\02")', f"(data (i32.const 1024) {ONE})"),
        variable(-4, f"(data (i32.const -4) {ONE})"),
    ],
)
def test_the_version_of_a_core_plugin_may_be_a_variable(plugin: bytes) -> None:
    assert inspect(plugin).abi == "core"


@pytest.mark.parametrize(
    ("plugin", "version"),
    [
        (variable(1024), 0),
        (variable(1024, r'(data (i32.const 1024) "\02")'), 2),
        (variable(1024, f"(data {ONE})"), 0),
        (variable(1024, f"(data (i32.const 1025) {ONE})"), 256),
        (variable(1024, f"(data (i32.const 1024) {ONE})", r'(data (i32.const 1027) "\01")'), 0x01000001),
        (variable(15, r'(data (i32.const 15) "\01")'), 15),
    ],
)
def test_a_variable_of_another_version_is_refused(plugin: bytes, version: int) -> None:
    assert f"it has version {version} of the core ABI" in refusal(plugin)


@pytest.mark.parametrize(
    ("imports", "reason"),
    [
        ('(import "env" "puts" (func (param i32)))', "imports env.puts: a core plugin may import only from circleosd"),
        ('(import "circleosd" "format_disk" (func))', "circleosd.format_disk, which this host does not have"),
        ('(import "circleosd" "log" (func (param i32)))', "imports circleosd.log with a type other"),
        ('(import "circleosd" "log" (global i32))', "imports circleosd.log, which"),
        ('(import "wasi_snapshot_preview1" "fd_write" (func (param i32)))', "imports wasi_snapshot_preview1.fd_write"),
        ('(import "env" "\\07\\1b[31m" (func))', "imports env.'\\x07\\x1b[31m'"),
    ],
)
def test_a_core_plugin_may_import_nothing_but_the_hosts_functions(imports: str, reason: str) -> None:
    assert reason in refusal(core(imports=imports))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wasi:http/outgoing-handler@0.2.0", "which this host does not have"),
        ("wasi:cli/environment@0.3.0", "this host has version 0.2.x of WASI"),
        ("wasi:cli/environment", "this host has version 0.2.x of WASI"),
        ("other:thing/kv", "which this host does not have"),
        ("circleosd:plugin/disk@0.1.0", "which this host does not have"),
        ("circleosd:plugin/kv@0.2.0", "this host has version 0.1.0 of that interface"),
    ],
)
def test_a_component_may_import_nothing_but_the_hosts_interfaces(name: str, reason: str) -> None:
    message = refusal(component(imports=f'(import "{name}" (instance))'))
    assert name in message
    assert reason in message


def test_more_imports_than_are_told_of_a_plugin_are_refused() -> None:
    def versions(count: int) -> bytes:
        return component(imports="".join(f'(import "wasi:cli/environment@0.2.{n}" (instance))' for n in range(count)))

    assert len(inspect(versions(1000)).imports) == 1000
    assert refusal(versions(1001)) == "it has 1001 imports: at most 1000 are allowed"
    long = component(imports=f'(import "wasi:cli/{"x" * 1024}@0.2.0" (instance))')
    assert refusal(long).endswith("and the name of an import has at most 1024 bytes")


def test_a_component_without_handle_is_refused_with_what_it_exports() -> None:
    text = '(component (instance $x) (export "run:it/now" (instance $x)))'
    assert refusal(wat(text)) == ("it is a component but exports no function handle, only run:it/now")
    text = text.replace("run:it/now", "handle")
    assert refusal(wat(text)) == "it is a component that exports handle, but not as a function"


@pytest.mark.parametrize("version", ["0.2.6", "0.3.0"])
def test_a_command_of_a_later_wasi_is_refused_with_what_to_build_instead(version: str) -> None:
    def command(imported: str) -> bytes:
        run = f'(instance $x) (export "wasi:cli/run@{version}" (instance $x))'
        return wat(f'(component (import "wasi:{imported}@{version}" (instance)) {run})')

    assert refusal(command("cli/environment")) == (
        "it is a command of WASI 0.2 or later, and exports no function handle: "
        "build it for WASI preview 1 (wasm32-wasip1)"
    )
    assert "imports wasi:http/types" in refusal(command("http/types")), "that would not help"


def test_a_component_with_a_function_handle_may_be_a_command_too() -> None:
    run = '(instance $x) (export "wasi:cli/run@0.2.6" (instance $x))'
    assert inspect(component(exports=run)).functions == ["handle"]


def test_gc_types_are_refused_by_name() -> None:
    assert "has a type of the form" in refusal(wat("(module (type (struct)))"))


@pytest.mark.parametrize("form", [b"\0\x7f\1\3log\0\0", b"\0\x7e\0\0\1\3log"])
def test_compact_imports_are_refused_as_that(form: bytes) -> None:
    section = b"\1\x09circleosd" + form
    data = b"\0asm\1\0\0\0" + b"\1\4\1\x60\0\0" + bytes([2, len(section)]) + section
    assert "has compact imports" in refusal(data)


def test_a_constant_that_this_host_does_not_run_is_refused_by_its_instruction() -> None:
    module = f"(module (global i31ref (ref.i31 (i32.const 1))) {ABI} {MEMORY} {BUFFER} {HANDLER})"
    assert "has a constant with the instruction 0xfb" in refusal(wat(module))


@pytest.mark.parametrize("calculation", [f"{kind}.{name}" for kind in ("i32", "i64") for name in ("add", "sub", "mul")])
def test_a_constant_may_be_calculated(calculation: str) -> None:
    kind = calculation[:3]
    constant = f"({calculation} ({kind}.const 3) ({kind}.const 2))"
    assert inspect(wat(f"(module (global {kind} {constant}) {ABI} {MEMORY} {BUFFER} {HANDLER})")).abi == "core"


def test_a_constant_after_other_globals_is_found() -> None:
    before = (
        "(global f64 (f64.const 1.5)) (global i64 (i64.const -9000000000)) (global f32 (f32.const 1))"
        " (global (mut i32) (i32.const -77777)) (global v128 (v128.const i32x4 1 2 3 4))"
        " (global funcref (ref.null func)) (global i32 (i32.add (i32.const 1) (i32.const 2)))"
    )
    assert inspect(wat(f"(module {before} {ABI} {MEMORY} {BUFFER} {HANDLER})")).abi == "core"


def test_a_section_with_too_many_entries_is_refused_without_reading_them() -> None:
    section = b"\x80\x89\x7a"
    data = b"\0asm\1\0\0\0\3" + bytes([len(section)]) + section
    assert f"at most {MAX_ENTRIES} are allowed" in refusal(data)


def test_any_damage_is_a_refusal_or_another_valid_reading() -> None:
    randomness = random.Random(11)
    samples = [core(), command(ECHO), component(exports=another("second", "handle"))]
    for _ in range(3000):
        data = bytearray(randomness.choice(samples))
        for _ in range(randomness.randrange(1, 4)):
            data[randomness.randrange(len(data))] = randomness.randrange(256)
        del data[randomness.randrange(len(data)) if randomness.random() < 0.3 else len(data) :]
        try:
            inspect(bytes(data))
        except PluginFailure as exc:
            sentence = exc.message
            assert sentence.startswith("it ")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"#!/bin/sh\n", "not an ELF shared object"),
        (b"\x7fELF\2\1", "truncated"),
        (b"\x7fELF\1\1" + bytes(60), "not a 64-bit"),
        (b"\x7fELF\2\1" + bytes(10) + b"\2\0" + bytes(60), "not a shared object"),
        (b"\x7fELF\2\1" + bytes(10) + b"\3\0\x28\0" + bytes(60), "another machine"),
    ],
)
def test_a_native_artifact_is_checked_before_it_is_opened(data: bytes, reason: str) -> None:
    with pytest.raises(PluginFailure, match=reason):
        inspect_native(data, 1 << 20)


@pytest.mark.parametrize(("here", "there"), [("x86_64", "aarch64"), ("aarch64", "x86_64")])
def test_a_native_artifact_for_the_other_usual_machine_is_told_by_name(
    here: str, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.uname", lambda: SimpleNamespace(machine=here))
    number = {"x86_64": 62, "aarch64": 183}[there]
    header = b"\x7fELF\2\1" + bytes(10) + b"\3\0" + number.to_bytes(2, "little") + bytes(44)
    with pytest.raises(PluginFailure, match=f"it is for {there}, not for {here}"):
        inspect_native(header, 1 << 20)


@pytest.mark.parametrize("length", [65, 119, 120, 4095])
def test_a_native_artifact_that_is_truncated_is_refused_before_it_is_mapped(length: int) -> None:
    header = bytearray(64)
    header[:6], header[16] = b"\x7fELF\2\1", 3
    header[18:20] = {"x86_64": 62, "aarch64": 183}.get(platform.machine(), 0).to_bytes(2, "little")
    header[32], header[56] = 64, 1  # one program header, behind this one
    segment = struct.pack("<IIQQQQQQ", 1, 5, 4000, 4000, 4000, 96, 96, 4096)  # from 4000 to the end of the file
    whole = (bytes(header) + segment).ljust(4096, b"\0")
    inspect_native(whole, 1 << 20)
    with pytest.raises(PluginFailure, match="it is truncated: "):
        inspect_native(whole[:length], 1 << 20)


def test_what_the_manager_imports_does_not_load_wasmtime() -> None:
    modules = "circleosd.worker.frames, circleosd.worker.inspect, circleosd.worker.cachekey"
    script = f"import sys, {modules}; sys.exit(any(name in sys.modules for name in ('wasmtime', 'asyncio')))"
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=PROJECT).returncode == 0
