"""What a connection receives at once, and what it gives back."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import selectors
import socket
import termios
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from circleosd.config import ServerSettings
from circleosd.connection import SMALL, Connection
from circleosd.errors import Unavailable
from circleosd.passing import PIECE, Descriptors
from circleosd.policy import Peer
from tests.unit.serving import Patient, Silent, ask, connected, received, served, serving
from tests.waiting import SECONDS, until


class Generous:
    """A service whose every reply is larger than what the kernel takes for a peer that does not read."""

    name = "generous"
    requests = 0
    connections: Callable[[], int] = staticmethod(lambda: 0)

    async def dispatch(self, line: bytes, peer: Peer, files: Descriptors) -> bytes:
        self.requests += 1
        return bytes(4 << 20)


@pytest.mark.parametrize("behind", [b"", b"x" * SMALL, b"x" * SMALL + b"\nx\n"], ids=["nothing", "a part", "a line"])
def test_a_peer_that_goes_before_it_has_its_reply_leaves_nothing_booked(tmp_path: Path, behind: bytes) -> None:
    path = str(tmp_path / "s")

    async def run() -> None:
        async with serving(Generous(), path) as server:
            _, writer = await asyncio.open_unix_connection(path)
            writer.write(b"x\n" + behind)
            await until(lambda: server.booked)
            await asyncio.sleep(0.05)  # the reply waits for the peer now, and what is behind the request is read
            writer.transport.abort()
            await until(lambda: not server.service.connections())
        assert server.booked.total() == 0

    asyncio.run(asyncio.wait_for(run(), SECONDS))


@contextlib.asynccontextmanager
async def left_with(
    line: bytes, path: str, settings: ServerSettings | None = None
) -> AsyncIterator[tuple[Patient, socket.socket]]:
    """A `Patient` whose server knows of the end of a peer with the request `line` in hand, and another peer of it."""
    async with serving(service := Patient(), path, settings):
        with connected(path) as leaving, connected(path) as staying:
            leaving.send(b"now\n" + line + b"\n")
            await until(lambda: service.requests >= 2)
            leaving.close()  # with a reply unread, which makes its end a reset
            assert await ask(staying) == b"reply\n"  # by now the event loop has seen that end
            yield service, staying
            service.go.set()
            await until(lambda: service.connections() <= 1)


def test_a_request_counts_as_a_connection_until_it_is_done_though_its_peer_has_gone(tmp_path: Path) -> None:
    async def run() -> None:
        path = str(tmp_path / "s")
        async with left_with(b"later", path, ServerSettings(max_connections_per_uid=2)) as (service, _):
            assert service.connections() == 2
            with connected(path) as another:
                assert b'"limit"' in await ask(another)

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_no_stream_begins_for_a_peer_that_has_gone(tmp_path: Path) -> None:
    async def run() -> None:
        async with left_with(b"stream", str(tmp_path / "s")) as (service, staying):
            service.go.set()
            assert await ask(staying) == b"reply\n"
            assert service.streams == 0

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_a_refused_peer_that_does_not_leave_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circleosd.connection.LINGER", 0.2)
    path = str(tmp_path / "s")

    async def run() -> None:
        async with serving(service := Patient(), path, ServerSettings(idle_connection=0.1)):
            with connected(path) as refused:
                assert b'"timeout"' in await asyncio.get_running_loop().sock_recv(refused, PIECE)
                assert service.connections() == 1
                await until(lambda: not service.connections())

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_a_service_that_was_stopped_reads_what_arrived_before_it_gives_a_connection_up(tmp_path: Path) -> None:
    """What its timers judge by is the time at which they were set, not how long it was stopped since."""
    passed: list[float] = []

    class Quiet:
        def check(self, now: float) -> None:
            passed.append(time.monotonic() - now)

    async def run() -> None:
        async with serving(Patient(), str(tmp_path / "s"), ServerSettings(read_timeout=0.2)) as server:
            server._connections.add(cast(Connection, Quiet()))
            await until(lambda: passed)
            server._connections.clear()

    asyncio.run(run())
    assert passed[0] >= 0.04  # they come every 0.05 s


class Curious(Silent):
    """A service manager that keeps what it was told last, and looks whether the service is alive."""

    told = ""
    watchdog_interval = 0.001
    signs_of_life = 0

    def status(self, text: str) -> None:
        self.told = text

    def alive(self) -> None:
        self.signs_of_life += 1


def test_the_service_manager_is_told_what_a_service_does(tmp_path: Path) -> None:
    path = str(tmp_path / "s")

    async def run() -> None:
        async with serving(Patient(), path, manager=(manager := Curious())):
            with connected(path) as one, connected(path):
                assert await ask(one) == b"reply\n"
                await until(lambda: manager.told == "listening; 1 requests answered, 2 connected")
                await until(lambda: manager.signs_of_life >= 3)

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_a_connection_that_cannot_be_served_is_closed_and_no_longer_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*about: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # epoll_ctl(2), max_user_watches

    async def run() -> None:
        async with serving(service := Patient(), path := str(tmp_path / "s")) as server:
            with monkeypatch.context() as broken, connected(path) as one:
                broken.setattr(server.loop, "connect_accepted_socket", fail)
                assert await received(one) == b""
            assert service.connections() == 0
            with connected(path) as other:
                assert await ask(other) == b"reply\n"

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_who_connects_as_a_service_is_about_to_end_is_left_in_the_queue_for_the_next_start(tmp_path: Path) -> None:
    path = str(tmp_path / "s")

    async def run() -> None:
        with contextlib.ExitStack() as stack:
            async with serving(Patient(), path) as server:
                queue = stack.enter_context(server._listener.dup())  # as the service manager holds it
                await asyncio.sleep(0)
                stack.enter_context(connected(path))
                await asyncio.sleep(0)  # the event loop has noticed it, and takes it behind this
            queue.accept()[0].close()

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_at_the_end_a_request_in_hand_is_answered_and_who_has_none_is_let_go(tmp_path: Path) -> None:
    path = str(tmp_path / "s")

    async def run() -> None:
        async with serving(service := Patient(), path) as server:
            with connected(path) as asking, connected(path) as quiet:
                assert await ask(quiet) == b"reply\n"
                asking.send(b"later\n")
                await until(lambda: service.requests >= 2)
                server.stop()
                assert await received(quiet) == b""
                service.go.set()
                assert await received(asking) == b"reply\n"

    asyncio.run(asyncio.wait_for(run(), SECONDS))


@pytest.mark.parametrize("service", [Patient(), Generous()], ids=["read", "not read yet"])
def test_who_has_its_reply_as_the_time_at_the_end_runs_out_is_sent_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: Patient | Generous
) -> None:
    monkeypatch.setattr("circleosd.server.SHUTDOWN", 0.0)
    path = str(tmp_path / "s")

    async def run() -> None:
        async with serving(service, path) as server:
            with connected(path) as peer:
                first = await ask(peer)
                server.stop()
                assert b'"unavailable"' not in first + await received(peer)

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_a_connection_that_is_not_open_yet_as_the_time_at_the_end_runs_out_keeps_no_other_from_its_end(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        async with serving(Patient(), str(tmp_path / "s")) as server:
            await Connection(server, Peer(0, 0, 0), Descriptors(0)).give_up(Unavailable("it ends"))

    asyncio.run(asyncio.wait_for(run(), SECONDS))


class Determined(Patient):
    """A service that finishes what it has begun even if that is `cancelled`, as a transaction is finished."""

    cancelled = False

    async def dispatch(self, line: bytes, peer: Peer, files: Descriptors) -> bytes:
        self.requests += 1
        while not self.go.is_set():
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                self.cancelled = True
        return b"reply\n"


def test_a_request_that_is_finished_though_the_time_at_the_end_has_run_out_is_answered_as_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("circleosd.server.SHUTDOWN", 0.0)
    monkeypatch.setattr("circleosd.server.GIVEN_UP", SECONDS)
    path = str(tmp_path / "s")

    async def run() -> None:
        async with serving(service := Determined(), path) as server:
            with connected(path) as peer:
                peer.send(b"one\ntwo\n")
                await until(lambda: service.requests)
                server.stop()
                await until(lambda: service.cancelled)
                service.go.set()
                assert await received(peer) == b"reply\n"
        assert service.requests == 1

    asyncio.run(asyncio.wait_for(run(), SECONDS / 2))


def refuse_memory(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """From now on there is none for what a buffer does."""

    def without_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(f"circleosd.wire.LineBuffer.{method}", without_memory)


@pytest.mark.parametrize("method", ["feed", "next_line"])
def test_a_line_for_which_there_is_no_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    async def run() -> None:
        async with served(Patient(), str(tmp_path / "s")) as (peer, _):
            refuse_memory(monkeypatch, method)
            peer.send(b"a part")
            assert b"this service has no memory left for the line" in await received(peer)

    asyncio.run(asyncio.wait_for(run(), SECONDS))


@pytest.mark.parametrize(("method", "told"), [("feed", []), ("next_line", [b"reply", b"no memory"])])
def test_what_is_refused_for_want_of_memory_is_not_taken_for_the_answer_to_what_came_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, told: list[bytes]
) -> None:
    async def run() -> None:
        service = Patient()
        async with served(service, str(tmp_path / "s")) as (peer, _):
            peer.send(b"first\n")
            await until(lambda: service.requests)
            refuse_memory(monkeypatch, method)
            peer.send(b"second\n")
            if told:
                await until(lambda: fcntl.ioctl(peer, termios.TIOCOUTQ, bytes(4)) == bytes(4))  # until it is received
                service.go.set()
            lines = (await received(peer)).splitlines()
            assert len(lines) == len(told)
            assert all(word in line for word, line in zip(told, lines, strict=True))
            service.go.set()

    asyncio.run(asyncio.wait_for(run(), SECONDS))


class Talkative(Patient):
    """A service whose streams have much to say at once, and which counts what it has said."""

    name = "talkative"

    def __init__(self, begun: Callable[[], object]) -> None:
        super().__init__()
        self.go.set()
        self.said = 0
        self._begun = begun

    async def _stream(self) -> AsyncGenerator[bytes, None]:
        self._begun()
        for self.said in range(1, 101):  # a count that others can see
            yield b"x\n"


def test_who_asks_is_answered_while_a_stream_has_much_to_say(tmp_path: Path) -> None:
    async def run() -> None:
        peers: list[socket.socket] = []
        service = Talkative(lambda: peers[1].send(b"now\n"))
        async with served(service, str(tmp_path / "s")) as (one, other):
            peers += one, other
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(one, b"stream\n")
            assert await loop.sock_recv(other, 100) == b"reply\n"
            assert 0 < service.said < 100

    asyncio.run(asyncio.wait_for(run(), SECONDS))


class Lingering(Patient):
    """A service whose streams end only when they are let go. `ending` counts those that wait for it."""

    ending = 0

    async def _stream(self) -> AsyncGenerator[bytes, None]:
        self.streams += 1
        self.go.clear()
        try:
            await asyncio.Event().wait()
            yield b""
        finally:
            self.ending += 1
            await self.go.wait()


def test_a_stream_that_takes_long_to_end_keeps_no_other_peer_from_being_looked_at(tmp_path: Path) -> None:
    async def run() -> None:
        service, settings = Lingering(), ServerSettings(idle_connection=0.5, write_timeout=0.2)
        service.go.set()
        async with served(service, str(tmp_path / "s"), settings) as (peer, other):
            peer.send(b"stream\n")
            await until(lambda: service.streams)
            peer.close()
            await until(lambda: service.ending)
            assert b'"timeout"' in await received(other)
            service.go.set()

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_a_peer_that_has_said_all_gets_its_replies_and_then_the_end(tmp_path: Path) -> None:
    async def run() -> None:
        service = Patient()
        async with served(service, str(tmp_path / "s")) as (peer, other):
            peer.send(b"later\nnow\n")
            peer.shutdown(socket.SHUT_WR)
            await until(lambda: service.requests)
            assert await ask(other) == b"reply\n"  # by now the event loop has seen that end
            service.go.set()
            assert await received(peer) == b"reply\n" * 2

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_what_comes_while_a_request_is_in_hand_is_answered_however_much_it_is(tmp_path: Path) -> None:
    async def run() -> None:
        service = Patient()
        async with served(service, str(tmp_path / "s")) as (peer, other):
            lines = b"later\n" + (b"x" * 8000 + b"\n") * 100
            sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(peer, lines))
            await until(lambda: service.requests)
            assert await ask(other) == b"reply\n"
            assert not sending.done()  # what is not yet needed is left where it is
            service.go.set()
            await sending
            peer.shutdown(socket.SHUT_WR)
            assert await received(peer) == b"reply\n" * 101

    asyncio.run(asyncio.wait_for(run(), SECONDS))


class Clock:
    """The connections' clock, so many seconds `behind`."""

    behind = 0.0

    def monotonic(self) -> float:
        return time.monotonic() - self.behind


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("circleosd.connection.time", clock)
    return clock


