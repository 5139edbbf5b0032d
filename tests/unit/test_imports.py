"""The import rule: imports point one way, and circlectl knows nothing of the daemons."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests import PROJECT

# What each part may import of CircleOSD, besides itself. A part is a module or a package.
ALLOWED = {
    "errors": set[str](),
    "policy": {"errors", "steering"},
    "delegation": {"api", "errors", "policy"},
    "paths": {"errors"},
    "validation": set[str](),
    "config": {"errors", "paths"},
    "wire": {"errors"},
    "refusal": {"errors", "passing", "wire"},
    "handoff": set[str](),
    "places": {"errors"},
    "deadlines": set[str](),
    "discarding": set[str](),
    "api": {"errors", "policy"},
    "client": {"errors", "wire"},
    "database": {"errors", "threads"},
    "flood": set[str](),
    "scheduling": set[str](),
    "steering": set[str](),
    "actor": {"policy"},
    "chain": set[str](),
    "rows": {"api", "database", "errors", "wire"},
    "pruning": {"chain", "config", "database", "rows"},
    "ledger": {"actor", "api", "chain", "config", "database", "errors", "flood", "policy", "pruning", "rows"},
    "handlers": {"actor", "api", "database", "errors", "ledger", "policy"},
    "recovery": {"api", "errors", "handlers", "ledger", "policy"},
    "service": {"api", "deadlines", "errors", "handlers", "ledger", "policy", "recovery", "validation", "wire"},
    "turns": {"handoff"},
    "fair": set[str](),
    "threads": set[str](),
    "passing": {"discarding", "errors", "policy"},
    "connection": {"config", "errors", "handoff", "passing", "policy", "turns", "wire"},
    "server": {"config", "connection", "discarding", "errors", "passing", "places", "turns", "wire"},
    "upstream": {"errors", "paths", "wire"},
    "identities": {"errors", "fair", "policy", "upstream"},
    "systemd": {"api", "errors", "paths", "registry.units", "steering"},
    "activation": set[str](),
    "worker": {"activation"},
    "auth": {
        "api", "config", "database", "delegation", "errors", "fair", "handlers", "places", "policy", "rows",
        "threads",
    },
    "registry": {
        "api", "database", "errors", "fair", "handlers", "paths", "places", "policy", "rows", "upstream",
        "validation",
    },
    "plugins": {
        "api", "config", "database", "delegation", "discarding", "errors", "fair", "handlers", "handoff", "ledger",
        "paths", "places", "policy", "rows", "upstream", "validation", "worker.cachekey", "worker.frames",
        "worker.host", "worker.limits", "worker.receiving",
    },
    "polkit": {"errors", "paths", "registry.catalog", "systemd"},
    "embedded": {
        "activation", "config", "errors", "paths", "policy", "refusal", "registry.units", "server", "steering",
        "systemd", "wire",
    },
    "circlectl": {"api", "client", "errors", "paths", "plugins.manifest", "policy", "steering"},
}  # fmt: skip
ONLY_HERE = {"dbus_fast": "systemd", "sdnotify": "systemd", "wasmtime": "worker", "argon2": "auth", "fire": "circlectl"}


def sources() -> Iterator[tuple[str, Path]]:
    for path in sorted((PROJECT / "circleosd").rglob("*.py")):
        part = path.relative_to(PROJECT / "circleosd").parts[0].removesuffix(".py")
        if part not in ("__init__", "__main__"):
            yield part, path
    for path in sorted((PROJECT / "circlectl").rglob("*.py")):
        yield "circlectl", path


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, as dotted names, a name from a package included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("part", "path"), [pytest.param(*item, id=str(item[1].name)) for item in sources()])
def test_imports_point_one_way(part: str, path: Path) -> None:
    for name in imported(path):
        top, _, rest = name.partition(".")
        if top == "circlectl":
            assert part == "circlectl", f"{path} imports {name}"
        if top == "circleosd" and rest != "__version__":
            allowed = {part, *ALLOWED[part]}
            assert any(rest == ok or rest.startswith(f"{ok}.") for ok in allowed), f"{path} imports {name}"
        if top in ONLY_HERE:
            assert part == ONLY_HERE[top], f"{path} imports {name}"
        if top == "systemd":
            assert part == "systemd", f"{path} imports {name}"


def test_no_modules_import_each_other() -> None:
    """Nor in a larger circle, nor late, within a function."""
    modules = {".".join(path.relative_to(PROJECT).with_suffix("").parts): path for _, path in sources()}
    graph = {
        module: {name for item in imported(path) for name in (item, item.rpartition(".")[0]) if name in modules}
        for module, path in modules.items()
    }
    assert sum(map(len, graph.values())) > 100
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_every_part_is_named_in_the_rule() -> None:
    assert {part for part, _ in sources()} == set(ALLOWED)


def test_every_part_is_named_in_the_architecture() -> None:
    modules = (PROJECT / "ARCHITECTURE.md").read_text(encoding="utf-8").partition("\n## Modules\n")[2]
    table, rule = (set(re.findall(r"\w+", text)) for text in modules.split("\nImports point one way;"))
    assert [part for part in ALLOWED if part not in table] == []
    assert [part for part in ALLOWED if part not in rule] == []
