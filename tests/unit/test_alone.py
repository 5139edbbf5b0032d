"""Tests run side by side, but for those marked `alone` (tests/conftest.py), by a run of tests that tell how it was."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import LONGEST, TESTS

HEAD = """
import pathlib, time
import pytest

HERE = pathlib.Path(__file__).parent
"""
# Two files with this meet, so neither passes without the other.
MEETS = """
@pytest.mark.parametrize("number", range(3))
def test_meets(number):
    (HERE / f"{__name__[-1]}{number}").touch()
    deadline = time.monotonic() + 20
    while not all((HERE / f"{name}{number}").exists() for name in "12"):
        assert time.monotonic() < deadline
        time.sleep(0.005)
"""
BESIDE = """
@pytest.mark.parametrize("number", range(100))
def test_beside(number):
    (HERE / "beside").touch()
    assert not (HERE / "alone").exists()
    (HERE / "beside").unlink()
"""
ALONE = """
@pytest.fixture(scope="module")
def begun():
    (HERE / "alone").mkdir()
    yield
    (HERE / "alone").rmdir()

@pytest.mark.alone
@pytest.mark.parametrize("number", range(10))
def test_alone(number, begun):
    assert not (HERE / "beside").exists()
"""
FILES = {"meets_1": MEETS, "meets_2": MEETS, "then_alone": ALONE, "then_beside": BESIDE, "two_alone": ALONE}


def test_the_files_that_begin_first_exist() -> None:
    assert [name for name in LONGEST if not (TESTS / name).is_file()] == []


def test_alone_is_without_the_tests_of_other_processes(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    shutil.copy(TESTS / "conftest.py", tmp_path)
    (tmp_path / "__init__.py").touch()
    for name, text in FILES.items():
        (tmp_path / f"test_{name}.py").write_text(HEAD + text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [*command, "-n2", "--dist=loadfile", "--no-loadscope-reorder", tmp_path],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert " 126 passed " in done.stdout, done.stdout + done.stderr
