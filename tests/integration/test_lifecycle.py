"""Processes come and go: on demand, when idle, after SIGKILL; nothing acknowledged is lost."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from circleosd.embedded.up import _make
from circleosd.errors import BadRequest
from circleosd.paths import SERVICES
from tests import PROJECT
from tests.integration.conftest import NewHost
from tests.integration.embedded_host import BIN, EmbeddedHost, read_reply
from tests.waiting import SECONDS

TICKER = "[Service]\nType=exec\nExecStart=/bin/sh -c 'echo up; while sleep 1; do :; done'\n"


@pytest.fixture
def host_to_be() -> Iterator[EmbeddedHost]:
    """A host that has not been started."""
    host = EmbeddedHost()
    yield host
    if host.process:
        assert host.stop() == 0, host.log
    assert host.processes() == []
    shutil.rmtree(host.directory)


def children(host: EmbeddedHost) -> list[int]:
    """Processes of the host without the supervisor."""
    assert host.process is not None
    return [pid for pid in host.processes() if pid != host.process.pid]


def test_nothing_runs_before_the_first_connection_and_after_the_last(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_SERVER_IDLE_EXIT": "1", "CIRCLEOSD_PLUGINS_IDLE_WORKER": "0.5"})
    assert children(host) == []
    host.load("plugins/example.wasm")
    assert host.invoke("example", "upper", "abc")["data"] == "ABC"
    with host.connect("plugin-manager") as sock:  # which it then waits for
        sock.sendall(b'{"action":"health"}\n')
        assert read_reply(sock)["data"]["pid"] in children(host)
    host.wait_for(lambda: children(host) == [])
    assert host.ok("plugin", "invoke", "example", "upper", "abc") == "ABC\n"


def test_idle_exits_lose_no_request(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_SERVER_IDLE_EXIT": "0.06"})
    pids, failures = set[int](), list[str]()

    def client(pause: float) -> None:
        asked = 0
        while asked < 25 or (len(pids) <= 3 and asked < 1000):
            asked += 1
            reply = host.call("auth-service", {"action": "health"})
            if not reply["ok"]:
                failures.append(str(reply))
            else:
                pids.add(reply["data"]["pid"])
            time.sleep(pause)  # about the idle limit, so that requests meet exits

    clients = [threading.Thread(target=client, args=(pause,)) for pause in (0.08, 0.11)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert failures == []
    assert len(pids) > 3, "the service did not exit in between, so this shows nothing"


@pytest.mark.parametrize("service", SERVICES)
def test_after_sigkill_in_the_middle_of_work_the_next_request_is_answered(host: EmbeddedHost, service: str) -> None:
    for _ in range(3):
        pid = host.pid(service)
        with host.connect(service) as sock:
            sock.sendall(b'{"action":"health"}\n' * 200)
            read_some = sock.recv(100)
            assert read_some
            os.kill(pid, signal.SIGKILL)
        assert host.pid(service) != pid


def test_what_was_acknowledged_before_a_sigkill_is_there_after_it(new_host: NewHost) -> None:
    host = new_host({})
    acknowledged: list[str] = []
    stop = threading.Event()

    def create(prefix: str) -> None:
        number = 0
        while not stop.is_set():
            name, number = f"{prefix}{number}", number + 1
            with contextlib.suppress(AssertionError, OSError):
                if host.call("auth-service", {"action": "create", "name": name, "password": "long enough"})["ok"]:
                    acknowledged.append(name)

    writers = [threading.Thread(target=create, args=(f"kill{n}_",)) for n in range(3)]
    for writer in writers:
        writer.start()
    for _ in range(4):
        goal = len(acknowledged) + 3
        host.wait_for(lambda: len(acknowledged) >= goal)  # noqa: B023  # called before the loop goes on
        os.kill(host.pid("auth-service"), signal.SIGKILL)
    stop.set()
    for writer in writers:
        writer.join()
    users = {user["name"] for user in host.data("auth-service", "list")}
    assert set(acknowledged) <= users
    created = {row["object"] for row in host.data("auth-service", "history", action_name="create", lines=10_000)}
    assert {name for name in users if name.startswith("kill")} == {name for name in created if name.startswith("kill")}


def test_plugins_are_there_after_the_manager_and_the_supervisor_restart(new_host: NewHost) -> None:
    host = new_host({})
    host.load("plugins/example.wasm")
    os.kill(host.pid("plugin-manager"), signal.SIGKILL)
    assert host.ok("plugin", "invoke", "example", "crc32", "hello") == "3610a686\n"
    assert host.stop() == 0
    host.start()
    assert host.ok("plugin", "invoke", "example", "crc32", "hello") == "3610a686\n"


def test_a_dead_supervisor_takes_its_services_along_and_the_next_one_starts(new_host: NewHost) -> None:
    host = new_host({})
    host.add_service("ticker", TICKER)
    host.ok("service", "start", "ticker")
    for service in SERVICES:
        host.pid(service)
    assert host.process is not None
    host.stop(signal.SIGKILL)
    host.wait_for(lambda: host.processes() == [])
    host.start()
    assert "inactive" in host.ok("service", "list")


def test_a_second_supervisor_is_refused(host: EmbeddedHost) -> None:
    second = subprocess.run(
        [BIN / "circleosd", "up", "--dir", host.directory],
        env=host.environment, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert second.returncode == 7
    assert second.stderr == f"circleosd: CircleOSD is already running at {host.runtime}\n"
    assert host.pid("auth-service")


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_elsewhere_does_not_share_the_state_directory(host: EmbeddedHost, service: str) -> None:
    elsewhere = EmbeddedHost({f"XDG_{kind.upper()}_HOME": str(host.directory / kind) for kind in ("state", "cache")})
    with host.connect(service), subprocess.Popen(
        [BIN / "circleosd", "up"], env=elsewhere.environment, stderr=subprocess.PIPE, text=True
    ) as second:  # fmt: skip
        assert second.stderr is not None
        assert "listening below" in second.stderr.readline()
        host.pid(service)
        reply = elsewhere.call(service, {"action": "health"})
        second.terminate()
        second.stderr.read()
    shutil.rmtree(elsewhere.directory)
    assert reply["error"] == "unavailable"
    assert f"{service} cannot start: another process uses {host.directory}/state/circleosd/" in reply["message"]
    assert reply["message"].endswith(", perhaps a CircleOSD that is running elsewhere")
    assert second.returncode == 0


@pytest.mark.parametrize("service", SERVICES)
def test_where_systemd_listens_no_supervisor_takes_its_place(host_to_be: EmbeddedHost, service: str) -> None:
    host_to_be.runtime.mkdir()
    with socket.create_server(str(host_to_be.runtime / f"{service}.sock"), family=socket.AF_UNIX):
        refused = subprocess.run(
            [BIN / "circleosd", "up", "--dir", host_to_be.directory],
            env=host_to_be.environment, capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        assert refused.stderr == f"circleosd: CircleOSD is already running at {host_to_be.runtime}\n"
        assert refused.returncode == 7
        assert [path.name for path in host_to_be.runtime.iterdir()] == [f"{service}.sock"]
    host_to_be.start()  # nobody listens at what is left


def test_sockets_that_have_replaced_the_supervisors_stay(host_to_be: EmbeddedHost) -> None:
    host_to_be.start()
    paths = {host_to_be.runtime / f"{service}.sock" for service in SERVICES}
    for path in paths:
        path.unlink()  # as systemd does, where it is to listen
        path.touch()
    assert host_to_be.stop() == 0
    assert set(host_to_be.runtime.iterdir()) == paths


def test_any_cataloged_unit_is_started_stopped_and_restarted(host: EmbeddedHost) -> None:
    host.add_service("ticker", TICKER)
    listed = {row["name"]: row for row in json.loads(host.ok("service", "list", "--json"))}
    assert listed["ticker"]["state"] == "inactive"
    assert "active (running" in host.ok("service", "start", "ticker")
    first = host.data("service-registry", "status", name="ticker")
    assert first["state"] == "active"
    assert Path(f"/proc/{first['pid']}").exists()
    assert "active (running" in host.ok("service", "start", "ticker")
    assert host.data("service-registry", "status", name="ticker")["pid"] == first["pid"]
    host.ok("service", "restart", "ticker")
    second = host.data("service-registry", "status", name="ticker")
    assert second["pid"] != first["pid"]
    assert "inactive (dead)" in host.ok("service", "stop", "ticker")
    assert not Path(f"/proc/{second['pid']}").exists()


@pytest.mark.parametrize(
    ("unit", "says"),
    [
        ("[Service]\nExecStart=/nonexistent/program\n", "'/nonexistent/program'"),
        ("[Service]\nType=forking\nExecStart=/bin/true\n", "does not support Type=forking, only simple, exec, notify"),
        (
            "[Service]\nType=notify\nExecStart=/bin/sh -c 'echo no license; exit 3'\n",
            "exit status 3; it said: no license",
        ),
        ("[Service]\nType=notify\nTimeoutStartSec=300ms\nExecStart=/bin/sleep 60\n", "the unit's result is timeout"),
        ("[Service\n", "line 1 is neither"),
        ("[Service]\n", "one ExecStart="),
        ("[Service]\nUser=somebody\nExecStart=/bin/true\n", "not as User=somebody"),
        ("[Service]\nKillSignal=SIGNAL\nExecStart=/bin/true\n", "does not support KillSignal=SIGNAL"),
        ("[Service]\nEnvironment==x\nExecStart=/bin/true\n", "cannot run broken.service"),
        ("[Service]\nUMask=777777777777777\nExecStart=/bin/true\n", "cannot run broken.service"),
        (
            "[Service]\nWorkingDirectory=/nonexistent\nExecStart=/bin/true\n",
            "No such file or directory: '/nonexistent'",
        ),
        ("[Service]\nWatchdogSec=soon\nExecStart=/bin/true\n", "WatchdogSec=soon is not a time span"),
    ],
)
def test_a_unit_that_cannot_start_says_why(host: EmbeddedHost, unit: str, says: str) -> None:
    host.add_service("broken", unit)
    done = host.ctl("service", "start", "broken")
    assert done.returncode == 11, done
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_service_that_fails_is_started_again_later_each_time(host: EmbeddedHost) -> None:
    host.add_service(
        "crasher", "[Service]\nType=notify\nRestart=on-failure\nRestartSec=50ms\nExecStart=/bin/sh -c 'exit 1'\n"
    )
    assert host.ctl("service", "start", "crasher").returncode == 11
    host.wait_for(lambda: host.data("service-registry", "status", name="crasher")["restarts"] >= 3)
    assert "restart in 0.1 s" in host.log
    assert "restart in 0.4 s" in host.log
    host.ok("service", "stop", "crasher")
    restarts = host.data("service-registry", "status", name="crasher")["restarts"]
    host.data("service-registry", "list")
    assert host.data("service-registry", "status", name="crasher")["restarts"] == restarts


def test_a_service_that_cannot_start_is_not_started_again(host: EmbeddedHost) -> None:
    unit = "[Service]\nType=notify\nRestart=on-failure\nRestartSec=50ms\nRestartPreventExitStatus=2 12\n"
    host.add_service("refuser", f"{unit}ExecStart=/bin/sh -c 'exit 12'\n")
    assert host.ctl("service", "start", "refuser").returncode == 11
    time.sleep(0.3)  # in which it would be started some times
    status = host.data("service-registry", "status", name="refuser")
    assert (status["state"], status["exit_status"], status["restarts"]) == ("failed", 12, 0)


def test_a_service_that_ends_at_once_is_not_started_in_a_tight_loop(host: EmbeddedHost) -> None:
    host.add_service("brief", "[Service]\nType=exec\nRestart=always\nRestartSec=50ms\nExecStart=/bin/true\n")
    host.ok("service", "start", "brief")
    host.wait_for(lambda: "brief: ended (success, exit status 0); restart in 0.4 s" in host.log)
    host.ok("service", "stop", "brief")


def test_a_connection_that_no_service_accepts_does_not_start_it_in_a_tight_loop(host: EmbeddedHost) -> None:
    host.add_service("dying", "[Service]\nType=exec\nExecStart=/bin/sh -c 'echo died; exit 1'\n")
    (host.units / "dying.socket").write_text("[Socket]\nListenStream=%t/circleosd/dying.sock\n")
    (host.catalog / "dying-socket.toml").write_text('[[service]]\nname = "dying-socket"\nunit = "dying.socket"\n')
    assert "active (listening)" in host.ok("service", "start", "dying-socket")
    with host.connect("dying"):
        host.wait_for(lambda: host.log.count("dying: died") >= 3)
        host.ok("service", "stop", "dying-socket")
    times = [row["time"] for row in host.data("service-registry", "logs", name="dying")]
    assert times[2] - times[0] >= 0.4
    assert not (host.runtime / "dying.sock").exists()


def test_jobs_of_many_at_once_for_one_unit_all_end(host: EmbeddedHost) -> None:
    host.add_service("wanted")
    replies: list[dict[str, object]] = []

    def ask(number: int) -> None:
        for turn in range(4):
            verb = ("start", "stop", "restart")[(number + turn) % 3]
            replies.append(host.call("service-registry", {"action": verb, "name": "wanted"}, timeout=SECONDS))

    askers = [threading.Thread(target=ask, args=(number,)) for number in range(15)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(replies) == 60
    # A start that a stop overtakes is given up; nothing else can go wrong with this unit.
    given_up = "the job's result is canceled"
    wrong = [reply for reply in replies if not reply["ok"] and given_up not in str(reply["message"])]
    assert wrong == []
    host.ok("service", "stop", "wanted")


def test_who_waits_for_a_service_whose_unit_cannot_be_run_is_told_why(new_host: NewHost) -> None:
    host = new_host({})
    unit = (PROJECT / "units/circleosd-auth.service").read_text() + "WorkingDirectory=/nonexistent\n"
    (host.units / "circleosd-auth.service").write_text(unit)
    reply = host.call("auth-service", {"action": "list"}, timeout=SECONDS)
    assert reply["error"] == "unavailable"
    assert "cannot run circleosd-auth.service: [Errno 2] No such file or directory" in reply["message"]
    (host.units / "circleosd-auth.service").unlink()
    host.wait_for(lambda: host.call("auth-service", {"action": "list"})["ok"])


def test_a_masked_unit_is_not_run(host: EmbeddedHost) -> None:
    host.add_service("masked")
    (host.units / "masked.service").unlink()
    (host.units / "masked.service").symlink_to("/dev/null")
    assert host.ctl("service", "start", "masked").returncode == 11


def test_a_service_that_does_not_stop_is_killed(host: EmbeddedHost) -> None:
    command = "/bin/sh -c 'trap : TERM; echo deaf; while :; do sleep 0.1; done'"
    host.add_service("deaf", f"[Service]\nType=exec\nTimeoutStopSec=300ms\nExecStart={command}\n")
    host.ok("service", "start", "deaf")
    host.wait_for(lambda: "deaf" in host.logged("deaf"))
    assert "failed" in host.ok("service", "stop", "deaf")
    status = host.data("service-registry", "status", name="deaf")
    assert (status["result"], status["signal"]) == ("timeout", "SIGKILL")


def test_a_changed_unit_file_counts_at_the_next_start(host: EmbeddedHost) -> None:
    for word in ("before", "after"):
        host.add_service("changing", f"[Unit]\nDescription={word}\n[Service]\nExecStart=/bin/sh -c 'echo {word}'\n")
        host.ok("service", "restart", "changing")
        host.wait_for(lambda: word in host.logged("changing"))  # noqa: B023  # called at once
        assert host.data("service-registry", "status", name="changing")["description"] == word


def test_output_is_logged_in_lines_whatever_comes(host: EmbeddedHost) -> None:
    script = host.directory / "talk"
    script.write_text(
        r"printf 'one\ntw'; sleep 0.3; printf 'o\n'; head -c 100000 /dev/zero | tr '\0' x; printf '\n\033[31m\377last'"
    )
    host.add_service("talk", f"[Service]\nExecStart=/bin/sh {script}\n")
    host.ok("service", "start", "talk")
    host.wait_for(lambda: host.logged("talk")[-1:] and host.logged("talk")[-1].endswith("last"))
    lines = host.logged("talk")
    assert lines[:2] == ["one", "two"]
    assert "".join(lines[2:-1]) == "x" * 100_000
    assert max(map(len, lines)) < 20_000
    assert lines[-1] == "\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}last"


def test_a_start_is_given_up_when_the_supervisor_stops(new_host: NewHost) -> None:
    host = new_host({})
    host.add_service("never", "[Service]\nType=notify\nExecStart=/bin/sleep 100\n")
    with host.connect("service-registry") as sock:
        sock.sendall(b'{"action":"start","name":"never"}\n')
        host.wait_for(lambda: host.data("service-registry", "status", name="never")["state"] == "activating")
        assert host.stop(signal.SIGINT) == 0
        assert "canceled" in read_reply(sock)["message"]
    assert not host.runtime.exists()


def test_a_closed_terminal_ends_everything_in_order(host_to_be: EmbeddedHost) -> None:
    host_to_be.add_service("parent", "[Service]\nType=exec\nExecStart=/bin/sh -c 'sleep 1000 & sleep 1000'\n")
    host_to_be.start()
    host_to_be.ok("service", "start", "parent")
    assert host_to_be.stop(signal.SIGHUP) == 0
    assert host_to_be.processes() == []
    assert not host_to_be.runtime.exists()
    host_to_be.wrapper = ["nohup"]
    host_to_be.start()
    assert host_to_be.process is not None
    host_to_be.process.send_signal(signal.SIGHUP)
    host_to_be.ok("user", "list")


def test_a_runtime_directory_is_left_as_it_was_found(host_to_be: EmbeddedHost) -> None:
    host_to_be.start()
    host_to_be.load("plugins/example.wasm")
    assert host_to_be.stop() == 0
    assert not host_to_be.runtime.exists()
    host_to_be.runtime.mkdir()
    host_to_be.start()
    assert host_to_be.stop() == 0
    assert list(host_to_be.runtime.iterdir()) == []


@pytest.mark.usefixtures("other_users")
def test_who_has_no_home_is_told_what_to_set_and_then_runs(host_to_be: EmbeddedHost) -> None:
    host_to_be.directory.chmod(0o777)
    environment = {"PATH": os.environ["PATH"]}
    said = ""
    for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        done = subprocess.run(
            [BIN / "circleosd", "up"], env=environment, user=4_000_000, group=4_000_000, extra_groups=[],
            capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr == f"circleosd: uid 4000000 has no home directory; set HOME or {variable}\n"
        environment[variable] = str(host_to_be.directory / variable)
    with subprocess.Popen(
        [BIN / "circleosd", "up"], env=environment, user=4_000_000, group=4_000_000, extra_groups=[],
        stderr=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        assert running.stderr is not None
        said = running.stderr.readline()
        running.terminate()
        said += running.stderr.read()
    assert "listening below" in said
    assert running.returncode == 0, said


@pytest.mark.parametrize(
    ("place", "status", "says"),
    [
        (
            "/tmp/" + "d" * 90,
            2,
            "a path may have at most 107 bytes; choose a shorter directory, with CIRCLEOSD_RUNTIME_DIR or ",
        ),
        ("/dev/null", 12, "cannot run CircleOSD at /dev/null/run: Not a directory"),
    ],
)
def test_a_place_that_does_not_do_is_refused(place: str, status: int, says: str) -> None:
    done = subprocess.run(
        [BIN / "circleosd", "up", "--dir", place], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (status, 1)
    assert says in done.stderr
    assert not Path(place).is_dir()


@pytest.mark.usefixtures("other_users")
@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("theirs", "theirs belongs to uid 4000000"),
        ("theirs/deep/below", "theirs belongs to uid 4000000"),
        ("link", "link belongs to uid 4000000"),
        ("link-to-theirs/below", "link-to-theirs belongs to uid 4000000"),
        ("theirs/ours/below", None),
    ],
)
def test_a_place_in_the_hands_of_another_user_is_refused(
    host_to_be: EmbeddedHost, place: str, says: str | None
) -> None:
    theirs, link = host_to_be.directory / "theirs", host_to_be.directory / "link"
    (theirs / "ours").mkdir(parents=True)
    os.chown(theirs, 4_000_000, 4_000_000)
    (host_to_be.directory / "link-to-theirs").symlink_to(theirs)
    link.symlink_to(theirs / "ours")
    os.chown(link, 4_000_000, 4_000_000, follow_symlinks=False)
    host_to_be.environment["CIRCLEOSD_RUNTIME_DIR"] = str(host_to_be.directory / place)
    with subprocess.Popen(
        [BIN / "circleosd", "up"], env=host_to_be.environment, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stderr is not None
        said = running.stderr.readline()
        if "listening below" in said:
            running.terminate()
    assert (says or "listening below") in said
    assert running.returncode == (2 if says else 0)


@pytest.mark.usefixtures("other_users")
def test_where_no_services_of_the_system_are_installed_root_checks_settings_as_up_reads_them(tmp_path: Path) -> None:
    if "circleosd-auth" in {user.pw_name for user in pwd.getpwall()}:
        pytest.skip("the services of the system are installed on this machine")
    path = tmp_path / ".circleosd" / "config.toml"
    path.parent.mkdir()
    path.write_text("[server]\nidle_exit = 5\n")
    for place in (path.parent, path):
        os.chown(place, 4_000_000, 4_000_000)
    done = subprocess.run(
        [BIN / "circleosd", "check-settings"],
        env={"HOME": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("other_users")
@pytest.mark.parametrize("linked", [False, True])
def test_a_place_that_another_user_makes_at_the_last_moment_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    mkdir = Path.mkdir
    mkdir(tmp_path / "ours")

    def too_late(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if linked:
            (tmp_path / "trial").symlink_to("ours")
        else:
            mkdir(tmp_path / "trial")
        os.chown(tmp_path / "trial", 4_000_000, 4_000_000, follow_symlinks=False)
        mkdir(path, mode, parents, exist_ok)

    monkeypatch.setattr(Path, "mkdir", too_late)
    with pytest.raises(BadRequest, match="trial belongs to uid 4000000"):
        _make(tmp_path / "trial" / "run")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["polkit-rule", "--dir"], 2, "usage: circleosd COMMAND"),
        (["polkit-rule", ""], 2, "usage: circleosd COMMAND"),
        (["polkit-rule", "/nonexistent"], 5, "circleosd: no directory /nonexistent\n"),
        (["worker", "-x"], 2, "usage: circleosd COMMAND"),
        (["up", "--dir", ""], 2, "usage: circleosd COMMAND"),
        (["up", "--dir", "--dir"], 2, "usage: circleosd COMMAND"),
        (["upp", "a b"], 2, "usage: circleosd COMMAND"),
    ],
)
def test_a_flag_or_nothing_is_no_name(arguments: list[str], status: int, says: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [BIN / "circleosd", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(says)
    if status == 2:
        assert done.stderr.endswith(f"\ncircleosd: invalid command line: circleosd {shlex.join(arguments)}\n")
    assert list(tmp_path.iterdir()) == []


def test_what_keeps_a_service_from_starting_is_an_error_in_the_journal(tmp_path: Path) -> None:
    with (tmp_path / "journal").open("w+b") as journal:
        found = os.fstat(journal.fileno())
        environment = {**os.environ, "JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        done = subprocess.run(
            [BIN / "circleosd", "auth-service"], stderr=journal, env=environment, timeout=SECONDS, check=False
        )
        journal.seek(0)
        assert done.returncode == 12
        assert journal.read().startswith(b"<3>circleosd: cannot start auth-service: ")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["--help", "--version", "polkit-rule ."])
def test_an_output_that_is_full_or_read_by_nobody_is_no_traceback(
    command: str, unbuffered: str, tmp_path: Path
) -> None:
    unread, pipe = os.pipe()
    os.close(unread)
    with open("/dev/full", "wb") as full, open(pipe, "wb") as closed:
        for output, status, says in [
            (full, 12, "circleosd: cannot write the output: No space left on device\n"),
            (closed, 141, ""),
        ]:
            done = subprocess.run(
                [BIN / "circleosd", *command.split()], cwd=tmp_path, stdout=output, stderr=subprocess.PIPE, text=True,
                timeout=SECONDS, check=False, env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            )  # fmt: skip
            assert (done.returncode, done.stderr) == (status, says)


@pytest.mark.parametrize("arguments", [["--help"], ["up", "-h"], ["polkit-rule", "--help"], ["nonsense", "--help"]])
def test_help_is_had_everywhere(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run([BIN / "circleosd", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: circleosd COMMAND")
    assert list(tmp_path.iterdir()) == []


def test_a_service_that_gives_no_sign_of_life_is_ended_by_the_watchdog(host: EmbeddedHost) -> None:
    ready = "import os,socket,time;s=socket.socket(1,2);s.connect(os.environ['NOTIFY_SOCKET']);s.send(b'READY=1')"
    command = f'python3 -c "{ready};time.sleep(60)"'
    host.add_service("stuck", f"[Service]\nType=notify\nWatchdogSec=300ms\nExecStart={command}\n")
    host.ok("service", "start", "stuck")
    host.wait_for(lambda: host.data("service-registry", "status", name="stuck")["state"] == "failed")
    assert host.data("service-registry", "status", name="stuck")["result"] == "watchdog"


def test_a_frozen_daemon_is_replaced(new_host: NewHost) -> None:
    host = new_host({})
    unit = (PROJECT / "units/circleosd-auth.service").read_text()
    (host.units / "circleosd-auth.service").write_text(unit.replace("WatchdogSec=20s", "WatchdogSec=2s"))
    pid = host.pid("auth-service")
    os.kill(pid, signal.SIGSTOP)
    assert host.pid("auth-service") != pid


def test_stopping_a_service_on_demand_says_that_its_socket_listens(host: EmbeddedHost) -> None:
    host.pid("auth-service")
    reply = host.call("service-registry", {"action": "stop", "name": "auth-service"})
    assert reply["data"]["state"] == "inactive"
    assert "circleosd-auth.socket is still listening and will start it on demand" in reply["message"]
    assert host.pid("auth-service")


@pytest.mark.parametrize("service", SERVICES)
def test_a_daemon_stays_small_over_a_thousand_requests(host: EmbeddedHost, service: str) -> None:
    with host.connect(service) as sock:
        for _ in range(1000):
            sock.sendall(b'{"action":"list"}\n')
            assert read_reply(sock)["ok"]
    memory = host.data(service, "health")["memory"]
    assert memory <= 45 << 20, f"{service} holds {memory / (1 << 20):.1f} MiB"


def spoil_the_database(host: EmbeddedHost) -> str:
    database = host.database("auth")
    database.parent.mkdir(parents=True)
    database.write_bytes(b"no database " * 400)
    return "file is not a database"


def misspell_a_setting(host: EmbeddedHost) -> str:
    (host.catalog.parent / "config.toml").write_text("[server]\nidle_exti = 5\n")
    return "no such setting: server.idle_exti"


def put_a_file_in_the_way(host: EmbeddedHost) -> str:
    host.database("auth").mkdir(parents=True)
    return "auth.db: Is a directory"


@pytest.mark.parametrize("spoil", [spoil_the_database, misspell_a_setting, put_a_file_in_the_way])
def test_who_waits_for_a_service_that_cannot_start_is_told_why(
    host_to_be: EmbeddedHost, spoil: Callable[[EmbeddedHost], str]
) -> None:
    why = spoil(host_to_be)
    host_to_be.start()
    with host_to_be.connect("auth-service") as silent:  # holds up nobody
        for _ in range(3):
            reply = host_to_be.call("auth-service", {"action": "list"}, timeout=SECONDS)
            assert reply["error"] == "unavailable"
            assert reply["message"].startswith("auth-service cannot start: ")
            assert why in reply["message"]
        assert read_reply(silent)["error"] == "unavailable"
    host_to_be.wait_for(lambda: why in host_to_be.log)
    done = host_to_be.ctl("user", "list")
    assert done.returncode == 12
    assert why in done.stderr
