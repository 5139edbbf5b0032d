"""The test bed itself: what boots is a whole systemd, and nothing of it outlives its test."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import PROJECT
from tests.systemd import cgroups
from tests.systemd.container import BOOTED, BootError, Container, leftovers
from tests.systemd.machine import Machine, MachineError
from tests.systemd.scenario_runner import run_scenario
from tests.waiting import wait_until

PYTEST = ("-m", "pytest", "-q", "-p", "tests.systemd.conftest", "-p", "no:cacheprovider")


def named(name: str) -> str:
    """A container's name that no other run of these tests uses."""
    return f"{name}-{os.getpid()}"


@contextmanager
def start(*argv: str) -> Iterator[subprocess.Popen[str]]:
    """A process that boots a container of its own and has said "booted"; it is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, *argv],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        try:
            assert process.stdout
            assert any(line.strip().endswith("booted") for line in process.stdout)
            yield process
        finally:
            process.kill()


def script_that_boots(name: str, lower: str, then: str = "time.sleep(600)") -> str:
    return textwrap.dedent(f"""\
        import time
        from tests.systemd.container import Container
        container = Container({name!r}, {lower!r})
        container.boot()
        print("booted", flush=True)
        {then}
    """)


def kinds_of_leftovers(name: str) -> set[str]:
    return {line.split()[0] for line in leftovers(name)}


def test_systemd_is_pid_1_and_has_booted_without_a_failed_unit(booted: Machine) -> None:
    assert booted.succeed("cat /proc/1/comm").strip() == "systemd"
    assert booted.succeed("systemctl --failed --no-legend").strip() == ""
    assert booted.succeed("systemctl is-system-running").strip() == "running"


def test_nothing_of_the_machine_is_enabled_or_logged_inside(booted: Machine) -> None:
    assert booted.succeed("ls /etc/systemd/system").split() == []
    boots = booted.succeed("journalctl --list-boots --no-pager").splitlines()
    assert len([line for line in boots if "BOOT ID" not in line]) == 1
    assert booted.succeed("cat /etc/machine-id") != Path("/etc/machine-id").read_text()


def test_writes_stay_inside_and_the_project_is_read_only(booted: Machine) -> None:
    booted.succeed("touch /opt/written-by-a-test")
    assert not Path("/opt/written-by-a-test").exists()
    booted.succeed("test -f /src/tests/systemd/container.py")
    booted.fail("touch /src/written-by-a-test")
    booted.fail("echo 1 >/proc/sys/kernel/panic")


def test_systemd_sees_its_own_cgroups_and_none_of_the_machine(booted: Machine) -> None:
    mounted = booted.succeed("findmnt --noheadings --list --types cgroup,cgroup2 --output TARGET").split()
    of_the_machine = sorted(map(str, cgroups.hierarchies().values()))
    assert sorted(mounted) in (of_the_machine, ["/sys/fs/cgroup"])
    assert booted.succeed("grep --count circleosd /proc/1/cgroup || true").strip() == "0"


def test_machine_tells_what_a_command_did(booted: Machine) -> None:
    assert booted.succeed("echo one", "echo two") == "one\ntwo\n"
    with pytest.raises(MachineError, match=r"(?s)`echo out; echo err >&2; exit 3`.*exit status 3.*out.*err"):
        booted.succeed("echo out; echo err >&2; exit 3")
    with pytest.raises(MachineError, match="exit status 0"):
        booted.fail("true")
    assert booted.execute("false | true")[0] == 1
    assert booted.execute("echo $not_set_at_all")[0] == 1
    assert booted.execute("echo begun; sleep 600", timeout=5) == (124, "begun\n")
    assert booted.execute("true", check_return=False) == (-1, "")
    assert booted.execute("sleep 60 >/dev/null 2>&1 &") == (0, "")


def test_machine_waits_and_gives_up(booted: Machine) -> None:
    booted.succeed("( sleep 0.5; touch /run/came ) >/dev/null 2>&1 &")
    booted.wait_for_file("/run/came")
    booted.wait_until_fails("test -e /run/never", timeout=1)
    with pytest.raises(MachineError, match="in vain"):
        booted.wait_until_succeeds("test -e /run/never", timeout=0)
    with pytest.raises(MachineError, match="no jobs"):
        booted.wait_for_unit("rescue.target")
    booted.execute("systemd-run --unit=broken -p Type=oneshot false")
    with pytest.raises(MachineError, match="has failed"):
        booted.wait_for_unit("broken.service")
    booted.wait_for_open_unix_socket("/run/dbus/system_bus_socket")
    with pytest.raises(MachineError, match="listener"):
        booted.wait_for_open_unix_socket("/run/never.sock", timeout=0)


def test_copies_files_and_directories_from_the_host(booted: Machine, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    script = tmp_path / "tree" / "script with a space"
    script.write_bytes(bytes(range(256)))
    script.chmod(0o750)
    os.chown(script, 1234, 1234)
    booted.copy_from_host(str(script), "/opt/new/place/script")
    booted.copy_from_host(str(tmp_path / "tree"), "/opt/tree")
    assert booted.succeed("stat -c '%a %u %s' /opt/new/place/script /opt/tree/*") == "750 0 256\n" * 2


def test_scenario_has_its_globals_and_says_how_it_went(
    booted: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = tmp_path / "scenario.py"
    scenario.write_text(
        'start_all()\nwith subtest("goes well"):\n    machine.succeed("true")\n'
        'with subtest("goes wrong"):\n    machine.succeed("false")\n'
    )
    with pytest.raises(MachineError, match="`false`") as caught:
        run_scenario(scenario, booted)
    assert any(str(entry.path) == str(scenario) and entry.lineno == 4 for entry in caught.traceback)
    goes_well, goes_wrong = capsys.readouterr().out.splitlines()
    assert goes_well.startswith("subtest: goes well: ok (")
    assert goes_wrong.startswith("subtest: goes wrong: FAILED (")


def test_containers_run_on_a_machine_with_cgroup_version_2_alone(lower: str) -> None:
    inner = script_that_boots("inner", "/", then="container.close()")
    with Container("outer", lower, {str(PROJECT): "/src"}, unified=True) as machine:
        machine.boot()
        done = machine.run(["env", "--chdir=/src", "PYTHONDONTWRITEBYTECODE=1", "python3", "-c", inner])
        assert (done.stdout, done.stderr) == ("booted\n", "")
        assert machine.run(["ls", "/sys/fs/cgroup"]).stdout.count("circleosd") == 0


def test_state_survives_a_reboot_and_a_crash_but_not_run_and_tmp(lower: str) -> None:
    kept = ["/etc/kept", "/var/lib/kept", "/opt/kept", "/home/kept"]
    lost = ["/run/lost", "/tmp/lost"]
    with Container(named("reboots"), lower) as container:
        machine = Machine(container)
        machine.succeed(f"touch {' '.join(kept + lost)}; rm /etc/hosts; logger first boot")
        machine.succeed("journalctl --sync")
        identity = machine.succeed("cat /etc/machine-id")
        for end in (machine.shutdown, machine.crash):
            end()
            assert not machine.is_up()
            end()
            with pytest.raises(BootError, match="not running"):
                container.run(["true"])
            machine.start()
            machine.succeed(*(f"test -e {path}" for path in kept))
            machine.fail(*(f"test -e {path}" for path in [*lost, "/etc/hosts"]))
            assert machine.succeed("cat /etc/machine-id") == identity
        machine.succeed("journalctl -b -2 -t root -o cat | grep 'first boot'")
        machine.fail("journalctl -b 0 -t root -o cat | grep 'first boot'")
        machine.execute("systemctl reboot", check_return=False)
        wait_until(lambda: not machine.is_up())
        machine.succeed("test -e /etc/kept")
    assert leftovers(named("reboots")) == []


def test_cgroup_version_2_alone_boots_too(lower: str) -> None:
    with Container(named("unified"), lower, unified=True) as container:
        assert container.boot() in BOOTED
        assert container.run(["stat", "-fc", "%T", "/sys/fs/cgroup"]).stdout == "cgroup2fs\n"
        container.shutdown()
        assert container.boot() in BOOTED
    assert leftovers(named("unified")) == []


def test_two_containers_run_at_a_time_and_know_nothing_of_each_other(lower: str) -> None:
    with Container(named("twin-a"), lower) as a, Container(named("twin-b"), lower) as b:
        assert a.boot() in BOOTED
        assert b.boot() in BOOTED
        a.run(["touch", "/etc/mine"])
        a.run(["systemd-run", "--unit=mine", "sleep", "infinity"])
        assert b.run(["ls", "/etc/mine"]).returncode != 0
        assert b.run(["pgrep", "--full", "sleep infinity"]).returncode == 1
        assert a.run(["pgrep", "--full", "sleep infinity"]).returncode == 0
        a.crash()
        assert b.run(["systemctl", "is-system-running"]).stdout.strip() in BOOTED
    assert leftovers(named("twin-a")) + leftovers(named("twin-b")) == []


def test_leftovers_sees_a_running_container_and_nothing_once_it_is_closed(lower: str) -> None:
    container = Container(named("seen"), lower)
    container.boot()
    container.run(["sh", "-c", "setsid sleep 600 >/dev/null 2>&1 </dev/null &"])
    assert kinds_of_leftovers(named("seen")) == {"cgroup", "process"}
    container.close()
    container.close()
    assert leftovers(named("seen")) == []


def test_an_exception_leaves_nothing_behind(lower: str) -> None:
    def boot_and_raise() -> None:
        with Container(named("raises"), lower) as container:
            container.boot()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        boot_and_raise()
    assert leftovers(named("raises")) == []


def test_a_command_that_takes_too_long_is_killed_with_its_children(lower: str, booted: Machine) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        booted.container.run(["sh", "-c", "sleep 4321 & sleep 4321"], timeout=0.5)
    booted.wait_until_fails("pgrep --full 'sleep 432[1]'")


def test_a_tree_without_systemd_is_refused_with_the_reason(lower: str, tmp_path: Path) -> None:
    with (
        Container(named("refused"), str(tmp_path)) as container,
        pytest.raises(BootError, match=f"cannot boot {tmp_path}"),
    ):
        container.boot()
    assert leftovers(named("refused")) == []


def test_sigkill_of_the_owner_leaves_nothing_behind(lower: str) -> None:
    with start("-c", script_that_boots(named("orphan"), lower)) as owner:
        owner.kill()
    wait_until(lambda: leftovers(named("orphan")) == [])


def test_sigkill_of_owner_and_keeper_ends_all_processes_and_the_next_start_sweeps_the_cgroups(
    lower: str,
) -> None:
    with start("-c", script_that_boots(named("swept"), lower)) as owner:
        keepers = {int(leaf.name.split(".")[-2]) for leaf in cgroups.leaves(named("swept"))}
        owner.send_signal(signal.SIGSTOP)  # or the keeper is reaped, and the test shows less
        for pid in keepers:
            os.kill(pid, signal.SIGKILL)
        owner.kill()
    wait_until(lambda: "process" not in kinds_of_leftovers(named("swept")))
    Container(named("next"), lower).close()
    assert leftovers(named("swept")) + leftovers(named("next")) == []


def test_an_interrupted_pytest_leaves_nothing_behind(lower: str, tmp_path: Path) -> None:
    test = tmp_path / "test_interrupted.py"
    test.write_text("import time\n\ndef test(booted):\n    print('booted', flush=True)\n    time.sleep(600)\n")
    with start(*PYTEST, "-s", str(test)) as run:
        assert kinds_of_leftovers(f"test-interrupted-{run.pid}") == {"cgroup", "process"}
        run.send_signal(signal.SIGINT)
        assert run.wait(30) == pytest.ExitCode.INTERRUPTED
    assert leftovers(f"test-interrupted-{run.pid}") == []


@pytest.mark.usefixtures("lower")  # gives up where no container can be booted at all
def test_a_tree_that_cannot_boot_skips_tests_but_fails_them_in_ci(tmp_path: Path) -> None:
    test = tmp_path / "test_nothing.py"
    test.write_text("def test(booted):\n    pass\n")
    for ci, outcome in (("", "1 skipped"), ("true", "1 error")):
        environment = {**os.environ, "CI": ci, "CIRCLEOSD_TEST_TREE": str(tmp_path)}
        run = subprocess.run(
            [sys.executable, *PYTEST, "-rs", str(test)],
            cwd=PROJECT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert outcome in run.stdout
        assert f"there is no systemd in {tmp_path}" in run.stdout
