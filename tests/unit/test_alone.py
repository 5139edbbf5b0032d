"""Tests run side by side, but for those that are to be alone (tests/conftest.py), by a run that tells how it was."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import LONGEST, TESTS

HEAD = """
import pathlib, time
import pytest

HERE = pathlib.Path({!r})
"""
# Each of its tests waits a while for one of the other such file, until two have met.
MEETS = """
@pytest.mark.parametrize("number", range(10))
def test_meets(number):
    here, there = HERE / __name__[-1], HERE / "21"[int(__name__[-1]) - 1]
    here.touch()
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline and not (HERE / "met").exists():
        if there.exists():
            (HERE / "met").touch()
        time.sleep(0.01)
    here.unlink()
"""
BESIDE = """
@pytest.mark.parametrize("number", range(100))
def test_beside(number):
    (HERE / "beside").touch()
    assert not (HERE / "silence").exists()
    (HERE / "beside").unlink()
"""
ALONE = """
@pytest.fixture(scope="module")
def begun():
    (HERE / "silence").mkdir()
    yield
    (HERE / "silence").rmdir()

@pytest.mark.parametrize("number", range(10))
def test_alone(number, begun):
    assert not (HERE / "beside").exists()
"""
FILES = {
    "test_long_1.py": MEETS,
    "test_long_2.py": MEETS,
    "test_then_alone.py": ALONE + "pytestmark = pytest.mark.alone\n",
    "test_then_beside.py": BESIDE,
    "alone/test_one.py": ALONE,
    "alone/test_two.py": ALONE,
}


def test_the_files_that_begin_first_exist() -> None:
    assert [name for name in LONGEST if not (TESTS / name).is_file()] == []


def test_alone_is_without_the_tests_of_other_processes(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    shutil.copy(TESTS / "conftest.py", tmp_path)
    for package in (tmp_path, tmp_path / "alone"):
        package.mkdir(exist_ok=True)
        (package / "__init__.py").touch()
    for name, text in FILES.items():
        (tmp_path / name).write_text(HEAD.format(str(tmp_path)) + text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [*command, "-v", "-n2", "--dist=loadfile", "--no-loadscope-reorder", tmp_path],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert " 150 passed " in done.stdout, done.stdout + done.stderr
    order = re.findall(r"\[(gw\d)\] .* PASSED (\S+)::", done.stdout)
    begun = order.index(next(each for each in order if each[1] == "alone/test_one.py"))
    assert [file for _, file in order[begun : begun + 20]] == ["alone/test_one.py"] * 10 + ["alone/test_two.py"] * 10
    assert len({process for process, _ in order[begun : begun + 20]}) == 1
    assert (tmp_path / "met").exists(), "side by side"
