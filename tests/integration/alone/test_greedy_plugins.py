"""Plugins that take all of a machine that they can get: a well-behaved one's slowest calls become not much slower."""

from __future__ import annotations

import json
import statistics
import time

import pytest

from tests.component_text import component
from tests.core_text import HOST_CALLS, LOG, core
from tests.integration.attacks import Attack, F, Paced, c, wasm
from tests.integration.made import caller
from tests.measuring import once_it_holds
from tests.wasm_binary import padded

QUIET, LOUD = 8, 15  # calls of the well-behaved plugin before each attack, to compare with, and at least during each
SLOWER = 3.0  # times
SLICE = 0.003  # seconds that a process which computes may keep a CPU from one that wakes up
FAST = {"limits": {"time": 0.3}}
SLOW = {"limits": {"time": 5}}  # so that what ends at once has its reason on a busy machine, too
KV = json.dumps({"call": "kv.set", "args": {"key": "k", "value": "x" * 20_000}})


def asks_for_ever(request: str) -> bytes:
    escaped = request.replace('"', '\\"')
    return core(
        f"""(data (i32.const 9000) "{escaped}")
        (func (export "f") (param i32) (result i64)
          (loop $l (drop (call $host_call (i32.const 9000) (i32.const {len(request)}))) (br $l)) unreachable)""",
        imports=HOST_CALLS,
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
    return padded(core(), 50_000_000)


def bomb() -> bytes:
    """A module that takes long to compile."""
    operations = "(local.set 0 (i64.mul (i64.add (local.get 0) (i64.const 7)) (local.get 0)))" * 12_000
    return core("".join(f"(func (param i64) (result i64) {operations} (local.get 0))" for _ in range(4)))


# They take time, memory, processes, descriptors, the log or the connection to the manager.
GREEDY = (
    Attack("spins", lambda: wasm("(loop $l (br $l)) unreachable"), ("timeout",), "longer than 0.3 s", FAST),
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
    Attack("huge", huge, (None,), function="echo"),
    Attack("hard-to-compile", bomb, (None,), function="echo"),
    Attack("forks", lambda: c("for (;;) fork();"), ("timeout",), "longer than 0.3 s"),
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
        "writes-junk",
        lambda: c("""char junk[65536]; memset(junk, 0x14, sizeof junk);
            for (;;) for (int fd = 3; fd < 16; fd++) send(fd, junk, sizeof junk, MSG_NOSIGNAL);"""),
        says="broke the protocol",
        manifest=SLOW,
    ),
    Attack(
        "floods-the-log",
        lambda: c("""unsigned char frame[9 + 4096] = {0, 0, 16, 0, 20, 0, 0, 0, 1, 1};
            memset(frame + 10, 'x', 4095);
            for (;;) for (int fd = 3; fd < 16; fd++) send(fd, frame, sizeof frame, MSG_NOSIGNAL);"""),
        says="logged more than",
        manifest=SLOW,
    ),
    Attack(
        "answers-what-nobody-asked",
        lambda: c("""unsigned char frame[] = {0, 0, 0, 1, 18, 0, 0, 0, 77, 'x'};
            for (;;) for (int fd = 3; fd < 16; fd++) send(fd, frame, sizeof frame, MSG_NOSIGNAL);"""),
        says="broke the protocol",
        manifest=SLOW,
    ),
)


class Measured:
    """A host under attack, and when it was."""

    def __init__(self, paced: Paced) -> None:
        self.paced = paced
        self.quiet: list[tuple[float, float]] = []  # from, until
        self.loud: list[tuple[float, float]] = []

    def run(self, attack: Attack) -> None:
        """After some quiet, load the plugin and call it again and again."""
        began = time.monotonic()
        self.paced.wait(QUIET)
        loud = time.monotonic()
        try:
            replies = self.paced.attack(attack, beside=LOUD)
        finally:
            self.quiet.append((began, loud))
            self.loud.append((loud, time.monotonic()))
        self.paced.judge(attack, replies)

    def slowest(self, windows: list[tuple[float, float]]) -> float:
        """The 95th percentile of the calls in those times, in seconds."""
        took = [call["took"] for call in self.paced.calls if any(start <= call["at"] < end for start, end in windows)]
        assert len(took) > 100
        return float(statistics.quantiles(took, n=20)[18])


@pytest.fixture(scope="module")
def measured(paced: Paced) -> Measured:
    return Measured(paced)


@pytest.mark.parametrize("attack", [pytest.param(attack, id=attack.name) for attack in GREEDY])
def test_greedy_code_fails_with_a_reason_and_disturbs_nobody(measured: Measured, attack: Attack) -> None:
    measured.run(attack)


def test_a_plugin_that_emits_all_the_time_fills_nothing(measured: Measured) -> None:
    emit = json.dumps({"call": "events.emit", "args": {"topic": "noise", "payload": "x" * 1000}})
    manifest = {**FAST, "capabilities": ["events:noise"]}
    measured.run(Attack("emits", caller, ("timeout",), "", manifest, "until_refused", emit))
    assert len(measured.paced.host.data("plugin-manager", "events", lines=1000)) <= 1000


def test_the_well_behaved_plugin_was_never_much_slower(measured: Measured) -> None:
    if len(measured.loud) < len(GREEDY):
        pytest.skip("only what happens during all attacks is compared")

    def quiet_and_loud() -> tuple[float, float]:
        for attack in GREEDY if not measured.loud else ():
            measured.run(attack)
        found = measured.slowest(measured.quiet), measured.slowest(measured.loud)
        measured.quiet.clear()
        measured.loud.clear()
        return found

    once_it_holds(quiet_and_loud, lambda slowest: slowest[1] <= SLOWER * max(slowest[0], SLICE), tries=8)
