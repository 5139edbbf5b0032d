"""The workers of plugins on a booted system: how often they may be started, and what is said when that is too often."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from circleosd.plugins.voice import MOST_SAID
from tests import PROJECT
from tests.core_text import LOG, core
from tests.native_source import native, shared_object
from tests.systemd.installed import write
from tests.systemd.machine import Machine

BROKEN = "/etc/systemd/system/circleosd-plugin@.service.d/99-broken.conf"
UNHURRIED = "/etc/systemd/system/circleosd-plugin@.socket.d/99-unhurried.conf"
SHOW = "circlectl plugin show often --json"


@pytest.fixture(scope="module")
def machine(installed: Machine) -> Machine:
    manifest = json.loads(installed.succeed("cat /usr/share/circleosd/plugins/example.json"))
    manifest |= {"name": "often", "capabilities": [{"name": "kv", "reason": "to be granted"}]}
    write(installed, "/root/often.json", json.dumps(manifest) + "\n")
    installed.succeed("cp /usr/share/circleosd/plugins/example.wasm /root/often.wasm")
    installed.succeed("circlectl plugin load /root/often.wasm")
    return installed


def test_a_plugin_is_called_after_each_of_many_changes_of_what_it_is_granted(machine: Machine) -> None:
    """Each change costs it its worker, and systemd bounds how often a socket may start one."""
    call = 'test "$(circlectl plugin invoke often upper hi)" = HI'
    machine.succeed(*[f"for verb in grant revoke; do circlectl plugin $verb often kv; {call}; done"] * 8)
    assert json.loads(machine.succeed(SHOW))["failures"] == 0


def test_workers_that_end_at_once_are_not_started_for_ever_and_that_is_not_the_plugins_failure(
    machine: Machine,
) -> None:
    write(machine, BROKEN, "[Service]\nExecStart=\nExecStart=/bin/false\n")
    # A busy machine may start less than five a second.
    write(machine, UNHURRIED, "[Socket]\nTriggerLimitIntervalSec=1h\nTriggerLimitBurst=10\n")
    machine.succeed("systemctl daemon-reload; systemctl stop circleosd-plugin@often.service")
    for _ in range(7):  # also when its socket has failed
        status, said = machine.execute("circlectl plugin invoke often upper hi 2>&1", timeout=60)
        assert status == 12, said
        assert "the worker of often was started too often in a short time, so systemd refuses to start it" in said
        assert "circleosd.target" not in said
    shown = json.loads(machine.succeed(SHOW))
    assert (shown["state"], shown["failures"]) == ("ready", 0)
    machine.succeed(f"rm {BROKEN} {UNHURRIED}", "systemctl daemon-reload")
    machine.wait_until_succeeds("circlectl plugin invoke often upper hi")


def test_a_plugin_that_takes_too_much_memory_to_compile_is_refused_for_that(machine: Machine, tmp_path: Path) -> None:
    """Its worker's unit has more memory than its compiler, so that the worker is left to say it."""
    operation = "local.get 1 i64.const 7 i64.add local.get 1 i64.mul local.set 1 "
    begin = "(local i64) (local.set 1 (i64.extend_i32_u (local.get 0)))"
    bomb = core(f'(func (export "f") (param i32) (result i64) {begin} {operation * 765_000} local.get 1)')
    (tmp_path / "bomb.wasm").write_bytes(bomb)
    machine.copy_from_host(str(tmp_path / "bomb.wasm"), "/root/bomb.wasm")
    status, said = machine.execute("circlectl plugin load /root/bomb.wasm 2>&1")
    assert (status, said.count("compiling it needs more than 1073741824 bytes of memory")) == (8, 1), said


def test_the_slice_that_the_page_on_settings_bounds_is_that_of_all_workers(machine: Machine) -> None:
    machine.succeed("circlectl plugin invoke often upper hi")
    slice_of_it = machine.succeed("systemctl show --value --property=Slice circleosd-plugin@often.service").strip()
    page = (PROJECT / "man" / "circleosd.toml.5").read_text(encoding="utf-8")
    assert f"systemctl set-property '{slice_of_it}' MemoryMax=2G" in page.replace(r"\e", "\\")


def test_a_worker_sees_neither_sockets_nor_state_of_the_host(machine: Machine) -> None:
    machine.succeed("circlectl plugin invoke often upper hi")
    pid = machine.get_unit_property("circleosd-plugin@often.service", "MainPID")
    for place in ("/sys", "/run/circleosd", "/run/dbus", "/var/lib/circleosd", "/etc/circleosd"):
        assert machine.succeed(f"ls -A {place}"), place
        assert machine.succeed(f"nsenter --target {pid} --mount ls -A {place}") == "", place


