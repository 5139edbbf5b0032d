"""The pages of the manual say what there is, and render without a complaint."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from circlectl import commands, manual
from circlectl.helptext import FLAGS, needed
from circleosd.config import Settings
from circleosd.errors import BY_CODE
from tests import PROJECT

PAGES: dict[str, Callable[[], str]] = {
    "circlectl.1": lambda: manual.page({"SOURCE_DATE_EPOCH": "0"}),
    "circleosd.8": (PROJECT / "man/circleosd.8").read_text,
    "circleosd.toml.5": (PROJECT / "man/circleosd.toml.5").read_text,
}
RENDER = {
    "mandoc": ["mandoc", "-T", "lint", "-W", "warning"],
    "groff": ["groff", "-ww", "-mdoc", "-Tutf8", "-Kutf8", "-z"],
}


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("program", RENDER)
def test_a_page_renders_without_warnings(page: str, program: str, tmp_path: Path) -> None:
    if not shutil.which(program):
        pytest.skip(f"there is no {program} here")
    (tmp_path / page).write_text(PAGES[page]())
    done = subprocess.run([*RENDER[program], tmp_path / page], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_circlectls_page_has_every_command_parameter_and_exit_status() -> None:
    page = PAGES["circlectl.1"]()
    assert page.startswith(".Dd January 1, 1970\n")
    for group in commands.GROUPS:
        for command in commands.of_group(group).values():
            start = page.index(f".It Ic {command.group} {command.verb}")
            entry = page[start : page.find("\n.It Ic ", start + 1)]
            plain = " ".join(entry.replace("\\", "").split())
            for said in (command.contract.summary(), needed(command.contract)):
                assert said in plain, f"{group} {command.verb} {said}"
            for item in (*command.parameters, *command.secrets):
                assert item.word.replace("_", "-") in entry, f"{group} {command.verb} {item.name}"
            reply = command.contract.reply
            for field in get_type_hints(next(iter(get_args(reply)), reply)) if reply not in (None, str) else ():
                assert rf"\%{field}" in entry, f"{group} {command.verb} {field}"
    for about in FLAGS.values():
        assert f"\n{about[:1].upper()}{about[1:]}.\n" in page.replace("\\-", "-")
    statuses = page.partition("\n.Sh EXIT STATUS\n")[2]
    assert "exits with 0 on success" in statuses
    for code, error in BY_CODE.items():
        assert f".It {error.exit_status} Ta Li {code} " in statuses
    assert "exits with 130 when it is interrupted" in page
    assert "\n141 when nobody reads" in page
    assert "and for root always on a host booted with systemd; otherwise" in page  # as test_config.py has it


def test_each_code_has_the_exit_status_that_is_promised() -> None:
    _, _, section = (PROJECT / "README.md").read_text().partition("## Exit statuses and errors\n")
    promised = dict(re.findall(r"\| `([a-z-]+)` \| (\d+) ", section))
    assert promised == {code: str(error.exit_status) for code, error in BY_CODE.items()}


def test_circleosds_page_has_every_command_and_unit() -> None:
    page = PAGES["circleosd.8"]()
    usage = subprocess.run([sys.executable, "-m", "circleosd", "--help"], capture_output=True, text=True, check=True)
    for line in usage.stdout.splitlines()[2:-1]:
        assert f".It Cm {line.split()[0]}" in page
    for unit in (*(PROJECT / "units").glob("circleosd*.socket"), *(PROJECT / "units").glob("circleosd*.service")):
        assert unit.stem in page


def _settings(table: str) -> dict[str, Any]:
    settings: dict[str, Any] = vars(getattr(Settings(), table))
    return settings


@pytest.mark.parametrize("table", Settings.names())
def test_every_setting_is_explained_with_its_default(table: str) -> None:
    section = PAGES["circleosd.toml.5"]().partition(f".Ss [{table}]\n")[2].partition("\n.S")[0]
    explained = [line.removeprefix(".It ") for line in section.splitlines() if line.startswith(".It ")]
    assert sorted(explained) == sorted(f"Ic {name} Pq {value}" for name, value in _settings(table).items())


def test_what_the_units_allow_in_memory_stands_beside_the_settings_that_take_it() -> None:
    page = PAGES["circleosd.toml.5"]()
    for drop_in in (PROJECT / "units/system").glob("*.service.d/10-system.conf"):
        (most,) = re.findall(r"^MemoryMax=(.*)$", drop_in.read_text(), re.MULTILINE)
        assert f".It Pa {drop_in.parent.name.removesuffix('.d')} Ta {most}\n" in page


def test_the_installed_settings_are_the_defaults_once_uncommented() -> None:
    done = subprocess.run(
        [sys.executable, PROJECT / "debian/default_config.py"], capture_output=True, text=True, check=True
    )
    assert tomllib.loads(done.stdout) == {table: {} for table in Settings.names()}
    lines = [line[1:] if line[:1] == "#" and line[1:2] != " " else line for line in done.stdout.splitlines()]
    defaults = {table: _settings(table) for table in Settings.names()}
    assert tomllib.loads("\n".join(line for line in lines if line)) == defaults
