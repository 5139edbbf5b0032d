"""Lint, format and types, so that one command says whether all is well."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import PROJECT

BIN = Path(sys.executable).parent


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_the_code_is_clean(command: str) -> None:
    program, *arguments = command.split()
    done = subprocess.run([BIN / program, *arguments], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", sorted(path.name for path in (PROJECT / "scripts").iterdir()))
def test_the_scripts_parse(script: str) -> None:
    done = subprocess.run(["bash", "-n", PROJECT / "scripts" / script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