LOUD = """(func (export "f") (param i32) (result i64)
  (local.set 0 (i32.const 2000))
  (loop $again
    (call $log (i32.const 1) (i32.const 0) (i32.const 1))
    (br_if $again (local.tee 0 (i32.sub (local.get 0) (i32.const 1)))))
  i64.const 0)"""


def test_a_plugin_that_says_too_much_keeps_no_row_of_the_ledger_out_of_the_journal(
    machine: Machine, tmp_path: Path
) -> None:
    (tmp_path / "loud.wasm").write_bytes(core(LOUD, imports=LOG))
    machine.copy_from_host(str(tmp_path / "loud.wasm"), "/root/loud.wasm")
    # However large the disk, by which journald takes more (journald.conf(5)), it takes less than a plugin may say.
    write(machine, "/etc/systemd/journald.conf.d/burst.conf", "[Journal]\nRateLimitBurst=500\n")
    machine.succeed("systemctl restart systemd-journald.service")
    machine.succeed("circlectl plugin load /root/loud.wasm", *["circlectl plugin invoke loud f"] * 6)
    machine.succeed("circlectl plugin disable loud", "journalctl --sync")
    rows = machine.succeed("journalctl --identifier circleosd-plugin-manager CIRCLEOSD_OBJECT=loud --output=cat")
    assert rows.splitlines()[-1] == "uid 0: disable loud: done: ready → disabled: by uid 0"
    said = f"plugin loud: logged more than {MOST_SAID} messages within 30 s; the rest is dropped"
    machine.succeed(f"journalctl --unit circleosd-plugins.service --output=cat --grep '{said}'")


def test_a_native_plugin_does_not_choose_the_priority_of_what_it_prints(machine: Machine, tmp_path: Path) -> None:
    """What is an emergency goes to the terminals of everybody (ForwardToWall=, journald.conf(5))."""
    (tmp_path / "crier.so").write_bytes(native('HANDLER(cry) { UNUSED; puts("<0>fire"); return 0; }', "cry"))
    machine.copy_from_host(str(tmp_path / "crier.so"), "/root/crier.so")
    machine.succeed("circlectl plugin load /root/crier.so --trust", "circlectl plugin invoke crier cry")
    printed = "journalctl --unit circleosd-plugin@crier.service --grep fire --output=json"
    row = json.loads(machine.wait_until_succeeds(printed))
    assert (row["MESSAGE"], row["PRIORITY"]) == ("<0>fire", "6")
    machine.succeed("circlectl plugin unload crier")


def test_a_native_plugin_is_refused_with_the_reason_where_files_cannot_be_run(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "plain.so").write_bytes(native(""))
    machine.copy_from_host(str(tmp_path / "plain.so"), "/root/plain.so")
    machine.succeed("mount --bind /var/lib /var/lib", "mount -o remount,bind,noexec /var/lib")
    machine.succeed("systemctl restart circleosd-plugins.service")
    status, said = machine.execute("circlectl plugin load /root/plain.so --trust 2>&1")
    machine.succeed("umount /var/lib", "systemctl restart circleosd-plugins.service")
    assert (status, said.count("plugins are stored on a file system mounted noexec")) == (2, 1), said
    machine.succeed("circlectl plugin load /root/plain.so --trust", "circlectl plugin unload plain")


def test_a_worker_that_is_stopped_has_not_failed(machine: Machine) -> None:
    machine.succeed("circlectl plugin invoke often upper hi", "systemctl stop circleosd-plugin@often.service")
    assert machine.get_unit_property("circleosd-plugin@often.service", "ActiveState") == "inactive"


def test_a_worker_that_died_is_a_failed_unit_only_while_its_plugin_is_loaded(machine: Machine, tmp_path: Path) -> None:
    failed = "systemctl list-units --failed --no-legend 'circleosd-plugin@*'"
    (tmp_path / "torn.so").write_bytes(shared_object("__attribute__((constructor)) void begin(void) { abort(); }"))
    machine.copy_from_host(str(tmp_path / "torn.so"), "/root/torn.so")
    status, said = machine.execute("circlectl plugin load /root/torn.so --trust 2>&1")
    assert "the worker of torn ended while it loaded the plugin by SIGABRT" in said, (status, said)
    machine.wait_until_succeeds(f'test -z "$({failed})"')
    machine.succeed("circlectl plugin invoke often upper hi", "systemctl kill --signal=ABRT circleosd-plugin@often")
    machine.wait_until_succeeds(f"{failed} | grep often")
    machine.succeed("circlectl plugin unload often")
    machine.wait_until_succeeds(f'test -z "$({failed})"')
    assert machine.execute("test -e /run/circleosd/plugins/often.sock")[0] == 1
