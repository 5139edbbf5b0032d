"""What the caller, the plugin and everybody else get when plugin code goes wrong."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from circleosd.worker.limits import hard_deadline
from tests.component_text import component
from tests.core_text import LOG, SPIN, core
from tests.integration.conftest import NewHost
from tests.integration.embedded_host import EmbeddedHost, read_reply
from tests.integration.made import write
from tests.measuring import once_it_holds
from tests.native_source import native
from tests.wasi_text import command
from tests.wasm_binary import padded

TRAP = '(func $deep (unreachable)) (func (export "trap") (param i32) (result i64) (call $deep) (i64.const 0))'
COMPLAIN = """(data (i32.const 64) "no such customer")
  (func (export "complain") (param i32) (result i64) (i64.const 0x4080000010))"""
CRASH = """
HANDLER(crash) {
    switch (payload[0]) {
        case 's': *(volatile int *)8 = 1; break;
        case 'e': _exit(12);
        case 'z': exit(0);
        case 'h': for (;;) pause();
    }
    host->write(reply, "fine", 4);
    return 0;
}
"""
# The worker ends itself when its manager hangs up, as long as nobody takes that from it.
STAY = """
#include <dlfcn.h>
HANDLER(stay) {
    UNUSED;
    void *python = dlopen(NULL, RTLD_LAZY);
    int state = ((int (*)(void))dlsym(python, "PyGILState_Ensure"))();
    int (*run)(const char *) = dlsym(python, "PyRun_SimpleString");
    run("import os, time; os._exit = lambda status: time.sleep(3600)");
    ((void (*)(int))dlsym(python, "PyGILState_Release"))(state);
    return 0;
}"""
SLOWLY = "HANDLER(slow) { UNUSED; sleep(1); return echo(host, payload, length, reply); }"


def details(host: EmbeddedHost, plugin: str) -> dict[str, Any]:
    shown: dict[str, Any] = host.data("plugin-manager", "show", id=plugin)
    return shown


def test_a_trap_is_told_with_its_backtrace_and_a_plugins_own_error_with_its_words(
    host: EmbeddedHost, tmp_path: Path
) -> None:
    host.load(write(tmp_path, "weak", core(TRAP + COMPLAIN)))
    reply = host.invoke("weak", "trap")
    assert reply["error"] == "plugin-failed"
    assert "trap: " in reply["message"]
    assert "unreachable" in reply["message"]
    assert "deep" in reply["message"]
    reply = host.invoke("weak", "complain")
    assert (reply["error"], reply["message"]) == ("plugin-failed", "no such customer")
    assert host.invoke("weak", "echo", "still here")["data"] == "still here"
    shown = details(host, "weak")
    assert (shown["calls"], shown["failures"]) == (3, 1)
    (listed,) = (row for row in host.data("plugin-manager", "list") if row["id"] == "weak")
    assert (listed["calls"], listed["failures"]) == (3, 1)
    assert "unreachable" in shown["last_error"]
    host.unload("weak")


def test_a_worker_that_ends_late_in_a_call_is_not_said_to_have_been_ended_for_its_time(
    host: EmbeddedHost, tmp_path: Path
) -> None:
    artifact = native(CRASH, "crash")
    host.load(write(tmp_path, "crasher", artifact, plugin_type="native", limits={"time": 0.3}), trust=True)

    def killed() -> dict[str, Any]:
        assert host.invoke("crasher", "crash", "fine")["ok"]  # so that there is a worker
        worker = host.data("service-registry", "status", name="plugin@crasher")["pid"]
        with ThreadPoolExecutor(1) as pool:
            hanging = pool.submit(host.invoke, "crasher", "crash", "h")
            host.wait_for(lambda: details(host, "crasher")["waiting"] == 1)
            with contextlib.suppress(ProcessLookupError):  # it took longer to get here
                os.kill(worker, signal.SIGSTOP)  # so that its own alarm waits, too
                time.sleep(hard_deadline(0.3) + 0.2)
                os.kill(worker, signal.SIGKILL)
            return hanging.result()

    reply = once_it_holds(killed, lambda reply: "by SIGKILL" in reply["message"], tries=3)
    assert reply["error"] == "plugin-failed"
    host.unload("crasher")


def test_a_worker_that_died_is_a_failed_service_only_while_its_plugin_is_loaded(
    host: EmbeddedHost, tmp_path: Path
) -> None:
    def failed() -> list[str]:
        return [row["name"] for row in host.data("service-registry", "list") if row["state"] == "failed"]

    artifact = native(CRASH, "crash")
    host.load(write(tmp_path, "mortal", artifact, plugin_type="native"), trust=True)
    assert "by SIGSEGV" in host.invoke("mortal", "crash", "s")["message"]
    assert "plugin@mortal" in failed()
    host.unload("mortal")
    assert "plugin@mortal" not in failed()
    assert host.ctl("service", "status", "plugin@mortal").returncode == 5


@pytest.mark.parametrize("words", ["gave a hint", "trap: none"])
def test_an_error_of_the_plugins_own_is_no_failure_however_it_is_worded(
    host: EmbeddedHost, tmp_path: Path, words: str
) -> None:
    own = f'''(data (i32.const 64) "{words}") (func (export "complain") (param i32) (result i64)
      (i64.const {64 << 32 | 1 << 31 | len(words)}))'''
    host.load(write(tmp_path, "wordy", core(own)))
    for _ in range(4):
        assert host.invoke("wordy", "complain")["message"] == words
    assert details(host, "wordy")["failures"] == 0
    host.unload("wordy")


def test_a_component_that_breaks_its_abi_has_failed(host: EmbeddedHost, tmp_path: Path) -> None:
    host.load(write(tmp_path, "outside", component(handle="(i32.const -16)")))
    assert "pointer" in host.invoke("outside", "handle")["message"]
    assert details(host, "outside")["failures"] == 1
    host.unload("outside")


def test_a_taken_over_worker_that_reports_what_is_no_text_has_broken_the_protocol(
    host: EmbeddedHost, tmp_path: Path
) -> None:
    body = json.dumps(json.dumps({"code": "limit", "message": "\ud800", "backtrace": []}))
    forge = f"""HANDLER(forge) {{ UNUSED; const char *said = {body};
      unsigned char frame[256] = {{0, 0, 0, strlen(said), 19, 0, 0, 0, 1}}; memcpy(frame + 9, said, strlen(said));
      for (int fd = 3; fd < 16; fd++) send(fd, frame, 9 + strlen(said), MSG_NOSIGNAL); for (;;) pause(); }}"""
    artifact = native(forge, "forge")
    host.load(write(tmp_path, "forger", artifact, plugin_type="native"), trust=True)
    reply = host.invoke("forger", "forge")
    assert reply["error"] == "plugin-failed", reply
    assert "broke the protocol" in reply["message"]
    assert host.invoke("forger", "echo", "fine")["data"] == "fine"
    host.unload("forger")


def test_a_worker_that_does_not_even_end_itself_is_stopped_once_for_all_its_calls(
    host: EmbeddedHost, tmp_path: Path
) -> None:
    hang = "HANDLER(hang) { UNUSED; signal(SIGALRM, SIG_IGN); for (;;) pause(); }"
    limits = {"time": 0.3, "concurrency": 4}
    host.load(write(tmp_path, "hung", native(hang, "hang"), plugin_type="native", limits=limits), trust=True)
    with ThreadPoolExecutor(4) as pool:
        replies = [*pool.map(lambda _: host.invoke("hung", "hang", ""), range(4))]
    assert [reply["error"] for reply in replies] == ["timeout"] * 4
    assert host.invoke("hung", "echo", "fine")["data"] == "fine"
    assert details(host, "hung")["failures"] == 1
    host.unload("hung")
    stopped = host.data("service-registry", "history", object="plugin@hung", action_name="stop")
    assert [row["phase"] for row in stopped] == ["intent", "outcome"] * 2, "one for the calls, and one for the unload"


@pytest.mark.parametrize("action", ["disable", "grant", None])
def test_a_worker_that_does_not_end_when_it_is_hung_up_on_is_stopped(
    new_host: NewHost, tmp_path: Path, action: str | None
) -> None:
    host = new_host({} if action else {"CIRCLEOSD_PLUGINS_IDLE_WORKER": "0.5"})
    path = write(tmp_path, "clinging", native(STAY, "stay"), plugin_type="native", capabilities=["kv"])
    host.load(path, trust=True)
    assert host.invoke("clinging", "stay")["ok"]
    pid = host.data("service-registry", "status", name="plugin@clinging")["pid"]
    if action:
        host.data("plugin-manager", action, id="clinging", **({"capability": "kv"} if action == "grant" else {}))
    host.wait_for(lambda: not Path(f"/proc/{pid}").exists())
    host.data("plugin-manager", "enable", id="clinging")
    assert host.invoke("clinging", "echo", "fine")["data"] == "fine"
    assert details(host, "clinging")["failures"] == 0


def test_a_native_plugin_that_hangs_while_it_is_loaded_keeps_nobody_waiting_for_long(
    host: EmbeddedHost, tmp_path: Path
) -> None:
    hang = """__attribute__((constructor)) void hang(void) { sigset_t all; sigfillset(&all);
      sigprocmask(SIG_BLOCK, &all, 0); for (;;) pause(); }"""
    path = write(tmp_path, "stuck", native(hang), plugin_type="native", limits={"time": 0.1})
    refused = host.ctl("plugin", "load", str(path), "--trust")
    assert refused.returncode == 9, refused.stderr
    said = "took longer than 10.6 s [timeout]\n"
    assert refused.stderr.endswith(said), "the next step is none for what is the plugin's fault"


def test_a_worker_that_hangs_while_it_starts_again_does_not_stand_in_the_way_of_the_next(
    host: EmbeddedHost, tmp_path: Path
) -> None:
    once = r"""