def test_a_connection_is_idle_from_its_last_reply_on(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("circleosd.server.time", clock)

    async def run() -> None:
        service, settings = Patient(), ServerSettings(idle_connection=60, write_timeout=0.2)
        async with served(service, str(tmp_path / "s"), settings) as (peer, _):
            peer.send(b"later\n")
            await until(lambda: service.requests)
            clock.behind = -100.0
            await asyncio.sleep(0.2)  # in which the server looks for idle connections
            service.go.set()
            assert await asyncio.get_running_loop().sock_recv(peer, PIECE) == b"reply\n"
            await asyncio.sleep(0.2)  # and once more
            assert await ask(peer) == b"reply\n"

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_the_time_for_a_line_begins_with_its_first_byte(tmp_path: Path, clock: Clock) -> None:
    async def run() -> None:
        service, settings = Patient(), ServerSettings(idle_connection=300, read_timeout=60, write_timeout=0.2)
        clock.behind = 100.0
        async with served(service, str(tmp_path / "s"), settings) as (peer, other):
            for sock in (peer, other):
                assert await ask(sock) == b"reply\n"
            clock.behind = 0.0
            peer.send(b"no")
            assert await ask(other) == b"reply\n"
            await asyncio.sleep(0.2)  # in which the server looks for lines that are late
            peer.send(b"w\n")
            assert await asyncio.get_running_loop().sock_recv(peer, PIECE) == b"reply\n"
            clock.behind = 100.0
            peer.send(b"no")
            assert b"the line was not completed within 60 s" in await received(peer)

    asyncio.run(asyncio.wait_for(run(), SECONDS))


class Flowing(Patient):
    """A service whose every reply is a stream of a hundred parts; `parts`: how many were taken."""

    parts = 0

    async def _stream(self) -> AsyncGenerator[bytes, None]:
        for self.parts in range(1, 101):
            await asyncio.sleep(0)
            yield bytes(PIECE)


def test_a_stream_waits_for_a_peer_that_does_not_read_and_leaves_a_connection_like_others(tmp_path: Path) -> None:
    async def run() -> None:
        service = Flowing()
        service.go.set()
        async with served(service, str(tmp_path / "s"), ServerSettings(idle_connection=0.2)) as (peer, _):
            peer.send(b"stream\n")
            await until(lambda: service.parts)
            for _turn in range(1000):
                await asyncio.sleep(0)
            assert service.parts < 50
            data = await received(peer)
            assert data[: 100 * PIECE] == bytes(100 * PIECE)
            assert b'"timeout"' in data[100 * PIECE :]

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_who_is_refused_behind_a_request_can_send_to_the_end_and_reads_why(tmp_path: Path) -> None:
    async def run() -> None:
        service = Patient()
        async with served(service, str(tmp_path / "s")) as (peer, other):
            lines = b"later\n" + b"x" * (4 << 20)
            sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(peer, lines))
            await until(lambda: service.requests)
            assert await ask(other) == b"reply\n"
            service.go.set()
            await sending
            reply, refusal = (await received(peer)).splitlines()
            assert reply == b"reply"
            assert b'"limit"' in refusal

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_who_has_taken_replies_late_but_in_time_is_not_cut_off_later(tmp_path: Path) -> None:
    async def run() -> None:
        service, settings = Flowing(), ServerSettings(write_timeout=1)
        service.go.set()
        async with served(service, str(tmp_path / "s"), settings) as (peer, _):
            peer.send(b"stream\n")
            for _turn in range(1000):
                await asyncio.sleep(0)
            taken = 0
            while taken < 100 * PIECE:
                taken += len(await asyncio.get_running_loop().sock_recv(peer, PIECE))
            await asyncio.sleep(1.5)  # in which the server looks for who takes nothing
            assert await ask(peer) == b"reply\n"

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_one_uid_leaves_others_room_for_what_they_send_as_long_as_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, uids = str(tmp_path / "s"), iter([1, 1, 2, 3, 4])
    monkeypatch.setattr("circleosd.passing.peer_of", lambda sock: Peer(next(uids), 0, 0))
    part = b"x" * (400 << 10)

    async def run() -> None:
        loop, service = asyncio.get_running_loop(), Patient()
        service.go.set()
        async with serving(service, path, ServerSettings(max_buffered=1 << 20)) as server:

            async def hold(sock: socket.socket, uid: int, data: bytes = part) -> None:
                booked = server.booked[uid] + len(data) - SMALL
                await loop.sock_sendall(sock, data)
                await until(lambda: server.booked[uid] >= booked)

            with contextlib.ExitStack() as stack:
                one, another, third, fourth, fifth = (stack.enter_context(connected(path)) for _ in range(5))
                await loop.sock_sendall(one, part + part + b"\n")
                reply = await loop.sock_recv(one, PIECE)
                assert reply == b"reply\n", "a single one may have all the room that there is"
                await hold(one, 1)
                await hold(another, 1, part[: len(part) // 4])
                await loop.sock_sendall(another, part)
                assert b"for uid 1" in await received(another)
                await loop.sock_sendall(third, part + b"\n")
                assert await loop.sock_recv(third, PIECE) == b"reply\n"
                await hold(third, 2)
                await hold(fourth, 3)
                await loop.sock_sendall(fifth, part)
                assert b"too much data is being sent and received here" in await received(fifth)

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_an_error_in_the_place_of_a_reply_that_is_too_large_has_the_tag_of_its_request(tmp_path: Path) -> None:
    path = str(tmp_path / "s")

    async def run() -> None:
        async with serving(Generous(), path, ServerSettings(max_buffered=1 << 20)):
            with connected(path) as peer:
                peer.send(b'{"tag":7}\nno request\n')
                peer.shutdown(socket.SHUT_WR)
                errors = [json.loads(line) for line in (await received(peer)).splitlines()]
        assert [(error["error"], error.get("tag")) for error in errors] == [("limit", 7), ("limit", None)]

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_a_refused_peer_that_stays_holds_nothing_of_what_all_share(tmp_path: Path) -> None:
    path = str(tmp_path / "s")

    async def run() -> None:
        async with serving(service := Patient(), path, max_line=4 * SMALL) as server:
            with connected(path) as peer:
                await asyncio.get_running_loop().sock_sendall(peer, b"x" * (4 * SMALL + 1))
                assert b"a line may have at most" in await received(peer)
                assert (service.connections(), server.booked.total()) == (1, 0)

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_a_connection_that_has_gone_leaves_no_task(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(Patient(), str(tmp_path / "s")) as (peer, other):
            for sock in (peer, other):
                assert await ask(sock) == b"reply\n"
            before = len(asyncio.all_tasks())
            peer.close()
            await until(lambda: len(asyncio.all_tasks()) != before)

    asyncio.run(asyncio.wait_for(run(), SECONDS))


class Failing(selectors.EpollSelector):
    """A selector that watches no further file while `full`."""

    full = False

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        if self.full:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return super().register(fileobj, events, data)


async def polled(sock: socket.socket) -> bytes:
    """All that comes until the service closes, without the event loop's selector."""
    data = b""
    while True:
        try:
            if not (piece := sock.recv(PIECE)):
                return data
            data += piece
        except BlockingIOError:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("answered", [False, True], ids=["a new one", "one that was answered"])
def test_a_peer_that_cannot_be_waited_for_is_told_so(tmp_path: Path, *, answered: bool) -> None:
    path = str(tmp_path / "s")
    selector = Failing()
    troubles: list[object] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: troubles.append(context))
        async with serving(service := Patient(), path, max_line=4 * SMALL):
            while not service.requests:  # until it listens
                with connected(path) as first:
                    await ask(first)
            selector.full = not answered
            with connected(path) as peer:
                if answered:
                    peer.send(b"later\n" + b"x" * (SMALL + 1))  # of which it reads no more meanwhile
                    await until(lambda: fcntl.ioctl(peer, termios.TIOCOUTQ, bytes(4)) == bytes(4))
                    selector.full = True
                    service.go.set()
                *replies, last = (await polled(peer)).splitlines()
                assert replies == [b"reply"] * answered
                assert b"Cannot allocate memory" in last
                assert b'"limit"' in last

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(asyncio.wait_for(run(), SECONDS))
    assert not troubles
