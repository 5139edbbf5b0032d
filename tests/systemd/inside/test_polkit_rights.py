"""The rights of the registry's user under a real polkit (see conftest.py)."""

from __future__ import annotations

import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import PROJECT
from tests.systemd.inside.conftest import UNIT_FILES, python_as, run
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("unit_files", "generator")

CATALOG = Path("/etc/circleosd/services.d")
USER = "circleosd-registry"
SWITCH_USER = "circleosd-switch"
RULES = Path("/etc/polkit-1/rules.d/49-circleosd.rules")
CATALOGED = """
[[service]]
name = "sleep"
unit = "ct-sleep.service"
[[service]]
name = "plain"
unit = "ct-plain.service"
verbs = ["stop"]
[[service]]
name = "install"
unit = "ct-install.service"
[[service]]
name = "fixed"
unit = "ct-long.service"
"""


@pytest.fixture(scope="module")
def generator(machine: None) -> Iterator[None]:
    """The registry's user, that of the units that enable, and the units of its polkit rule, as they are shipped."""
    if shutil.which("pkcheck") is None or not RULES.parent.is_dir():
        pytest.skip("needs polkit")
    for user in (USER, SWITCH_USER):
        run("useradd", "--system", "--no-create-home", user)
    CATALOG.mkdir(parents=True, mode=0o755)
    names = [f"circleosd-{name}" for name in ("polkit.service", "polkit.path", "enable@.service", "disable@.service")]
    for name in names:
        text = (PROJECT / "units" / name).read_text()
        ours = f"Environment=PYTHONPATH={':'.join(sys.path)}\nExecStart={sys.executable} -m circleosd polkit-rule"
        text = text.replace("ExecStart=circleosd polkit-rule", ours)
        (UNIT_FILES / name).write_text(text)
    run("systemctl", "daemon-reload")
    (CATALOG / "test.toml").write_text(CATALOGED)
    run("systemctl", "start", "circleosd-polkit.service", "circleosd-polkit.path")
    yield
    run("systemctl", "stop", "circleosd-polkit.path")
    for name in names:
        (UNIT_FILES / name).unlink()
    run("systemctl", "daemon-reload")
    shutil.rmtree(CATALOG.parent)
    RULES.unlink()
    for user in (USER, SWITCH_USER):
        run("userdel", user)


def may(*command: str) -> bool:
    """Whether systemd does what the registry's user asks by a command; fails when that is not the reason."""
    uid = pwd.getpwnam(USER).pw_uid
    done = subprocess.run(command, user=uid, group=uid, extra_groups=[], capture_output=True, text=True, timeout=60)
    refused = "Access denied" in done.stderr or "Interactive authentication required" in done.stderr
    assert (done.returncode == 0) is not refused, done.stderr
    return not refused


def test_the_registry_may_do_to_cataloged_units_what_the_catalog_says() -> None:
    assert may("systemctl", "start", "ct-sleep.service")
    assert may("systemctl", "reload", "ct-sleep.service")
    assert may("systemctl", "restart", "ct-sleep.service")
    assert may("systemctl", "stop", "ct-sleep.service")
    run("systemctl", "start", "ct-plain.service")
    assert not may("systemctl", "restart", "ct-plain.service")
    assert not may("systemctl", "start", "ct-plain.service")
    assert may("systemctl", "stop", "ct-plain.service")
    assert run("systemctl", "show", "-P", "ActiveState", "ct-plain.service") == "inactive\n"


def test_the_registry_may_do_nothing_to_other_units() -> None:
    run("systemctl", "start", "ct-many@1.service")
    for verb in ("start", "stop", "restart"):
        assert not may("systemctl", verb, "ct-many@1.service")
        assert not may("systemctl", verb, "dbus.service")
    assert run("systemctl", "show", "-P", "ActiveState", "ct-many@1.service") == "active\n"


@pytest.mark.parametrize(
    "command",
    [
        "systemctl kill ct-sleep.service",
        "systemctl set-property --runtime ct-sleep.service CPUWeight=10",
        "systemctl reset-failed ct-sleep.service",
        "systemctl enable ct-install.service",
        f"systemctl enable {UNIT_FILES}/ct-install.service",
        "systemctl mask ct-install.service",
        "systemctl link /tmp/evil.service",
        "systemctl daemon-reload",
        "systemctl daemon-reexec",
        "systemctl reboot",
        "systemctl set-environment LD_PRELOAD=/tmp/evil.so",
        "systemd-run true",
        "systemd-run --unit=ct-sleep2.service true",
        "hostnamectl set-hostname evil",
    ],
)
def test_the_registry_may_do_nothing_else(command: str) -> None:
    run("systemctl", "start", "ct-sleep.service")
    assert not may(*command.split())


def test_workers_of_plugins_may_be_run() -> None:
    (UNIT_FILES / "circleosd-plugin@.service").write_text("[Service]\nType=exec\nExecStart=sleep infinity\n")
    run("systemctl", "daemon-reload")
    try:
        assert may("systemctl", "start", "circleosd-plugin@echo.service")
        assert may("systemctl", "stop", "circleosd-plugin@echo.service")
        assert not may("systemctl", "start", "circleosd-plugin@Not-a-plugin.service")
    finally:
        (UNIT_FILES / "circleosd-plugin@.service").unlink()
        run("systemctl", "daemon-reload")


