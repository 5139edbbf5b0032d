"""Hostile plugins through the manager, while a well-behaved one is called fifty times a second.

Whoever calls a hostile plugin gets an error with a reason; the well-behaved one has no failed call, and its slowest
calls are not much slower than while nothing else happens.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.component_text import component
from tests.integration.conftest import running
from tests.integration.embedded_host import EmbeddedHost
from tests.integration.made import caller, write
from tests.native_source import native
from tests.wasi_text import command
from tests.worker_driver import core

RATE = 50
PACER = Path(__file__).parent / "pacer.py"
QUIET = 0.1  # seconds of quiet before each attack, to compare with
LOUD = 0.4  # seconds that an attack takes at least
SLOWER = 3.0  # times
SLICE = 0.003  # seconds that a process which computes may keep a CPU from one that wakes up
# The calls of an attack fail all the time, and are meant to reach the plugin.
SETTINGS = {"CIRCLEOSD_PLUGINS_BACK_OFF_AFTER": "100000", "CIRCLEOSD_PLUGINS_QUARANTINE_AFTER": "100000"}
NATIVE_LIMITS = {"plugin_type": "native", "limits": {"time": 0.5}}


class Attack(NamedTuple):
    """A hostile plugin: what makes it, and the errors that its callers may get, None for an answer.

    `says` is in one of the messages. `load_fails`: it is refused when it is loaded.
    """

    name: str
    make: Callable[[], bytes]
    errors: tuple[str | None, ...] = ("plugin-failed",)
    says: str = ""
    manifest: dict[str, Any] = {}  # noqa: RUF012  # never written to
    function: str = "f"
    payload: str = ""
    load_fails: bool = False


def wasm(body: str, *, imports: str = "", memory: str = "2") -> bytes:
    return core(f'(func (export "f") (param i32) (result i64) {body})', imports=imports, memory=memory)


HOST_CALL = '(import "circleosd" "host_call" (func $host_call (param i32 i32) (result i32)))'
SLEEP = """
  (i64.store (i32.const 2048) (i64.const 0))
  (i32.store8 (i32.const 2056) (i32.const 0))
  (i32.store (i32.const 2064) (i32.const 1))
  (i64.store (i32.const 2072) (i64.const 1000000000000))
  (i64.store (i32.const 2080) (i64.const 0))
  (i32.store16 (i32.const 2088) (i32.const 0))
  (drop (call $poll (i32.const 2048) (i32.const 2304) (i32.const 1) (i32.const 2400)))"""


def asks_for_ever(request: str) -> bytes:
    escaped = request.replace('"', '\\"')
    return core(
        f"""(data (i32.const 9000) "{escaped}")
        (func (export "f") (param i32) (result i64)
          (loop $l (drop (call $host_call (i32.const 9000) (i32.const {len(request)}))) (br $l)) unreachable)""",
        imports=HOST_CALL,
    )


def memories() -> bytes:
    """A component of eight memories that each grow until they cannot."""
    modules = "".join(
        f"""(core module $m{n} (memory (export "memory") 1)
          (func (export "grow") (loop $l
            (if (i32.ne (memory.grow (i32.const 16)) (i32.const -1)) (then
              (memory.fill (i32.mul (i32.sub (memory.size) (i32.const 16)) (i32.const 65536))
                (i32.const 1) (i32.const 1048576)) (br $l)))) unreachable))
        (core instance $i{n} (instantiate $m{n})) (alias core export $i{n} "grow" (core func $grow{n}))"""
        for n in range(8)
    )
    names = tuple(f"grow{n}" for n in range(8))
    return component(imports=modules, host=names, handle="".join(f"(call ${name})" for name in names) + "unreachable")


def huge() -> bytes:
    """A valid module of 50 MB: most of it is a custom section."""
    body = b"\x04junk" + bytes(50_000_000)
    return core() + b"\0" + _leb(len(body)) + body


def bomb() -> bytes:
    """A module that takes long to compile."""
    operations = "(local.set 0 (i64.mul (i64.add (local.get 0) (i64.const 7)) (local.get 0)))" * 12_000
    return core("".join(f"(func (param i64) (result i64) {operations} (local.get 0))" for _ in range(4)))


def _leb(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def returns(value: str) -> bytes:
    return wasm(f"(i64.const {value})")


def damage(number: int) -> bytes:
    chance = random.Random(number)
    data = bytearray(wasm("(i64.const 0)") if number % 2 else command("(nop)"))
    if number % 3 == 0:
        del data[chance.randrange(9, len(data)) :]
    else:
        for _ in range(3):
            data[chance.randrange(8, len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def c(body: str, before: str = "") -> bytes:
    """Native code with one handler."""
    return native(f"{before} HANDLER(f) {{ UNUSED; {body} return 0; }}", "f")


FAST = {"limits": {"time": 0.4}}
KV = json.dumps({"call": "kv.set", "args": {"key": "k", "value": "x" * 20_000}})
LOG = '(import "circleosd" "log" (func $log (param i32 i32 i32)))'
F = '(func (export "f") (param i32) (result i64)'
NOTHING = f"{F} (i64.const 0))"

WASM = (
    Attack("spins", lambda: wasm("(loop $l (br $l)) unreachable"), ("timeout",), "longer than 0.4 s", FAST),
    Attack(
        "spins-in-host-calls",
        lambda: asks_for_ever('{"call":"clock.now","args":{}}'),
        ("timeout",),
        manifest={**FAST, "capabilities": ["clock"]},
    ),
    Attack("spins-in-kv", lambda: asks_for_ever(KV), ("timeout",), manifest={**FAST, "capabilities": ["kv"]}),
    Attack("spins-refused", lambda: asks_for_ever(KV), ("timeout",), manifest=FAST),
    Attack(
        "logs-for-ever",
        lambda: core(
            f"{F} (loop $l (call $log (i32.const 3) (i32.const 0) (i32.const 8000)) (br $l)) unreachable)", imports=LOG
        ),
        ("timeout",),
        manifest=FAST,
    ),
    Attack("sleeps", lambda: command(SLEEP), ("timeout",), "longer than 0.4 s", FAST, function="handle"),
    Attack(
        "grows",
        lambda: wasm("(loop $l (br_if $l (i32.ne (memory.grow (i32.const 1)) (i32.const -1)))) unreachable"),
        ("limit",),
        "its limit of 33554432 bytes",
        {"limits": {"memory": 32 << 20}},
    ),
    Attack(
        "grows-many",
        memories,
        ("limit", "plugin-failed", "timeout"),
        manifest={"limits": {"memory": 32 << 20, "time": 2}},
        function="handle",
    ),
    Attack(
        "grows-table",
        lambda: core(f"""(table $t 1 funcref) {F}
          (loop $l (br_if $l (i32.ne (table.grow $t (ref.null func) (i32.const 1000)) (i32.const -1))))
          unreachable)"""),
        ("plugin-failed",),
    ),
    Attack(
        "recurses",
        lambda: core(f"""(func $deeper (param i64) (result i64)
            (i64.add (call $deeper (i64.add (local.get 0) (i64.const 1))) (local.get 0)))
          {F} (call $deeper (i64.const 1)))"""),
        ("plugin-failed",),
        "call stack exhausted",
    ),
    Attack("replies-a-gigabyte", lambda: returns("0x40000000"), ("limit",), "1073741824 bytes"),
    Attack("replies-beyond-memory", lambda: returns("0x0001fff800000020"), says="outside its memory"),
    Attack("replies-from-nowhere", lambda: returns("0xfffffff000000020"), says="outside its memory"),
    Attack(
        "replies-in-no-utf8",
        lambda: core(f'(data (i32.const 64) "\\ff\\fe\\80") {F} (i64.const 0x4000000003))'),
        says="not UTF-8",
    ),
    Attack(
        "complains-in-no-utf8",
        lambda: core(f'(data (i32.const 64) "\\ff\\fe\\80") {F} (i64.const 0x4080000003))'),
        says="not UTF-8",
    ),
    Attack("has-no-buffer", lambda: core(NOTHING, buffer="(i32.const 0)"), ("limit",), payload="text"),
    Attack(
        "has-a-buffer-beyond-memory",
        lambda: core(NOTHING, buffer="(i32.const -8)"),
        says="outside its memory",
        payload="some text",
    ),
    Attack(
        "logs-from-nowhere",
        lambda: core(f"{F} (call $log (i32.const 0) (i32.const -1) (i32.const -1)) unreachable)", imports=LOG),
        says="outside memory",
    ),
    Attack(
        "asks-from-nowhere",
        lambda: wasm("(drop (call $host_call (i32.const -8) (i32.const 100))) unreachable", imports=HOST_CALL),
        says="outside memory",
    ),
    Attack(
        "imports-a-shell",
        lambda: core(imports='(import "env" "system" (func (param i32) (result i32)))'),
        ("bad-request",),
        "env.system",
        load_fails=True,
    ),
    Attack(
        "imports-the-network",
        lambda: component(imports='(import "wasi:http/outgoing-handler@0.2.0" (instance))'),
        ("bad-request",),
        "wasi:http",
        load_fails=True,
    ),
    Attack("huge", huge, (None,), function="echo"),
    Attack("hard-to-compile", bomb, (None,), function="echo"),
)

NATIVE = (
    Attack("segfaults", lambda: c("*(volatile int *)8 = 1;"), says="SIGSEGV"),
    Attack("exits", lambda: c("_exit(7);"), says="exit status 7"),
    Attack("aborts", lambda: c("abort();"), says="SIGABRT"),
    Attack("forks", lambda: c("for (;;) fork();"), ("timeout",), "longer than 0.5 s"),
    Attack(
        "threads",
        lambda: c("pthread_t t; for (;;) pthread_create(&t, 0, spin, 0);", "static void *spin(void *x) { for (;;); }"),
        ("timeout", "plugin-failed"),
    ),
    Attack(
        "opens-everything", lambda: c('for (;;) if (open("/dev/null", 0) < 0 && dup(0) < 0) pause();'), ("timeout",)
    ),
    Attack(
        "fills-memory",
        lambda: c("for (;;) { char *p = malloc(1 << 20); if (!p) abort(); memset(p, 1, 1 << 20); }"),
        ("plugin-failed", "limit"),
    ),
    Attack(
        "hangs-deaf",
        lambda: c("sigset_t all; sigfillset(&all); sigprocmask(SIG_SETMASK, &all, 0); for (;;) pause();"),
        ("timeout",),
    ),
    Attack(
        "writes-junk",
        lambda: c("""char junk[65536]; memset(junk, 0x14, sizeof junk);
            for (;;) for (int fd = 3; fd < 16; fd++) send(fd, junk, sizeof junk, MSG_NOSIGNAL);"""),
        says="broke the protocol",
    ),
    Attack(
        "floods-the-log",
        lambda: c("""unsigned char frame[9 + 4096] = {0, 0, 16, 0, 20, 0, 0, 0, 0, 1};
            memset(frame + 10, 'x', 4095);
            for (;;) for (int fd = 3; fd < 16; fd++) send(fd, frame, sizeof frame, MSG_NOSIGNAL);"""),
        says="logged more than",
    ),
    Attack(
        "answers-what-nobody-asked",
        lambda: c("""unsigned char frame[] = {0, 0, 0, 1, 18, 0, 0, 0, 77, 'x'};
            for (;;) for (int fd = 3; fd < 16; fd++) send(fd, frame, sizeof frame, MSG_NOSIGNAL);"""),
        says="broke the protocol",
    ),
)


class Paced:
    """A host with a well-behaved plugin and somebody who calls it all the time."""

    def __init__(self, host: EmbeddedHost, directory: Path) -> None:
        self.host = host
        self.directory = directory
        self.calls: list[dict[str, Any]] = []
        self.windows: dict[bool, list[tuple[float, float]]] = {True: [], False: []}  # by: is it loud
        self.attacks = 0
        host.ok("plugin", "load", str(write(directory, "good", core())))
        path = host.runtime / "plugin-manager.sock"
        self.process = subprocess.Popen(
            [sys.executable, PACER, path, "good", "echo", str(RATE)], stdout=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        host.wait_for(lambda: len(self.calls) > RATE)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.calls.append(json.loads(line))

    def window(self, *, loud: bool, began: float) -> None:
        self.windows[loud].append((began, time.monotonic()))

    def slowest(self, *, loud: bool) -> float:
        """The 99th percentile of the calls in quiet or in loud times, in seconds."""
        windows = self.windows[loud]
        took = [call["took"] for call in self.calls if any(start <= call["at"] < end for start, end in windows)]
        assert len(took) > 100
        return float(statistics.quantiles(took, n=100)[98])

    def failed(self) -> list[str]:
        return [call["reply"] for call in self.calls if call["reply"] is not None]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def load(self, attack: Attack) -> dict[str, Any]:
        manifest = {"limits": {"time": 2}, **attack.manifest}
        path = write(self.directory, attack.name, attack.make(), **manifest)
        request = {"action": "load", "path": str(path), "grant": "all", "trust": True}
        return self.host.call("plugin-manager", request, timeout=120)

    def invoke(self, name: str, function: str, payload: str) -> dict[str, Any]:
        request = {"action": "invoke", "id": name, "func": function, "payload": payload}
        return self.host.call("plugin-manager", request, timeout=30)

    def run(self, attack: Attack, quiet: float = QUIET, loud: float = LOUD) -> None:
        """Load the plugin and call it again and again; look at every reply."""
        began = time.monotonic()
        time.sleep(quiet)  # what the loud time is compared with
        self.window(loud=False, began=began)
        began = time.monotonic()
        replies = []
        loaded = self.load(attack)
        try:
            if not loaded["ok"]:
                assert attack.load_fails or "bad-request" in attack.errors, loaded
                replies.append(loaded)
            else:
                assert not attack.load_fails, loaded
                while time.monotonic() - began < loud or not replies:
                    replies.append(self.invoke(attack.name, attack.function, attack.payload))
        finally:
            self.window(loud=True, began=began)
            if loaded["ok"]:
                self.host.data("plugin-manager", "unload", id=attack.name)
        self.attacks += 1
        for reply in replies:
            assert re.search(r"[a-z]{3}", str(reply["message"])) or reply["ok"], reply
            assert reply.get("error") in attack.errors, reply
        assert any(attack.says in str(reply["message"]) for reply in replies), replies[:3]


@pytest.fixture(scope="module")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paced]:
    for host in running(SETTINGS):
        paced = Paced(host, tmp_path_factory.mktemp("plugins"))
        yield paced
        paced.close()


@pytest.mark.alone
@pytest.mark.parametrize("attack", [pytest.param(attack, id=attack.name) for attack in WASM])
def test_hostile_wasm_fails_with_a_reason_and_disturbs_nobody(paced: Paced, attack: Attack) -> None:
    paced.run(attack)
    assert paced.failed() == []


@pytest.mark.alone
@pytest.mark.parametrize("attack", [pytest.param(attack, id=attack.name) for attack in NATIVE])
def test_hostile_native_code_fails_with_a_reason_and_disturbs_nobody(paced: Paced, attack: Attack) -> None:
    paced.run(attack._replace(manifest=NATIVE_LIMITS))
    assert paced.failed() == []


@pytest.mark.parametrize("number", range(12))
def test_a_truncated_or_bit_flipped_module_is_refused_or_runs_within_its_limits(paced: Paced, number: int) -> None:
    errors = ("plugin-failed", "bad-request", "limit", "timeout", "not-found", None)
    function = "f" if number % 2 else "handle"
    attack = Attack(f"damaged-{number}", functools.partial(damage, number), errors, function=function)
    paced.run(attack, quiet=0, loud=0)
    assert paced.failed() == []


def test_native_code_writes_nowhere(paced: Paced) -> None:
    host = paced.host
    mark = f"circleosd-{os.getpid()}"
    own = (host.directory / "state", host.directory / "cache", host.runtime, paced.directory, Path.home())
    new = [Path(place) / mark for place in (*own, "/etc", "/tmp", "/var/tmp", "/dev/shm", "/run")]
    old = [host.directory / "state/circleosd/plugins/plugins.db", paced.directory / "good.wasm", Path(__file__)]
    before = {path: path.read_bytes() for path in old[1:]}
    opens = """int fd = open(payload, O_WRONLY | O_CREAT | O_APPEND, 0600);
        if (fd < 0) { SAY("refused: %s", strerror(errno)); return 1; }
        if (write(fd, "x", 1) != 1) { SAY("refused: %s", strerror(errno)); return 1; }"""
    for path in (*new, *old):
        attack = Attack("writes", lambda: c(opens), says="refused", payload=str(path), manifest=NATIVE_LIMITS)
        paced.run(attack, quiet=0, loud=0)
    assert not any(path.exists() for path in new)
    assert {path: path.read_bytes() for path in old[1:]} == before
    assert paced.failed() == []


@pytest.mark.alone
def test_a_plugin_that_emits_all_the_time_fills_nothing(paced: Paced) -> None:
    emit = json.dumps({"call": "events.emit", "args": {"topic": "noise", "payload": "x" * 1000}})
    manifest = {**FAST, "capabilities": ["events:noise"]}
    paced.run(Attack("emits", caller, ("timeout",), "", manifest, "until_refused", emit))
    assert len(paced.host.data("plugin-manager", "events", lines=1000)) <= 1000
    assert paced.failed() == []


@pytest.mark.alone
def test_the_well_behaved_plugin_was_never_much_slower(paced: Paced) -> None:
    if paced.attacks < len(WASM) + len(NATIVE):
        pytest.skip("only what happens during all attacks is compared")
    quiet, loud = paced.slowest(loud=False), paced.slowest(loud=True)
    print(
        f"{len(paced.calls)} calls, none failed; p99 {quiet * 1000:.1f} ms quiet, {loud * 1000:.1f} ms during attacks"
    )
    assert loud <= SLOWER * max(quiet, SLICE)
    assert paced.failed() == []
