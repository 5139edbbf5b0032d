"""Plugins that break the rules: whoever calls one gets an error with a reason, and nobody else notices."""

from __future__ import annotations

import functools
import os
import random
from pathlib import Path

import pytest

from tests.component_text import component
from tests.core_text import HOST_CALLS, LOG, core
from tests.integration.attacks import NATIVE, Attack, F, Paced, c, wasm
from tests.integration.made import write
from tests.wasi_text import SLEEP, command

NOTHING = f"{F} (i64.const 0))"


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


BROKEN = (
    Attack(
        "sleeps",
        lambda: command(SLEEP),
        ("timeout",),
        "longer than 0.3 s",
        {"limits": {"time": 0.3}},
        function="handle",
    ),
    Attack(
        "hangs-deaf",
        lambda: c("sigset_t all; sigfillset(&all); sigprocmask(SIG_SETMASK, &all, 0); for (;;) pause();"),
        ("timeout",),
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
        lambda: wasm("(drop (call $host_call (i32.const -8) (i32.const 100))) unreachable", imports=HOST_CALLS),
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
    Attack("segfaults", lambda: c("*(volatile int *)8 = 1;"), says="SIGSEGV"),
    Attack("exits", lambda: c("_exit(7);"), says="exit status 7"),
    Attack("aborts", lambda: c("abort();"), says="SIGABRT"),
)


@pytest.mark.parametrize("attack", [pytest.param(attack, id=attack.name) for attack in BROKEN])
def test_broken_code_fails_with_a_reason_and_disturbs_nobody(paced: Paced, attack: Attack) -> None:
    paced.run(attack)


@pytest.mark.parametrize("number", range(12))
def test_a_truncated_or_bit_flipped_module_is_refused_or_runs_within_its_limits(paced: Paced, number: int) -> None:
    errors = ("plugin-failed", "bad-request", "limit", "timeout", "not-found", None)
    function = "f" if number % 2 else "handle"
    paced.run(Attack(f"damaged-{number}", functools.partial(damage, number), errors, function=function))


def test_native_code_writes_nowhere(paced: Paced) -> None:
    host = paced.host
    mark = f"circleosd-{os.getpid()}"
    own = (host.directory / "state", host.directory / "cache", host.runtime, paced.directory, Path.home())
    new = [Path(place) / mark for place in (*own, "/etc", "/tmp", "/var/tmp", "/dev/shm", "/run")]
    old = [host.database("plugins"), paced.directory / "good.wasm", Path(__file__)]
    before = {path: path.read_bytes() for path in old[1:]}
    opens = """int fd = open(payload, O_WRONLY | O_CREAT | O_APPEND, 0600);
        if (fd < 0) { SAY("refused: %s", strerror(errno)); return 1; }
        if (write(fd, "x", 1) != 1) { SAY("refused: %s", strerror(errno)); return 1; }"""
    host.load(write(paced.directory, "writes", c(opens), **NATIVE), trust=True)
    for path in (*new, *old):
        reply = paced.host.invoke("writes", "f", str(path))
        assert reply["error"] == "plugin-failed"
        assert "refused: " in reply["message"], path
    host.unload("writes")
    assert paced.failed() == []
    assert not any(path.exists() for path in new)
    assert {path: path.read_bytes() for path in old[1:]} == before
