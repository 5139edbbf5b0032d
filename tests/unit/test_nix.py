"""The Nix side: what can be said without Nix, and with `nix-instantiate` what it says.

Nothing here builds: the package and the virtual machine need a nixpkgs and are checks of the flake.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from circleosd.api.plugins import PLUGIN_NAME
from circleosd.registry.catalog import OWN

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "units"
MODULE = (UNITS / "nixos-module.nix").read_text(encoding="utf-8")
PACKAGE = (UNITS / "package.nix").read_text(encoding="utf-8")
NIX_FILES = [
    ROOT / "flake.nix",
    *(path for name in ("units", "nixos-test", "tests/nix") for path in (ROOT / name).glob("*.nix")),
]

STRINGS = re.compile(r"''(?:''['$\\]|.)*?''(?!['$\\])|\"(?:\\.|[^\"\\])*\"|#[^\n]*", re.DOTALL)

nix = pytest.mark.skipif(
    not shutil.which("nix-instantiate"), reason="nix-instantiate is not on PATH: no Nix file is parsed"
)


def nix_instantiate(*arguments: str) -> str:
    """What `nix-instantiate` prints, without a Nix store. Fails the test with its message."""
    command = ["nix-instantiate", "--store", "dummy://", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
@pytest.mark.parametrize("path", NIX_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nix_can_parse(path: Path) -> None:
    assert nix_instantiate("--parse", str(path))


@nix
def test_the_module_keeps_each_promise(nixpkgs_lib: str) -> None:
    expression = f"import {ROOT}/tests/nix/cases.nix {{ lib = import {nixpkgs_lib}; }}"
    promises = json.loads(nix_instantiate("--eval", "--strict", "--json", "--expr", expression))
    assert promises
    assert [promise for promise, kept in promises.items() if not kept] == []


@nix
@pytest.mark.skipif(not shutil.which("node"), reason="node is not on PATH: the polkit rule is not run")
def test_the_polkit_rule_allows_the_catalog_to_the_registry_and_nothing_else(nixpkgs_lib: str) -> None:
    evaluate = f"import {ROOT}/tests/nix/evaluate.nix {{ lib = import {nixpkgs_lib}; }}"
    settings = '{ services.circleosd = { enable = true; services.nginx.verbs = [ "restart" ]; }; }'
    expression = f"({evaluate} {settings}).config.security.polkit.extraConfig"
    rule = nix_instantiate("--eval", "--raw", "--expr", expression)
    units, files = "org.freedesktop.systemd1.manage-units", "org.freedesktop.systemd1.manage-unit-files"
    asked = "Authentication is required to {} '$(unit)'."
    transient = "Authentication is required to start transient unit '$(unit)'."
    registry = "circleosd-registry"
    expected = [
        (registry, units, "nginx.service", "restart", asked, "yes"),
        (registry, units, "nginx.service", "stop", asked, "no"),
        (registry, units, "nginx.service.service", "restart", asked, "no"),
        (registry, units, "toString", "restart", asked, "no"),
        (registry, units, "circleosd-auth.service", "restart", asked, "yes"),
        (registry, units, "circleosd-auth.service", "start", transient, "no"),
        (registry, units, "circleosd-plugin@counter.socket", "start", asked, "yes"),
        (registry, units, "circleosd-plugin@counter.service", "kill", asked, "no"),
        (registry, units, "circleosd-plugin@../x.service", "start", asked, "no"),
        (registry, units, "x-circleosd-plugin@counter.service", "start", asked, "no"),
        (registry, units, None, None, None, "no"),
        (registry, files, None, None, None, "no"),
        (registry, "org.freedesktop.login1.reboot", None, None, None, "not handled"),
        ("alice", units, "nginx.service", "restart", asked, "not handled"),
    ]
    questions = [
        (user, action, unit, verb, text and text.format(verb)) for user, action, unit, verb, text, _ in expected
    ]
    script = f"""
        let rule;
        const Result = {{ YES: "yes", NO: "no", NOT_HANDLED: "not handled" }};
        const polkit = {{ Result, addRule: (f) => (rule = f) }};
        {rule}
        const answer = ([user, id, unit, verb, message]) => {{
          const details = {{ unit, verb, "polkit.message": message }};
          return rule({{ id, lookup: (key) => details[key] ?? undefined }}, {{ user }});
        }};
        console.log(JSON.stringify({json.dumps(questions)}.map(answer)));
    """
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [answer for *_, answer in expected]


@pytest.mark.parametrize("path", NIX_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_nix_file_names_exists(path: Path) -> None:
    code = STRINGS.sub("", path.read_text(encoding="utf-8"))
    named = re.findall(r"(?<![\w./])\.{1,2}/[\w./-]*", code)
    assert [name for name in named if not (path.parent / name).exists()] == []


def test_every_unit_that_the_module_names_is_shipped() -> None:
    daemons = re.search(r"daemons = \[(.*?)\];", MODULE, re.DOTALL)
    assert daemons
    named = {f"{name}{kind}" for name in re.findall(r'"(.*?)"', daemons[1]) for kind in (".service", ".socket")}
    named |= {f"{name}.{kind}" for kind, name in re.findall(r"systemd\.(target|path)s\.([\w-]+)\.", MODULE)}
    named |= {f"{name}.service" for name in re.findall(r"^ +([\w-]+)\.enable = false;", MODULE, re.MULTILINE)}
    assert {"circleosd.target", "circleosd-polkit.path"} <= named
    assert sorted(name for name in named if not (UNITS / name).exists()) == []


def test_the_module_wants_every_socket_that_is_no_template() -> None:
    sockets = {path.stem for path in UNITS.glob("*.socket") if "@" not in path.name}
    assert sockets
    assert sorted(name for name in sockets if f'"{name}"' not in MODULE) == []


def test_the_package_installs_every_file_in_units() -> None:
    kinds = {kind for kinds in re.findall(r"units/\*\.\{([\w,]+)\}", PACKAGE) for kind in kinds.split(",")}
    names = set(re.findall(r"units/([\w.-]+)", PACKAGE))
    files = [path for path in UNITS.iterdir() if path.is_file() and path.suffix != ".nix"]
    assert files
    assert [path.name for path in files if path.suffix[1:] not in kinds and path.name not in names] == []


def test_the_module_and_the_services_agree_on_names() -> None:
    assert f'pluginRule = "{PLUGIN_NAME}";' in MODULE
    assert [entry.name for entry in OWN if f'"{entry.name}"' not in MODULE] == []


def test_the_readme_names_only_options_that_exist() -> None:
    declared = MODULE.partition("options.services.circleosd = {")[2].partition("config = lib.mkIf cfg.enable")[0]
    options = set(re.findall(r"^    (\w+) = (?:mkOption|lib\.mkEnableOption)\b", declared, re.MULTILINE))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"services\.circleosd\.(\w+)", readme))
    for block in re.findall(r"services\.circleosd = \{\n(.*?)\n\s*\};?\n", readme, re.DOTALL):
        indent = re.match(r" *", block)
        assert indent
        named |= set(re.findall(rf"^{indent[0]}(\w+)", block, re.MULTILINE))
    assert named
    assert named <= options