def test_the_registry_enables_cataloged_units_and_no_others() -> None:
    code = """
import asyncio
from circleosd.errors import CircleError
from circleosd.systemd.units import SystemdUnits
async def main():
    manager = SystemdUnits("system", timeout=20)
    for verb, unit in [("enable", "ct-install.service"), ("disable", "ct-install.service"),
                       ("enable", "ct-long.service"), ("enable", "ct-plain.service"), ("enable", "dbus.service")]:
        try:
            print(await manager.switch(verb, unit))
        except CircleError as error:
            print(type(error).__name__, error)
    await manager.close()
asyncio.run(main())
"""
    lines = python_as(pwd.getpwnam(USER), code).splitlines()
    assert lines[:2] == ["enabled", "disabled"]
    assert lines[2] == "Conflict cannot enable ct-long.service: it has no [Install] section"
    assert [line.split()[0] for line in lines[3:]] == ["Denied", "Denied"]


def test_what_has_just_been_cataloged_may_be_started_at_once() -> None:
    code = """
import asyncio
from circleosd.systemd.units import SystemdUnits
async def main():
    manager = SystemdUnits("system", timeout=20)
    print(await manager.job("start", UNIT))
    await manager.close()
asyncio.run(main())
"""
    more = CATALOG / "more.toml"
    try:
        for number in range(20, 24):
            unit = f"ct-many@{number}.service"
            more.write_text(f'[[service]]\nname = "many"\nunit = "{unit}"\n')
            assert python_as(pwd.getpwnam(USER), code.replace("UNIT", repr(unit))) == "done\n"
    finally:
        more.unlink()


def test_jobs_are_done_while_polkit_is_restarted() -> None:
    code = """
import asyncio, os
from circleosd.systemd.units import SystemdUnits
async def main():
    manager = SystemdUnits("system", timeout=60)
    results = set()
    while os.path.exists(GOES_ON):
        results.add(await manager.job("start", "ct-sleep.service"))
    await manager.close()
    print(*results)
asyncio.run(main())
"""
    with tempfile.NamedTemporaryFile() as goes_on, ThreadPoolExecutor() as pool:
        acting = pool.submit(python_as, pwd.getpwnam(USER), code.replace("GOES_ON", repr(goes_on.name)))
        for _ in range(20):
            run("systemctl", "reset-failed", "polkit.service")  # it may be started so often
            run("systemctl", "restart", "polkit.service")
        goes_on.close()
        assert acting.result() == "done\n"


def test_an_alias_in_the_catalog_is_explained() -> None:
    alias = UNIT_FILES / "ct-alias.service"
    alias.symlink_to(UNIT_FILES / "ct-brief.service")
    run("systemctl", "daemon-reload")
    code = """
import asyncio
from circleosd.errors import Denied
from circleosd.systemd.units import SystemdUnits
async def main():
    manager = SystemdUnits("system", timeout=20)
    try:
        await manager.job("start", "ct-alias.service")
    except Denied as error:
        print(error)
    await manager.close()
asyncio.run(main())
"""
    try:
        said = python_as(pwd.getpwnam(USER), code)
        assert "ct-alias.service is an alias of ct-brief.service" in said
    finally:
        alias.unlink()
        run("systemctl", "daemon-reload")


def test_what_is_removed_from_the_catalog_is_refused_a_moment_later() -> None:
    more = CATALOG / "more.toml"
    try:
        more.write_text('[[service]]\nname = "many"\nunit = "ct-many@5.service"\n')
        wait_until(lambda: may("systemctl", "start", "ct-many@5.service"))
        more.unlink()
        took = wait_until(lambda: not may("systemctl", "stop", "ct-many@5.service"))
        print(f"refused {took * 1000:.0f} ms after it was removed")
        assert not may("systemctl", "start", "ct-many@5.service")
        assert may("systemctl", "stop", "ct-sleep.service")  # the others stay
    finally:
        more.unlink(missing_ok=True)


def test_a_catalog_file_that_others_may_write_gives_no_rights_and_is_reported() -> None:
    loose = CATALOG / "loose.toml"
    loose.write_text('[[service]]\nname = "many"\nunit = "ct-many@6.service"\n')
    loose.chmod(0o666)
    try:
        wait_until(lambda: "failed" in run("systemctl", "show", "-P", "ActiveState", "circleosd-polkit.service"))
        assert not may("systemctl", "start", "ct-many@6.service")
        assert may("systemctl", "stop", "ct-sleep.service")
        assert "is writable by others than its owner" in run("journalctl", "-u", "circleosd-polkit.service", "-n", "20")
    finally:
        loose.unlink()
    wait_until(lambda: "inactive" in run("systemctl", "show", "-P", "ActiveState", "circleosd-polkit.service"))