HANDLER(arm) { UNUSED; const char *answer; size_t size;
  const char *call = "{\"call\":\"kv.set\",\"args\":{\"key\":\"hang\",\"value\":\"\"}}";
  host->call(call, strlen(call), &answer, &size); _exit(0); }
HANDLER(start) { UNUSED; const char *answer; size_t size;
  const char *call = "{\"call\":\"kv.delete\",\"args\":{\"key\":\"hang\"}}";
  if (host->call(call, strlen(call), &answer, &size) == 0 && !strcmp(answer, "true")) {
    signal(SIGALRM, SIG_IGN); for (;;) pause(); }
  return 0; }"""
    artifact = native(once, "arm", more=".init = start")
    path = write(tmp_path, "starting", artifact, plugin_type="native", limits={"time": 0.3}, capabilities=["kv"])
    host.load(path, trust=True, grant="kv")
    assert host.invoke("starting", "arm")["error"] == "plugin-failed"
    assert "cannot be loaded: took longer than 10.8 s" in host.invoke("starting", "echo")["message"]
    assert host.invoke("starting", "echo", "fine")["data"] == "fine"
    host.unload("starting")


def test_code_that_does_not_end_while_it_is_loaded_took_too_long(host: EmbeddedHost, tmp_path: Path) -> None:
    endless = "__attribute__((constructor)) void endless(void) { for (;;) pause(); }"
    path = write(tmp_path, "endless", native(endless), plugin_type="native", limits={"time": 0.5})
    reply = host.call("plugin-manager", {"action": "load", "path": str(path), "trust": True})
    assert (reply["error"], reply["message"]) == ("timeout", "endless cannot be loaded: took longer than 0.5 s")


@pytest.mark.parametrize("upgrade", [False, True])
def test_code_that_ends_its_worker_while_it_is_loaded_is_told_with_where_its_words_are(
    host: EmbeddedHost, tmp_path: Path, upgrade: bool
) -> None:
    if upgrade:
        host.load(write(tmp_path, "torn", native(""), plugin_type="native"), trust=True)
    torn = '__attribute__((constructor)) void begin(void) { fprintf(stderr, "it is torn\\n"); abort(); }'
    path = write(tmp_path, "torn", native(torn), plugin_type="native")
    reply = host.call("plugin-manager", {"action": "load", "path": str(path), "trust": True})
    said, step = reply["message"].split("; see: circlectl ")
    assert (reply["error"], said) == (
        "plugin-failed",
        "the worker of torn ended while it loaded the plugin by SIGABRT",
    )
    assert "it is torn" in host.ok(*step.split())
    if upgrade:
        host.unload("torn")


@pytest.mark.parametrize(
    ("payload", "error", "words"),
    [
        ("s", "plugin-failed", "ended during the call by SIGSEGV"),
        ("e", "plugin-failed", "exit status 12"),
        ("z", "plugin-failed", "exit status 0"),
        ("h", "timeout", "longer than 1 s"),
    ],
)
def test_the_end_of_a_worker_is_told_and_the_next_call_gets_a_new_one(
    host: EmbeddedHost, tmp_path: Path, payload: str, error: str, words: str
) -> None:
    artifact = native(CRASH, "crash")
    path = write(tmp_path, "crasher", artifact, plugin_type="native", limits={"time": 1})
    host.load(path, trust=True)
    reply = host.invoke("crasher", "crash", payload)
    assert reply["error"] == error, reply
    assert words in reply["message"]
    assert host.invoke("crasher", "crash", "x")["data"] == "fine"
    host.unload("crasher")


HUNGRY = """HANDLER(eats) { UNUSED; static char piece[1000] = "x";
  for (size_t size = 1 << 20; size > 8;) { void *volatile got = malloc(size); if (got == NULL) size /= 2; }
  for (int i = 0; i < 900; i++) host->write(reply, piece, sizeof piece);
  return 0; }"""


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_plugin_that_has_used_up_its_memory_has_failed_for_that_whatever_it_says(
    host: EmbeddedHost, tmp_path: Path, concurrency: int
) -> None:
    limits = {"memory": 16 << 20, "concurrency": concurrency}
    artifact = native(HUNGRY, "eats")
    host.load(write(tmp_path, "hungry", artifact, plugin_type="native", limits=limits), trust=True)
    reply = host.invoke("hungry", "eats")
    assert reply["error"] == "limit", reply
    assert reply["message"] == "used up its limit for memory of 16777216 bytes, and its worker was ended"
    assert host.invoke("hungry", "echo", "fine")["data"] == "fine"
    assert details(host, "hungry")["failures"] == 1
    host.unload("hungry")


def test_a_worker_that_ended_leaves_the_manager_nothing_open(host: EmbeddedHost, tmp_path: Path) -> None:
    host.load(write(tmp_path, "ending", native(CRASH, "crash"), plugin_type="native"), trust=True)
    descriptors = Path(f"/proc/{host.pid('plugin-manager')}/fd")

    def left_open() -> int:
        for payload in ("e", "x") * 5:
            host.invoke("ending", "crash", payload)
        return len([*descriptors.iterdir()])

    assert left_open() + 5 > left_open()
    host.unload("ending")


def test_a_plugin_that_keeps_failing_is_held_back_then_quarantined_and_can_be_brought_back(
    new_host: NewHost, tmp_path: Path
) -> None:
    host = new_host({"CIRCLEOSD_PLUGINS_BACK_OFF_AFTER": "2", "CIRCLEOSD_PLUGINS_QUARANTINE_AFTER": "3"})
    host.load(write(tmp_path, "weak", core(TRAP)))
    host.load(write(tmp_path, "strong", core()))

    def after_two_failures() -> dict[str, Any]:
        for _ in range(2):
            assert "unreachable" in host.invoke("weak", "trap")["message"]
        return host.invoke("weak", "echo", "x")

    held = once_it_holds(after_two_failures, lambda held: not held["ok"])  # within half a second
    assert held["error"] == "plugin-failed"
    assert "failed 2 times in a row and is held back" in held["message"]
    assert "unreachable" in held["message"]
    host.wait_for(lambda: "held back" not in host.invoke("weak", "trap")["message"])
    aside = host.invoke("weak", "echo", "x")
    assert aside["error"] == "conflict"
    assert "quarantined: 3 failures in a row, the last: trap: " in aside["message"]
    assert "circlectl plugin enable weak" in aside["message"]
    assert details(host, "weak")["worker"] == "none"
    assert host.invoke("strong", "echo", "x")["data"] == "x"
    os.kill(host.pid("plugin-manager"), signal.SIGKILL)
    shown = details(host, "weak")
    assert shown["state"] == "quarantined"
    assert "unreachable" in shown["reason"]
    assert shown["since"] <= time.time()
    assert "quarantined" in host.ok("plugin", "list")
    rows = host.data("plugin-manager", "history", object="weak")
    assert [row["action"] for row in rows] == ["load", "quarantine"]
    host.ok("plugin", "enable", "weak")
    assert host.invoke("weak", "echo", "x")["data"] == "x"


def test_a_quarantine_is_on_disk_before_anybody_hears_of_it(new_host: NewHost, tmp_path: Path) -> None:
    host = new_host({"CIRCLEOSD_PLUGINS_QUARANTINE_AFTER": "1"})
    host.load(write(tmp_path, "weak", core(TRAP)))
    file = host.database("plugins")
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(host.invoke, "weak", "trap")
            host.wait_for(lambda: details(host, "weak")["failures"] == 1)
            assert details(host, "weak")["state"] != "quarantined"
            assert not answer.done()
            database.execute("ROLLBACK")
            assert "unreachable" in answer.result()["message"]
    os.kill(host.pid("plugin-manager"), signal.SIGKILL)
    assert details(host, "weak")["state"] == "quarantined"


def test_failures_in_a_row_count_on_when_the_manager_has_been_away(new_host: NewHost, tmp_path: Path) -> None:
    host = new_host({"CIRCLEOSD_PLUGINS_QUARANTINE_AFTER": "3"})
    host.load(write(tmp_path, "weak", core(TRAP)))
    for _ in range(2):
        host.invoke("weak", "trap")
        host.stop()
        host.start()
    assert details(host, "weak")["state"] == "ready"
    host.invoke("weak", "trap")
    assert "3 failures in a row" in details(host, "weak")["reason"]
    host.data("plugin-manager", "enable", id="weak")
    os.kill(host.pid("plugin-manager"), signal.SIGKILL)
    host.invoke("weak", "trap")
    assert details(host, "weak")["state"] == "ready"


def test_a_plugin_that_is_brought_back_is_not_held_back_for_what_was(new_host: NewHost, tmp_path: Path) -> None:
    host = new_host({"CIRCLEOSD_PLUGINS_QUARANTINE_AFTER": "1"})
    host.load(write(tmp_path, "weak", core(TRAP)))
    host.invoke("weak", "trap")
    host.data("plugin-manager", "enable", id="weak")
    assert host.invoke("weak", "echo", "x")["data"] == "x"


def test_a_plugins_words_steer_no_terminal(host: EmbeddedHost, tmp_path: Path) -> None:
    host.load(write(tmp_path, "painter", core(COMPLAIN.replace("no such", r"n\1b[31m"))))
    done = host.ctl("plugin", "invoke", "painter", "complain")
    assert done.returncode == 10
    assert done.stderr.startswith(r"circlectl: n\x1b[31m customer")
    host.unload("painter")


def test_a_new_version_of_a_quarantined_plugin_begins_anew(new_host: NewHost, tmp_path: Path) -> None:
    host = new_host({"CIRCLEOSD_PLUGINS_QUARANTINE_AFTER": "1"})
    path = write(tmp_path, "weak", core(TRAP))
    host.load(path)
    host.invoke("weak", "trap")
    assert details(host, "weak")["state"] == "quarantined"
    write(tmp_path, "weak", core(), version="2")
    host.load(path)
    assert host.invoke("weak", "echo", "x")["data"] == "x"
    assert details(host, "weak")["failures"] == 0


def test_a_disabled_plugin_is_not_called_and_stays_so_over_an_upgrade(host: EmbeddedHost, tmp_path: Path) -> None:
    path = write(tmp_path, "paused", core())
    host.load(path)
    host.ok("plugin", "disable", "paused", "--reason", "audit")
    refused = host.ctl("plugin", "invoke", "paused", "echo", "x")
    assert refused.returncode == 7
    assert "disabled: audit" in refused.stderr
    before = details(host, "paused")
    host.load(path)
    after = details(host, "paused")
    assert all(after[name] == before[name] for name in ("state", "reason", "since"))
    assert after["loaded"] > before["loaded"]
    host.ok("plugin", "enable", "paused")
    assert host.ok("plugin", "invoke", "paused", "echo", "x") == "x\n"
    host.unload("paused")


def test_a_disabled_plugin_ends_the_call_in_hand_and_begins_none_that_waits(host: EmbeddedHost, tmp_path: Path) -> None:
    host.load(write(tmp_path, "stopped", native(SLOWLY, "slow"), plugin_type="native"), trust=True)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(host.invoke, "stopped", "slow", "x") for _ in range(2)]
        host.wait_for(lambda: details(host, "stopped")["waiting"] == 2)
        host.data("plugin-manager", "disable", id="stopped")
        begun, waiting = sorted((call.result() for call in calls), key=lambda reply: not reply["ok"])
    assert begun["data"] == "x"
    assert waiting["error"] == "conflict", waiting
    assert details(host, "stopped")["calls"] == 1
    host.unload("stopped")


def test_calls_in_hand_and_waiting_survive_an_upgrade(host: EmbeddedHost, tmp_path: Path) -> None:
    path = write(tmp_path, "moving", core())
    host.load(path)
    with host.connect("plugin-manager") as sock:
        request = {"action": "invoke", "id": "moving", "func": "echo", "payload": "x"}
        sock.sendall((json.dumps(request).encode() + b"\n") * 300)
        write(tmp_path, "moving", core(TRAP), version="2")
        host.load(path)
        received = b""
        while received.count(b"\n") < 300:
            received += sock.recv(1 << 16)
    assert received.count(b'"data":"x"') == 300
    assert details(host, "moving")["version"] == "2"
    host.unload("moving")


@pytest.mark.parametrize("first", ["show", "disable"])
def test_an_unload_lets_calls_in_hand_end_also_those_of_a_worker_that_was_retired_before(
    host: EmbeddedHost, tmp_path: Path, first: str
) -> None:
    host.load(write(tmp_path, "leaving", native(SLOWLY, "slow"), plugin_type="native"), trust=True)
    with ThreadPoolExecutor(1) as pool:
        calling = pool.submit(host.invoke, "leaving", "slow", "x")
        host.wait_for(lambda: details(host, "leaving")["waiting"] == 1)
        host.data("plugin-manager", first, id="leaving")
        host.unload("leaving")
        assert calling.result()["data"] == "x"


def test_a_decision_while_a_worker_starts_leaves_none_behind(host: EmbeddedHost, tmp_path: Path) -> None:
    slow = "__attribute__((constructor)) void slow(void) { usleep(500000); }"
    asks: dict[str, Any] = {"plugin_type": "native", "capabilities": ["clock"], "limits": {"time": 3}}
    host.load(write(tmp_path, "starting", native(slow), **asks), trust=True, grant="clock")
    host.data("plugin-manager", "revoke", id="starting", capability="clock")
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(host.invoke, "starting", "echo", "1")
        host.wait_for(lambda: details(host, "starting")["waiting"] == 1)
        host.data("plugin-manager", "grant", id="starting", capability="clock")
        assert starting.result()["data"] == "1"
    assert host.invoke("starting", "echo", "2")["data"] == "2"
    assert details(host, "starting")["failures"] == 0
    host.unload("starting")


def test_limits_have_defaults_and_ceilings_of_the_host(new_host: NewHost, tmp_path: Path) -> None:
    settings = {"MEMORY": "33554432", "DEFAULT_TIME": "0.5", "CONCURRENCY": "2"}
    host = new_host({f"CIRCLEOSD_PLUGINS_{name}": value for name, value in settings.items()})
    path = write(tmp_path, "spinner", core(SPIN))
    host.load(path)
    limits = details(host, "spinner")["limits"]
    assert (limits["memory"], limits["time"], limits["concurrency"]) == (33554432, 0.5, 1)
    reply = host.invoke("spinner", "spin")
    assert reply["error"] == "timeout"
    assert "0.5 s" in reply["message"]
    for name, value in (("memory", 1 << 26), ("concurrency", 3), ("storage", 1 << 40)):
        write(tmp_path, "spinner", core(SPIN), limits={name: value})
        refused = host.ctl("plugin", "load", str(path))
        assert refused.returncode == 8
        assert f"plugins.{name}" in refused.stderr


def test_a_host_may_allow_larger_artifacts(new_host: NewHost, tmp_path: Path) -> None:
    host = new_host({"CIRCLEOSD_PLUGINS_MAX_ARTIFACT": str(80 << 20)})
    host.load(write(tmp_path, "large", padded(core(), 70 << 20)))
    assert host.invoke("large", "echo", "x")["data"] == "x"


def test_a_deterministic_plugin_is_held_to_its_fuel_and_compiled_apart(host: EmbeddedHost, tmp_path: Path) -> None:
    path = write(tmp_path, "exact", core(SPIN), deterministic=True, limits={"time": 0.1})
    host.load(path)
    reply = host.invoke("exact", "spin")
    assert reply["error"] == "limit", reply
    assert "fuel" in reply["message"]
    write(tmp_path, "exact", core(SPIN), limits={"time": 0.3})
    host.load(path)
    assert host.invoke("exact", "spin")["error"] == "timeout"
    assert host.invoke("exact", "echo", "x")["data"] == "x"
    host.unload("exact")


def test_compilations_are_kept_within_their_bound(new_host: NewHost, tmp_path: Path) -> None:
    host = new_host({"CIRCLEOSD_PLUGINS_CACHE": "60000"})
    for number in range(6):
        body = f'(func (export "f{number}") (param i32) (result i64) (i64.const {number}))'
        host.load(write(tmp_path, f"p{number}", core(body)))
    files = [path for path in (host.directory / "cache").rglob("*") if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in files) <= 60_000
    assert len(files) < 6
    for number in range(6):
        assert host.invoke(f"p{number}", "echo", "x")["data"] == "x"


def test_a_plugins_log_cannot_pass_for_other_lines(host: EmbeddedHost, tmp_path: Path) -> None:
    text = "one\\0atwo\\1b[31m\\09three"
    log = f"""(data (i32.const 64) "{text}")
      (func (export "say") (param i32) (result i64)
        (call $log (i32.const 1) (i32.const 64) (i32.const 18)) (i64.const 0))"""
    host.load(write(tmp_path, "chatty", core(log, imports=LOG)))
    assert host.invoke("chatty", "say")["ok"]
    host.wait_for(lambda: "plugin chatty: one two\N{REPLACEMENT CHARACTER}[31m\tthree\n" in host.log)
    host.unload("chatty")


def test_a_plugins_messages_are_in_the_log_whatever_their_level(host: EmbeddedHost, tmp_path: Path) -> None:
    say = """(data (i32.const 64) "heard")
      (func (export "say") (param i32) (result i64) (local $level i32)
        (loop $next
          (call $log (local.get $level) (i32.const 64) (i32.const 5))
          (br_if $next (i32.lt_u (local.tee $level (i32.add (local.get $level) (i32.const 1))) (i32.const 4))))
        (i64.const 0))"""
    host.load(write(tmp_path, "levels", core(say, imports=LOG)))
    assert host.invoke("levels", "say")["ok"]
    host.wait_for(lambda: re.search(r"ERROR:\S+:plugin levels: heard\n", host.log) is not None)
    said = re.findall(r"(\w+):\S+:plugin levels: heard\n", host.log)
    assert said == ["DEBUG", "INFO", "WARNING", "ERROR"]
    host.unload("levels")


def test_a_native_plugin_neither_fills_the_log_nor_steers_the_terminal(new_host: NewHost, tmp_path: Path) -> None:
    host = new_host({})
    flood = """HANDLER(flood) { UNUSED; static char much[65536]; memset(much, 'A', sizeof much);
      write(2, "\\033]0;owned\\007\\n", 12); for (;;) write(2, much, sizeof much); }"""
    path = write(tmp_path, "flood", native(flood, "flood"), plugin_type="native", limits={"time": 1})
    host.load(path, trust=True)
    assert host.invoke("flood", "flood")["error"] == "timeout"
    assert "circleosd-plugin@flood: \N{REPLACEMENT CHARACTER}]0;owned\N{REPLACEMENT CHARACTER}" in host.log
    assert "wrote more than" in host.log
    assert len(host.log) < 16 << 20
    host.unload("flood")


def test_a_worker_that_is_always_called_keeps_nothing_of_its_calls(host: EmbeddedHost, tmp_path: Path) -> None:
    host.load(write(tmp_path, "busy", command("(call $exit (i32.const 3))")))

    def used_after(calls: int) -> int:
        """The memory of the plugin's worker in KiB."""
        with host.connect("plugin-manager") as sock:
            for _ in range(calls):
                sock.sendall(b'{"action":"invoke","id":"busy","func":"handle"}\n')
                assert read_reply(sock)["message"] == "exited with status 3"
        pid = host.data("service-registry", "status", name="plugin@busy")["pid"]
        found = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        assert found
        return int(found[1])

    before = used_after(200)
    assert used_after(1500) < before + 3 * 1024
    host.unload("busy")


def test_a_worker_that_waits_for_connections_ends_with_its_socket(new_host: NewHost) -> None:
    host = new_host({"CIRCLEOSD_PLUGINS_IDLE_WORKER": "0.2"})
    host.load("plugins/example.wasm")
    host.wait_for(lambda: host.data("service-registry", "status", name="plugin@example")["state"] == "inactive")
    host.data("service-registry", "start", name="plugin@example")
    host.data("service-registry", "restart", name="plugin@example.socket")
    assert host.invoke("example", "handle", "x")["data"] == "1 byte, 1 character, 1 word: x"
