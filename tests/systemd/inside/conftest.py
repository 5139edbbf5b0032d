"""Tests that run inside a booted systemd and change it: tests/systemd/test_inside.py boots one and runs them there.

By hand, as root on a machine to throw away:  CIRCLEOSD_DISPOSABLE_MACHINE=1 python -m pytest tests/systemd/inside
"""

from __future__ import annotations

import asyncio
import os
import pwd
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from circleosd.registry.units import UnitState
from circleosd.systemd.units import SystemdUnits
from tests.waiting import SECONDS

T = TypeVar("T")

UNIT_FILES = Path("/run/systemd/system")
COUNT = Path("/run/ct-counted")
UNITS = {
    "ct-sleep.service": "[Service]\nType=exec\nExecStart=sleep infinity\nExecReload=true\n",
    "ct-plain.service": "[Service]\nType=exec\nExecStart=sleep infinity\n",
    "ct-fail.service": '[Service]\nType=oneshot\nExecStart=sh -c "echo one; echo two; echo last words >&2; exit 3"\n',
    "ct-steps.service": (
        "[Service]\nType=oneshot\nExecStart=sh -c 'echo one; sleep 0.2'\nExecStart=sh -c 'echo two; exit 3'\n"
    ),
    "ct-forge.service": (
        "[Service]\nType=oneshot\nExecStart=sh -c 'echo first words; journalctl --sync; "
        'printf "MESSAGE=x\\nMESSAGE_ID=%%s\\nMESSAGE_ID=%%s\\nINVOCATION_ID=$INVOCATION_ID\\nINVOCATION_ID=0\\n"'
        " d9b373ed55a64feb8242e02dbe79a49c 7ad2d189f7e94e70a38c781354912448 | logger --journald;"
        " echo last words; exit 3'\n"
    ),
    "ct-again.service": (
        "[Service]\nType=notify\nRestart=on-failure\nRestartSec=10min\n"
        'ExecStart=sh -c "echo first words; sleep 0.3; echo last words; exit 3"\n'
    ),
    "ct-spaced.service": '[Service]\nType=oneshot\nLogNamespace=ct-space\nExecStart=sh -c "echo said apart; exit 3"\n',
    "ct-crash.service": '[Service]\nType=oneshot\nExecStart=sh -c "kill -9 $$$$"\n',
    "ct-noexec.service": "[Service]\nType=exec\nExecStart=/nonexistent/program\n",
    "ct-slow.service": "[Service]\nType=notify\nTimeoutStartSec=300ms\nExecStart=sleep infinity\n",
    "ct-long.service": "[Service]\nType=oneshot\nExecStart=sleep 2\n",
    "ct-needs.service": "[Unit]\nRequires=ct-fail.service\nAfter=ct-fail.service\n[Service]\nExecStart=true\n",
    "ct-brief.service": "[Service]\nType=oneshot\nExecStart=true\n",
    "ct-many@.service": "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=true\n",
    "ct-counted@.service": (
        f"[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=sh -c 'echo %i >>{COUNT}'\nExecReload=true\n"
    ),
    "ct-awaited.service": "[Service]\nType=exec\nExecStart=sleep infinity\n",
    "ct-awaited.socket": "[Socket]\nListenStream=/run/ct-awaited.sock\n",
    "ct-install.service": "[Service]\nExecStart=sleep infinity\n[Install]\nWantedBy=multi-user.target\n",
}


HERE = os.environ.get("CIRCLEOSD_DISPOSABLE_MACHINE") == "1"
collect_ignore_glob = [] if HERE else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def machine() -> None:
    """A booted systemd, on which other users can run this Python."""
    assert Path("/run/systemd/system").is_dir()
    assert os.geteuid() == 0
    for place in map(Path, (sys.executable, sys.prefix, sys.base_prefix, *sys.path)):
        for directory in place.parents:
            if not directory.stat().st_mode & 0o001:
                directory.chmod(directory.stat().st_mode | 0o001)  # such as a home directory


@pytest.fixture(scope="session")
def unit_files(machine: None) -> Iterator[None]:
    """The units of `UNITS`, and ct-masked.service, at the system manager."""
    for name, text in UNITS.items():
        (UNIT_FILES / name).write_text(f"[Unit]\nStartLimitIntervalSec=0\n{text}")
    (UNIT_FILES / "ct-masked.service").symlink_to("/dev/null")
    run("systemctl", "daemon-reload")
    yield
    run("systemctl", "stop", "ct-*")
    for name in (*UNITS, "ct-masked.service"):
        (UNIT_FILES / name).unlink()
    run("systemctl", "daemon-reload")
    run("systemctl", "reset-failed")


@pytest.fixture(scope="session")
def stranger(machine: None) -> Iterator[pwd.struct_passwd]:
    """A person with a user manager of their own and no rights on the system's."""
    run("useradd", "--create-home", "ct-stranger")
    person = pwd.getpwnam("ct-stranger")
    run("systemctl", "start", f"user@{person.pw_uid}.service")
    yield person
    run("systemctl", "stop", f"user@{person.pw_uid}.service", f"user-{person.pw_uid}.slice")
    run("userdel", "--remove", "ct-stranger")


def run(*command: str, **options: Any) -> str:
    """The output of a command that must succeed."""
    return str(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60, **options).stdout)


def python_as(person: pwd.struct_passwd, code: str, groups: Sequence[str] = (), **variables: str) -> str:
    """What a Python program prints that runs as `person`, with this project importable."""
    return run(
        sys.executable,
        "-c",
        code,
        user=person.pw_uid,
        group=person.pw_gid,
        extra_groups=groups,
        cwd="/",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), **variables},
    )


def on_systemd(act: Callable[[SystemdUnits], Awaitable[T]], *, timeout: float = SECONDS) -> T:
    """The result of `act` with the system manager; fails when it leaves a task behind."""

    async def main() -> T:
        async with units(timeout=timeout) as manager:
            result = await act(manager)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    return asyncio.run(main())


@asynccontextmanager
async def units(*, timeout: float = SECONDS) -> AsyncIterator[SystemdUnits]:
    """The system manager, left at the end."""
    manager = SystemdUnits("system", timeout=timeout)
    try:
        yield manager
    finally:
        await manager.close()


@asynccontextmanager
async def watching(manager: SystemdUnits, *names: str) -> AsyncIterator[Callable[[], Awaitable[UnitState]]]:
    """A function that waits for the next change of `names`; the states at the beginning have been read."""
    async with aclosing(manager.watch(names)) as changes:

        async def next_change() -> UnitState:
            async with asyncio.timeout(SECONDS):
                return await anext(changes)

        for _ in names:
            await next_change()
        yield next_change
