"""What `make setup` asks for where something is missing, and when it makes the environment anew."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests import PROJECT

APT = """\
#!/bin/sh
[ "$1" = update ] || { echo "apt-get $*"; exit 1; }
"""


def refused(programs: Path, python: str) -> str:
    """What the set-up says where there is nothing but these programs, with an apt-get that installs nothing."""
    for name in ("bash", "dirname"):
        (programs / name).symlink_to(str(shutil.which(name)))
    (programs / "apt-get").write_text(APT)
    (programs / "apt-get").chmod(0o755)
    command = [str(programs / "bash"), str(PROJECT / "scripts/setup"), python]
    done = subprocess.run(
        command, env={"PATH": str(programs)}, capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    return done.stderr


def test_a_host_without_python_needs_that_and_all_else_at_once(tmp_path: Path) -> None:
    needed = "python3 python3-venv python3-dev gcc pkg-config libsystemd-dev"
    assert needed in refused(tmp_path, "python3")


@pytest.mark.parametrize("python", ["python3", "/nonexistent/python3"])
def test_a_python_that_is_too_old_or_not_where_it_was_said_to_be_is_told_before_anything_is_installed(
    tmp_path: Path, python: str
) -> None:
    (tmp_path / "python3").symlink_to(str(shutil.which("false")))
    assert refused(tmp_path, python) == "circleosd setup: Python 3.11 or newer is required, as in Debian 12 and later\n"


def make(tree: Path, *arguments: str) -> str:
    """What make prints in a tree."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.check_output(["make", *arguments], cwd=tree, env=environment, text=True)


def planned(tree: Path) -> str:
    """What `make setup` would do in a tree."""
    return make(tree, "-n", "setup")


def test_an_environment_that_was_moved_or_made_with_another_python_is_made_anew(tmp_path: Path) -> None:
    tree, python = tmp_path / "tree", tmp_path / "tree/.venv/bin/python3"
    (tree / "plugins").mkdir(parents=True)
    python.parent.mkdir(parents=True)
    shutil.copytree(PROJECT / "scripts", tree / "scripts")
    for file in ("Makefile", "requirements.lock", "pyproject.toml", "plugins/example.wat", "plugins/example.wasm"):
        shutil.copy(PROJECT / file, tree / file)
    older, newer = tmp_path / "python3.11", tmp_path / "python3.13"
    older.touch()
    newer.touch()
    python.symlink_to(older)
    assert "scripts/setup" in planned(tree)
    (tree / "scripts/setup").write_text("#!/bin/sh\n")  # as if it had made that environment
    make(tree, ".venv/.ready")
    assert "scripts/setup" not in planned(tree)
    tree.rename(tmp_path / "moved")
    assert "scripts/setup" in planned(tmp_path / "moved")
    (tmp_path / "moved").rename(tree)
    for target in (newer, tmp_path / "removed"):
        python.unlink()
        python.symlink_to(target)
        assert "scripts/setup" in planned(tree)


def copied(tree: Path) -> tuple[Path, Path]:
    """A tree that was copied with its environment: that one's pip, and a Python that cannot make another."""
    (tree / "scripts").mkdir()
    shutil.copy(PROJECT / "scripts/setup", tree / "scripts")
    pip, python = tree / ".venv/bin/pip", tree / "python3"
    pip.parent.mkdir(parents=True)
    (pip.parent / "python").symlink_to(sys.executable)
    pip.write_text("#!/bin/sh\necho 'pip 25.0 from /elsewhere/.venv/lib/python3.11/site-packages/pip (python 3.11)'\n")
    headers = sysconfig.get_path("include")
    python.write_text(f'#!/bin/sh\ncase "$*" in *sysconfig*) echo {headers};; -c*) ;; *) echo "ran $*"; exit 1; esac\n')
    for program in (pip, python):
        program.chmod(0o755)
    return pip, python


def test_what_was_copied_with_a_tree_changes_nothing_in_the_other(tmp_path: Path) -> None:
    pip, python = copied(tmp_path)
    done = subprocess.run(
        [tmp_path / "scripts/setup", python], capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "ran -m venv .venv\n"), done.stderr
    assert not pip.exists()


@pytest.mark.usefixtures("other_users")
def test_who_may_not_make_the_environment_anew_is_told_who_may() -> None:
    with TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        pip, python = copied(Path(directory))
        done = subprocess.run(
            [f"{directory}/scripts/setup", python],
            user=65534, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert pip.exists()
    said = f"circleosd setup: {directory}/.venv has to be made anew, by its owner root: make setup\n"
    assert (done.returncode, done.stderr) == (1, said)
