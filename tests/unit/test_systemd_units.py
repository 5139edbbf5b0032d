"""What the registry makes of systemd's words, without a systemd."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from dbus_fast import Message, Variant

from circleosd.errors import BadRequest, CircleError, Conflict, Denied, Limit, NotFound, Timeout, Unavailable
from circleosd.registry.units import Scope, UnitState
from circleosd.systemd.buserrors import ErrorReply, Lost, explained
from circleosd.systemd.names import MANAGER, object_path, switch_unit
from circleosd.systemd.states import state_of
from circleosd.systemd.units import RULE_MAKER, TRIES, SystemdUnits, bus_address
from tests.waiting import SECONDS

UNIT = "a.service"
PATH = "/org/freedesktop/systemd1/unit/a_2eservice"


def properties(active: str, sub: str, at: int = 0, **more: Any) -> dict[str, Any]:
    """The properties of a unit that entered its state at `at` seconds."""
    stamps = ("ActiveEnter", "ActiveExit", "InactiveEnter", "InactiveExit", "StateChange")
    return {
        "Id": UNIT,
        "Description": "a unit",
        "LoadState": "loaded",
        "ActiveState": active,
        "SubState": sub,
        "TriggeredBy": [],
        "Requires": [],
        "Requisite": [],
        "BindsTo": [],
        **{f"{stamp}Timestamp": at * 1_000_000 for stamp in stamps},
        **more,
    }


def variants(values: dict[str, Any]) -> dict[str, Variant]:
    kinds = {list: "as", int: "t", str: "s"}
    return {name: Variant(kinds[type(value)], value) for name, value in values.items()}


class Bus:
    """A connection on which signals wait already when the properties are asked for."""

    lost = False

    def __init__(self, snapshot: tuple[int, dict[str, Any]], signals: Sequence[tuple[int, dict[str, Any]]]) -> None:
        self.snapshot = snapshot
        self.waiting: list[Message | None] = [self.changed(serial, values) for serial, values in signals]

    def changed(self, serial: int, values: dict[str, Any]) -> Message:
        body = ["org.freedesktop.systemd1.Unit", variants(values), []]
        return Message(path=PATH, member="PropertiesChanged", body=body, serial=serial)

    @asynccontextmanager
    async def signals(
        self, rules: Sequence[str], wanted: Callable[[Message], bool]
    ) -> AsyncIterator[asyncio.Queue[Message | None]]:
        queue: asyncio.Queue[Message | None] = asyncio.Queue()
        for signal in self.waiting:
            queue.put_nowait(signal)
        yield queue

    async def call(self, target: tuple[str, str, str], member: str, signature: str, body: Sequence[Any]) -> Message:
        serial, values = self.snapshot
        if member == "ListUnitsByNames":
            looks = [values[name] for name in ("Description", "LoadState", "ActiveState", "SubState")]
            return Message(path="/", member="x", body=[[(UNIT, *looks, "", PATH)]], serial=serial)
        return Message(path="/", member="x", body=[variants(values)], serial=serial)

    async def list_units(self, units: Sequence[str]) -> tuple[float, Message]:
        return time.time(), await self.call(MANAGER, "ListUnitsByNames", "as", [units])


def over(*connections: Bus, scope: Scope = "system") -> SystemdUnits:
    """What uses these connections, one after the other, and the last one from then on."""
    manager, left = SystemdUnits(scope, timeout=1), [*connections]

    async def connected() -> Bus:
        return left.pop(0) if left[1:] else left[0]

    manager._connected = connected  # type: ignore[assignment,method-assign]  # no bus here
    return manager


def watched(bus: Bus, number: int) -> list[tuple[str, float | None]]:
    """The first states that a watcher of `bus` sees, and since when they are; the first is said to be of now."""

    async def main() -> list[tuple[str, float | None]]:
        changes = over(bus).watch([UNIT])
        async with asyncio.timeout(SECONDS):
            found = [await anext(changes) for _ in range(number)]
        assert abs((found[0].since or 0) - time.time()) < 5
        return [(found[0].active, None), *((state.active, state.since) for state in found[1:])]

    return asyncio.run(main())


def test_a_signal_sent_before_the_state_was_read_changes_nothing() -> None:
    signals = [(5, properties("activating", "start")), (7, properties("failed", "x"))]
    bus = Bus((6, properties("active", "running")), signals)
    assert watched(bus, 2) == [("active", None), ("failed", None)]


def test_a_unit_that_failed_again_is_news_though_it_looks_the_same() -> None:
    before, later = 10, int(time.time()) + 100
    again = [(2, properties("failed", "failed", before)), (3, properties("failed", "failed", later))]
    bus = Bus((1, properties("failed", "failed", before)), [*again, (4, properties("active", "running", later + 1))])
    assert watched(bus, 3) == [("failed", None), ("failed", later), ("active", later + 1)]


def test_a_watch_that_missed_signals_tells_of_what_began_anew_meanwhile_and_looks_the_same() -> None:
    later = int(time.time()) + 100

    class Slow(Bus):
        async def call(self, target: tuple[str, str, str], member: str, *more: Any) -> Message:
            if member == "Get":
                return Message(path="/", member="x", body=[Variant("t", later * 1_000_000)])
            self.waiting = [self.changed(9, properties("failed", "failed", later + 1))]
            return await super().call(target, member, *more)

    bus = Slow((1, properties("active", "running")), [])
    bus.waiting = [None]  # nothing more will come
    assert watched(bus, 3) == [("active", None), ("active", later), ("failed", later + 1)]


def test_a_watch_asks_one_question_however_many_units_and_is_silent_where_unit_files_were_read_anew() -> None:
    names = [f"a{number}.service" for number in range(1000)]
    asked: list[str] = []

    class Many(Bus):
        async def call(self, target: tuple[str, str, str], member: str, signature: str, body: Sequence[Any]) -> Message:
            asked.append(member)
            rows = [(name, "", "loaded", "active", "running", "", object_path(name)) for name in body[0]]
            if len(asked) == 3:
                rows[7] = (*rows[7][:3], "failed", "failed", *rows[7][5:])
            return Message(path="/", member="x", body=[rows], serial=len(asked))

    async def main() -> list[tuple[str, str]]:
        bus = Many((0, {}), [])
        bus.waiting = [Message(path="/", member="Reloading", body=[begins]) for begins in (True, False) * 2]
        changes = over(bus).watch(names)
        async with asyncio.timeout(SECONDS):
            assert [(await anext(changes)).unit for _ in names] == names
            assert asked == ["ListUnitsByNames"]
            changed = await anext(changes)
        assert asked == ["ListUnitsByNames"] * 3
        return [(changed.unit, changed.active)]

    assert asyncio.run(main()) == [(names[7], "failed")]


class Scripted(Bus):
    """For each question the units it is answered with (name, state, path), and the signals that come right behind."""

    def __init__(self, *answers: tuple[list[tuple[str, str, str]], list[Message]]) -> None:
        super().__init__((0, {}), [])
        self.answers = [*answers]

    @asynccontextmanager
    async def signals(
        self, rules: Sequence[str], wanted: Callable[[Message], bool]
    ) -> AsyncIterator[asyncio.Queue[Message | None]]:
        self.wanted, self.queue = wanted, asyncio.Queue[Message | None]()
        yield self.queue

    async def call(self, target: tuple[str, str, str], member: str, signature: str, body: Sequence[Any]) -> Message:
        units, behind = self.answers.pop(0)
        for signal in filter(self.wanted, behind):
            self.queue.put_nowait(signal)
        rows = [(name, "", "loaded", active, "x", "", path) for name, active, path in units]
        return Message(path="/", member="x", body=[rows], serial=len(units))

    def seen(self, number: int, *units: str, pattern: str = "") -> list[tuple[str, str]]:
        """The first states that a watcher sees."""

        async def main() -> list[tuple[str, str]]:
            changes = over(self).watch(units, pattern)
            async with asyncio.timeout(SECONDS):
                return [(state.unit, state.active) for state in [await anext(changes) for _ in range(number)]]

        return asyncio.run(main())


def changed(active: str, path: str = PATH, interface: str = "Unit", **more: Any) -> Message:
    values = variants(properties(active, "x", int(time.time()) + 100, **more) if interface == "Unit" else more)
    body = [f"org.freedesktop.systemd1.{interface}", values, []]
    return Message(path=path, member="PropertiesChanged", body=body, serial=1000)


RELOADED = Message(path="/", member="Reloading", body=[False])
OTHER = object_path("b.service")


def test_a_change_that_comes_right_behind_the_first_state_is_seen_though_only_that_tells_what_an_alias_stands_for() -> (
    None
):
    bus = Scripted(([("alias.service", "active", PATH)], [changed("activating", OTHER), changed("failed")]))
    assert bus.seen(2, "alias.service") == [("alias.service", "active"), ("alias.service", "failed")]


def test_an_alias_that_stands_for_another_unit_by_now_is_told_of_that_one_alone() -> None:
    before = [("alias.service", "active", PATH)], [RELOADED]
    after = [("alias.service", "inactive", OTHER)], [changed("failed"), changed("activating", OTHER)]
    states = [active for _, active in Scripted(before, after).seen(3, "alias.service")]
    assert states == ["active", "inactive", "activating"]


def test_a_unit_that_is_watched_is_not_asked_about_for_its_coming_into_memory() -> None:
    new = Message(path="/", member="UnitNew", body=[UNIT, PATH])
    found = [(UNIT, "inactive", PATH)]
    bus = Scripted((found, []), (found, [new, changed("active")]))
    assert bus.seen(2, pattern="a*.service") == [(UNIT, "inactive"), (UNIT, "active")]


def test_a_change_is_told_when_all_of_it_is_known() -> None:
    pids = [[changed("", interface="Service", MainPID=pid), changed(active, MainPID=pid)]
            for pid, active in ((7, "active"), (8, "failed"))]  # fmt: skip
    bus = Scripted(([(UNIT, "activating", PATH)], [*pids[0], *pids[1]]))
    assert [active for _, active in bus.seen(3, UNIT)] == ["activating", "active", "failed"]


def test_a_question_is_asked_again_on_a_new_connection_but_not_forever() -> None:
    class Dying(Bus):
        async def call(self, *_: Any) -> Message:
            raise Lost

    alive, dying = Bus((1, properties("active", "running")), []), Dying((1, {}), [])
    assert asyncio.run(over(*[dying] * 4, alive).detail(UNIT)).active == "active"
    with pytest.raises(Unavailable):
        asyncio.run(over(*[dying] * 5, alive).detail(UNIT))


@pytest.mark.parametrize(("dead", "seen"), [(4, "active"), (5, None)])
def test_a_watch_that_begins_as_the_bus_goes_away_begins_again_but_not_forever(dead: int, seen: str | None) -> None:
    class Dying(Bus):
        @asynccontextmanager
        async def signals(self, *_: Any, **__: Any) -> AsyncIterator[asyncio.Queue[Message | None]]:
            raise Lost
            yield

    async def main() -> str:
        connections = [Dying((1, {}), [])] * dead + [Bus((1, properties("active", "running")), [])]
        return (await anext(over(*connections).watch([UNIT]))).active

    if seen:
        assert asyncio.run(main()) == seen
    else:
        with pytest.raises(Unavailable, match="cannot watch units"):
            asyncio.run(main())


def test_a_watch_outlives_any_number_of_connections_that_told_it_of_its_units() -> None:
    class Ending(Bus):
        async def call(self, target: tuple[str, str, str], member: str, *more: Any) -> Message:
            if member == "Get":
                return Message(path="/", member="x", body=[Variant("t", 0)])
            return await super().call(target, member, *more)

    async def main() -> list[str]:
        connections = [Ending((1, properties("active", "running")), []) for _ in range(TRIES + 1)]
        for ending in connections:
            ending.waiting = [None]
        connections.append(Ending((1, properties("failed", "failed")), []))
        changes = over(*connections).watch([UNIT])
        return [(await anext(changes)).active for _ in range(2)]

    assert asyncio.run(main()) == ["active", "failed"]


@pytest.mark.parametrize(("invocation", "job", "asked"), [(b"new", 0, 1), (b"old", 7, 1), (b"old", 0, 2)])
def test_a_restart_whose_answer_was_lost_is_asked_for_again_unless_it_was_done_or_is_on_its_way(
    invocation: bytes, job: int, asked: int
) -> None:
    calls: list[str] = []

    class Restarting(Bus):
        @asynccontextmanager
        async def signals(self, *_: Any, **__: Any) -> AsyncIterator[asyncio.Queue[Message | None]]:
            queue: asyncio.Queue[Message | None] = asyncio.Queue()
            queue.put_nowait(Message(path="/", member="JobRemoved", body=[1, "/job", UNIT, "done"]))
            yield queue

        async def call(self, target: tuple[str, str, str], member: str, *_: Any) -> Message:
            calls.append(member)
            if len(calls) == 1:
                raise Lost
            return Message(path="/", member="x", body=["/job"])

    async def main() -> str:
        manager = over(Restarting((1, {}), []), scope="user")
        shown = iter([(b"old", 0), (invocation, job), (invocation, 0)])

        async def shows(unit: str) -> dict[str, Any]:
            known, number = next(shown)
            return {"InvocationID": known, "Job": (number, "/"), "ActiveState": "active"}

        manager._properties = shows  # type: ignore[method-assign]
        return await manager.job("restart", UNIT)

    assert asyncio.run(main()) == "done"
    assert calls == ["RestartUnit"] * asked


@pytest.mark.parametrize(("lost", "state"), [(4, "enabled"), (5, None)])
def test_a_unit_is_enabled_again_where_the_bus_went_away_over_it_but_not_forever(lost: int, state: str | None) -> None:
    asked: list[str] = []

    class Dying(Bus):
        async def call(
            self, target: tuple[str, str, str], member: str, *_: Any, timeout: float | None = None
        ) -> Message:
            asked.append(member)
            assert (timeout is not None) == (member == "Reload")
            if member == "Reload" and asked.count("Reload") <= lost:
                raise Lost
            return Message(path="/", member="x", body=["enabled"])

    switching = over(Dying((1, {}), []), scope="user").switch("enable", UNIT)
    if state:
        assert asyncio.run(switching) == state
        assert asked == ["EnableUnitFiles", "Reload"] * (lost + 1) + ["GetUnitFileState"]
    else:
        with pytest.raises(Unavailable, match=r"cannot enable a\.service"):
            asyncio.run(switching)


def test_where_the_configuration_enables_units_nobody_else_can(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(Bus):
        @asynccontextmanager
        async def signals(self, *_: Any, **__: Any) -> AsyncIterator[asyncio.Queue[Message | None]]:
            yield asyncio.Queue()

        async def call(self, *_: Any) -> Message:
            raise ErrorReply("org.freedesktop.systemd1.NoSuchUnit", f"Unit {switch_unit('enable', UNIT)} not found.")

    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(Conflict, match=r"this host has no circleosd-enable@\.service"):
        asyncio.run(over(Bare((1, {}), [])).switch("enable", UNIT))


@pytest.mark.parametrize(
    ("active", "stamp"),
    [
        ("active", "ActiveEnter"),
        ("reloading", "ActiveEnter"),
        ("inactive", "InactiveEnter"),
        ("failed", "InactiveEnter"),
        ("activating", "InactiveExit"),
        ("deactivating", "ActiveExit"),
        ("maintenance", "StateChange"),
    ],
)
def test_since_is_when_the_unit_entered_its_state(active: str, stamp: str) -> None:
    assert state_of(UNIT, properties(active, "x", **{f"{stamp}Timestamp": 1_500_000})).since == 1.5


def test_a_unit_requires_what_any_setting_says() -> None:
    needs = properties(
        "inactive", "dead", Requires=["sysinit.target"], Requisite=["db.service"], BindsTo=["disk.mount"]
    )
    assert state_of(UNIT, needs).requires == ("sysinit.target", "db.service", "disk.mount")


def test_what_systemd_does_not_know_is_none() -> None:
    state = state_of("a.target", properties("inactive", "dead"))
    assert state == UnitState("a.target", "a unit", "loaded", "inactive", "dead")
    state = state_of(UNIT, properties("inactive", "dead", MainPID=0, ExecMainCode=0, ExecMainStatus=0))
    assert (state.pid, state.exit_status, state.since) == (None, None, None)
    untold = (1 << 64) - 1
    assert state_of(UNIT, properties("active", "running", MemoryCurrent=untold)).memory is None
    # While a unit starts, its process is told before its state.
    assert state_of(UNIT, properties("inactive", "dead", MainPID=7)).pid is None


def test_how_a_process_ended_is_told_by_its_exit_status_or_its_signal() -> None:
    for code, told in ((1, (6, None)), (2, (None, "SIGABRT")), (3, (None, "SIGABRT"))):  # CLD_DUMPED, waitid(2)
        state = state_of(UNIT, properties("failed", "failed", ExecMainCode=code, ExecMainStatus=6))
        assert (state.exit_status, state.signal) == told
    state = state_of(UNIT, properties("failed", "failed", ExecMainCode=2, ExecMainStatus=40))
    assert state.signal == "signal 40", "a real-time signal has no name of its own"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("org.freedesktop.systemd1.NoSuchUnit", NotFound),
        ("org.freedesktop.systemd1.LoadFailed", NotFound),
        ("org.freedesktop.systemd1.UnitMasked", Conflict),
        ("org.freedesktop.systemd1.BadUnitSetting", Conflict),
        ("org.freedesktop.systemd1.ShuttingDown", Conflict),
        ("System.Error.EROFS", Conflict),
        ("org.freedesktop.DBus.Error.AccessDenied", Denied),
        ("org.freedesktop.DBus.Error.InteractiveAuthorizationRequired", Denied),
        ("org.freedesktop.DBus.Error.InvalidArgs", BadRequest),
        ("org.freedesktop.DBus.Error.LimitsExceeded", Limit),
        ("org.freedesktop.DBus.Error.Timeout", Timeout),
        ("org.freedesktop.DBus.Error.ServiceUnknown", Unavailable),
        ("com.example.Whatever", Unavailable),
    ],
)
def test_an_error_of_systemd_means_one_of_ours(name: str, error: type[CircleError]) -> None:
    found = explained("start a.service", ErrorReply(name, "It is so."))
    assert type(found) is error
    assert "start a.service" in str(found)
    assert "It is so" in str(found)
    assert (f"journalctl --unit {RULE_MAKER}" in str(found)) == (error is Denied)


def test_the_bus_is_where_the_environment_says() -> None:
    assert bus_address("system", {}) == "unix:path=/run/dbus/system_bus_socket"
    assert bus_address("system", {"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/x"}) == "unix:path=/x"
    assert bus_address("user", {"XDG_RUNTIME_DIR": "/run/user/1,2"}) == "unix:path=/run/user/1%2C2/bus"
    assert bus_address("user", {"XDG_RUNTIME_DIR": "/x", "DBUS_SESSION_BUS_ADDRESS": "unix:path=/y"}) == "unix:path=/y"
    with pytest.raises(Unavailable, match="XDG_RUNTIME_DIR"):
        bus_address("user", {})


def test_names_are_escaped_for_the_bus_and_for_instances() -> None:
    assert object_path("a-b@1.service").endswith("/a_2db_401_2eservice")
    assert object_path("1a.service").endswith("/_31a_2eservice")
    assert switch_unit("enable", "a-b@c.service") == r"circleosd-enable@a\x2db\x40c.service.service"
