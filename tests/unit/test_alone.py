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
# Each of its tests tells from when until when it ran.
TAKES_TIME = """
@pytest.mark.parametrize("number", range(10))
def test_takes_time(number):
    begun = time.monotonic()
    time.sleep(0.05)
    (HERE / f"{__name__[-1]}{number}").write_text(f"{begun} {time.monotonic()}")
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
    "test_long_1.py": TAKES_TIME,
    "test_long_2.py": TAKES_TIME,
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
    one, two = ([tuple(map(float, (tmp_path / f"{n}{m}").read_text().split())) for m in range(10)] for n in "12")
    assert any(begun < other_end and other < end for begun, end in one for other, other_end in two), "side by side"
