"""The author's documents and the worker say the same."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from circleosd.worker import component
from circleosd.worker.engine import MAX_TABLE_ELEMENTS, PARTS
from circleosd.worker.host import CALLS
from circleosd.worker.inspect import CORE_IMPORTS, INTERFACE_VERSION, INTERFACES
from circleosd.worker.limits import COMPILE_MEMORY, COMPILE_SECONDS
from tests import PROJECT

PLUGINS = PROJECT / "plugins"
WIT = (PLUGINS / "wit" / "circleosd.wit").read_text()
ABI = (PLUGINS / "ABI.md").read_text()
HEADER = PLUGINS / "include" / "circleosd_plugin.h"


def test_the_wit_has_the_hosts_interfaces_and_calls_with_their_arguments() -> None:
    assert f"package circleosd:plugin@{INTERFACE_VERSION};" in WIT
    found = {}
    for interface, body in re.findall(r"^interface (\w+) \{(.*?)^\}", WIT, re.M | re.S):
        for name, parameters in re.findall(r"^    %?([\w-]+): func\((.*?)\)", body, re.M):
            found[f"{interface}.{name}"] = tuple(re.findall(r"(\w+): string", parameters))
    assert found.pop("log.write") == ("message",)
    assert found == {name: call.arguments for name, call in CALLS.items()}
    assert tuple(re.findall(r"^    import (\w+);", WIT, re.M)) == INTERFACES
    assert component._RESULTS.keys() == CALLS.keys(), "what each returns to a component"


def test_the_wit_names_the_capability_that_receiving_events_takes() -> None:
    received = re.search(r"///([^\n]*)\n    export on-event:", WIT)
    assert received is not None
    assert "capability `events:TOPIC`" in received[1]


def test_the_reference_lists_every_host_call_with_its_arguments_and_capability() -> None:
    rows = re.findall(r"^\| `([a-z.]+)` \|([^|]*)\| [^|]* \| `([^`]+)` \|$", ABI, re.M)
    documented = {name: (tuple(re.findall(r"`(\w+)`", arguments)), capability) for name, arguments, capability in rows}
    assert documented == {
        name: (call.arguments, call.capability.replace("{name}", "NAME").replace("{topic}", "TOPIC"))
        for name, call in CALLS.items()
    }


def test_the_reference_says_how_much_memory_the_unit_of_a_worker_has() -> None:
    unit = PLUGINS.parent / "units" / "system" / "circleosd-plugin@.service.d" / "10-system.conf"
    memory = re.search(r"^MemoryMax=(\d+)M$", unit.read_text(), re.M)
    assert memory is not None
    assert f"unit has {memory[1]} MiB in total (`MemoryMax=`)" in ABI


def test_the_reference_says_what_compiling_and_tables_may_take() -> None:
    assert f"compiling may take {COMPILE_SECONDS:g} s and {COMPILE_MEMORY >> 30} GiB" in ABI
    tables = f"{PARTS['module'].tables} tables in a core module, {PARTS['component'].tables} in a component"
    assert f"{MAX_TABLE_ELEMENTS:,} elements each; {tables}" in ABI


def test_the_reference_lists_the_core_imports() -> None:
    for name, (parameters, results) in CORE_IMPORTS.items():
        row = re.search(rf"^\| `{name}` \| `\((.*?)\) -> (.*?)` \|", ABI, re.M)
        assert row is not None
        assert row[1].count("i32") == len(parameters)
        assert row[2] == ("i32" if results else "()")


def test_the_header_has_the_layout_that_the_reference_gives(tmp_path: Path) -> None:
    assertions = []
    for struct, size, body in re.findall(
        r"^\| `(circleosd_\w+)` \((\d+) bytes\) .*?\n\|[-|]+\n((?:\|.*\n)+)", ABI, re.M
    ):
        assertions.append(f'_Static_assert(sizeof({struct}) == {size}, "size");')
        for field, offset in re.findall(r"^\| `(\w+)` \| (\d+) \|", body, re.M):
            assertions.append(f'_Static_assert(offsetof({struct}, {field}) == {offset}, "{field}");')
    assert len(assertions) == 3 + 6 + 2 + 5
    source = tmp_path / "layout.c"
    source.write_text("#include <circleosd_plugin.h>\n" + "\n".join(assertions))
    command = ["gcc", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{HEADER.parent}", str(source)]
    subprocess.run(command, check=True)


@pytest.mark.parametrize(("compiler", "language"), [("gcc", "c"), ("g++", "c++")])
def test_the_header_compiles_alone_without_a_warning(compiler: str, language: str) -> None:
    if not shutil.which(compiler):
        pytest.skip(f"not here: {compiler}")
    command = [compiler, "-x", language, "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-pedantic", str(HEADER)]
    subprocess.run(command, check=True)
