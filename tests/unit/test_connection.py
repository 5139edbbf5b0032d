"""What a connection receives at once, and what it gives back."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import resource
import socket
import termios
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path

import pytest

from circleosd.config import ServerSettings
from circleosd.connection import PIECE, SMALL, Descriptors, PassingSocket
from circleosd.errors import Limit
from circleosd.policy import Peer
from circleosd.server import Server
from tests.lingering import lingering


def test_a_piece_stays_below_what_malloc_maps() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs, PassingSocket(fileno=ours.detach()) as passing:
        passing.descriptors = Descriptors()
        theirs.sendall(bytes(2 * PIECE))
        assert len(passing.recv(4 * PIECE)) == PIECE
    assert PIECE < 128 * 1024  # M_MMAP_THRESHOLD of mallopt(3)


@pytest.mark.parametrize("received", [False, True], ids=["unread", "received"])
@pytest.mark.parametrize("passed", [1, 5])
def test_a_descriptor_whose_closing_waits_holds_up_nobody(received: bool, passed: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.ExitStack() as stack:
        passing = stack.enter_context(PassingSocket(fileno=ours.detach()))
        passing.descriptors = Descriptors()
        with theirs:
            slow = [stack.enter_context(lingering(8)) for _ in range(passed)]
            socket.send_fds(theirs, [b"x"], [sock.fileno() for sock in slow])
            for sock in slow:
                sock.close()
            began = time.monotonic()
            if received:
                assert passing.recv(1) == b"x"
            passing.close()
            assert time.monotonic() - began < 4


@pytest.mark.parametrize("room", [0, 1])
def test_a_descriptor_that_finds_no_room_among_the_open_files_is_not_said_to_be_missing(room: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    bounds = resource.getrlimit(resource.RLIMIT_NOFILE)
    with theirs, PassingSocket(fileno=ours.detach()) as passing:
        passing.descriptors = Descriptors()
        socket.send_fds(theirs, [b"x"], [theirs.fileno()] * 2)
        opened: list[int] = []
        try:
            highest = max(int(name) for name in os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 3, bounds[1]))
            with contextlib.suppress(OSError):
                while True:
                    opened.append(os.dup(theirs.fileno()))
            for _ in range(room):
                os.close(opened.pop())
            assert passing.recv(1) == b"x"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, bounds)
            for descriptor in opened:
                os.close(descriptor)
        for _ in range(room):
            os.close(passing.descriptors.take())
        with pytest.raises(Limit, match="too many files are open here"):
            passing.descriptors.take()


def test_a_descriptor_that_was_passed_is_not_handed_on_to_programs() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs, PassingSocket(fileno=ours.detach()) as passing:
        passing.descriptors = Descriptors()
        socket.send_fds(theirs, [b"x"], [theirs.fileno()])
        assert passing.recv(1) == b"x"
        descriptor = passing.descriptors.take()
        try:
            assert not os.get_inheritable(descriptor)
        finally:
            os.close(descriptor)


class Generous:
    """A service whose every reply is larger than what the kernel takes for a peer that does not read."""

    name = "generous"
    requests = 0
    connections: Callable[[], int] = staticmethod(lambda: 0)

    async def dispatch(self, line: bytes, peer: Peer, files: Descriptors) -> bytes:
        self.requests += 1
        return bytes(4 << 20)


class Silent:
    """A service manager that nobody looks at."""

    watchdog_interval: float | None = None

    def ready(self, status: str) -> None: ...

    def status(self, text: str) -> None: ...

    def alive(self) -> None: ...

    def stopping(self) -> None: ...


@pytest.mark.parametrize("behind", [b"", b"x" * SMALL, b"x" * SMALL + b"\nx\n"], ids=["nothing", "a part", "a line"])
def test_a_peer_that_goes_before_it_has_its_reply_leaves_nothing_booked(tmp_path: Path, behind: bytes) -> None:
    path = str(tmp_path / "s")

    async def run() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            server = Server(Generous(), listener, ServerSettings(), max_line=1 << 20, manager=Silent())
            serving = asyncio.create_task(server.run())
            _, writer = await asyncio.open_unix_connection(path)
            writer.write(b"x\n" + behind)
            while not server.booked:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)  # the reply waits for the peer now, and what is behind the request is read
            writer.transport.abort()
            while server.service.connections():
                await asyncio.sleep(0.001)
            server.stop()
            await serving
            assert server.booked.total() == 0

    asyncio.run(asyncio.wait_for(run(), 20))


class Patient:
    """A service that answers some requests only when it is told to `go` on. `streams` counts those that are open."""

    name = "patient"
    requests = 0
    connections: Callable[[], int] = staticmethod(lambda: 0)

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.streams = 0

    async def dispatch(self, line: bytes, peer: Peer, files: Descriptors) -> bytes | AsyncGenerator[bytes, None]:
        self.requests += 1
        if line != b"now":
            await self.go.wait()
        return self._stream() if line == b"stream" else b"reply\n"

    async def _stream(self) -> AsyncGenerator[bytes, None]:
        self.streams += 1
        try:
            await asyncio.Event().wait()
            yield b""
        finally:
            self.streams -= 1


def connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    sock.connect(path)
    return sock


async def ask(sock: socket.socket) -> bytes:
    """The reply to what is answered at once."""
    sock.send(b"now\n")
    return await asyncio.get_running_loop().sock_recv(sock, PIECE)


@contextlib.asynccontextmanager
async def left_with(line: bytes, path: str, settings: ServerSettings) -> AsyncIterator[tuple[Patient, socket.socket]]:
    """A `Patient` whose server knows of the end of a peer with the request `line` in hand, and another peer of it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        server = Server(service := Patient(), listener, settings, max_line=1 << 20, manager=Silent())
        serving = asyncio.create_task(server.run())
        with connected(path) as leaving, connected(path) as staying:
            leaving.send(b"now\n" + line + b"\n")
            while service.requests < 2:
                await asyncio.sleep(0.001)
            leaving.close()  # with a reply unread, which makes its end a reset
            assert await ask(staying) == b"reply\n"  # by now the event loop has seen that end
            yield service, staying
            service.go.set()
            while service.connections() > 1:
                await asyncio.sleep(0.001)
        server.stop()
        await serving


def test_a_request_counts_as_a_connection_until_it_is_done_though_its_peer_has_gone(tmp_path: Path) -> None:
    async def run() -> None:
        path = str(tmp_path / "s")
        async with left_with(b"later", path, ServerSettings(max_connections_per_uid=2)) as (service, _):
            assert service.connections() == 2
            with connected(path) as another:
                assert b'"limit"' in await ask(another)

    asyncio.run(asyncio.wait_for(run(), 20))


def test_no_stream_begins_for_a_peer_that_has_gone(tmp_path: Path) -> None:
    async def run() -> None:
        async with left_with(b"stream", str(tmp_path / "s"), ServerSettings()) as (service, staying):
            service.go.set()
            assert await ask(staying) == b"reply\n"
            assert service.streams == 0

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_refused_peer_that_does_not_leave_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circleosd.connection.LINGER", 0.2)
    path = str(tmp_path / "s")

    async def run() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            settings = ServerSettings(idle_connection=0.1)
            server = Server(service := Patient(), listener, settings, max_line=1 << 20, manager=Silent())
            serving = asyncio.create_task(server.run())
            with connected(path) as refused:
                assert b'"timeout"' in await asyncio.get_running_loop().sock_recv(refused, PIECE)
                assert service.connections() == 1
                while service.connections():
                    await asyncio.sleep(0.001)
            server.stop()
            await serving

    asyncio.run(asyncio.wait_for(run(), 5))


class Curious(Silent):
    """A service manager that keeps what it was told last."""

    told = ""

    def status(self, text: str) -> None:
        self.told = text


def test_the_service_manager_is_told_what_a_service_does(tmp_path: Path) -> None:
    path = str(tmp_path / "s")

    async def run() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            server = Server(Patient(), listener, ServerSettings(), max_line=1 << 20, manager=(manager := Curious()))
            serving = asyncio.create_task(server.run())
            with connected(path) as one, connected(path):
                assert await ask(one) == b"reply\n"
                while manager.told != "listening; 1 requests answered, 2 connected":
                    await asyncio.sleep(0.001)
            server.stop()
            await serving

    asyncio.run(asyncio.wait_for(run(), 5))


def test_who_connects_as_a_service_is_about_to_end_is_left_in_the_queue_for_the_next_start(tmp_path: Path) -> None:
    path = str(tmp_path / "s")

    async def run() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            with listener.dup() as queue:  # as the service manager holds it
                server = Server(Patient(), listener, ServerSettings(), max_line=1 << 20, manager=Silent())
                serving = asyncio.create_task(server.run())
                await asyncio.sleep(0)
                with connected(path):
                    await asyncio.sleep(0)  # the event loop has noticed it, and takes it behind this
                    server.stop()
                    await serving
                    queue.accept()[0].close()

    asyncio.run(asyncio.wait_for(run(), 20))


@contextlib.asynccontextmanager
async def served(
    service: Patient, path: str, settings: ServerSettings
) -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    """Two peers of a server of `service`."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        server = Server(service, listener, settings, max_line=SMALL, manager=Silent())
        serving = asyncio.create_task(server.run())
        with connected(path) as one, connected(path) as other:
            yield one, other
        while service.connections():
            await asyncio.sleep(0.001)
        server.stop()
        await serving


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
        async with served(Patient(), str(tmp_path / "s"), ServerSettings()) as (peer, _):
            refuse_memory(monkeypatch, method)
            peer.send(b"a part")
            assert b"no memory left in this service for the line" in await received(peer)

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize(("method", "told"), [("feed", []), ("next_line", [b"reply", b"no memory"])])
def test_what_is_refused_for_want_of_memory_is_not_taken_for_the_answer_to_what_came_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, told: list[bytes]
) -> None:
    async def run() -> None:
        service = Patient()
        async with served(service, str(tmp_path / "s"), ServerSettings()) as (peer, _):
            peer.send(b"first\n")
            while not service.requests:
                await asyncio.sleep(0.001)
            refuse_memory(monkeypatch, method)
            peer.send(b"second\n")
            if told:
                while fcntl.ioctl(peer, termios.TIOCOUTQ, bytes(4)) != bytes(4):  # until it is received
                    await asyncio.sleep(0.001)
                service.go.set()
            lines = (await received(peer)).splitlines()
            assert len(lines) == len(told)
            assert all(word in line for word, line in zip(told, lines, strict=True))
            service.go.set()

    asyncio.run(asyncio.wait_for(run(), 20))


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
        async with served(service, str(tmp_path / "s"), ServerSettings()) as (one, other):
            peers += one, other
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(one, b"stream\n")
            assert await loop.sock_recv(other, 100) == b"reply\n"
            assert 0 < service.said < 100

    asyncio.run(asyncio.wait_for(run(), 20))


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
            while not service.streams:
                await asyncio.sleep(0.001)
            peer.close()
            while not service.ending:
                await asyncio.sleep(0.001)
            assert b'"timeout"' in await received(other)
            service.go.set()

    asyncio.run(asyncio.wait_for(run(), 10))


async def received(sock: socket.socket) -> bytes:
    """All that comes until the service closes."""
    data = b""
    while piece := await asyncio.get_running_loop().sock_recv(sock, PIECE):
        data += piece
    return data


def test_a_peer_that_has_said_all_gets_its_replies_and_then_the_end(tmp_path: Path) -> None:
    async def run() -> None:
        service = Patient()
        async with served(service, str(tmp_path / "s"), ServerSettings()) as (peer, other):
            peer.send(b"later\nnow\n")
            peer.shutdown(socket.SHUT_WR)
            while not service.requests:
                await asyncio.sleep(0.001)
            assert await ask(other) == b"reply\n"  # by now the event loop has seen that end
            service.go.set()
            assert await received(peer) == b"reply\n" * 2

    asyncio.run(asyncio.wait_for(run(), 5))


def test_what_comes_while_a_request_is_in_hand_is_answered_however_much_it_is(tmp_path: Path) -> None:
    async def run() -> None:
        service = Patient()
        async with served(service, str(tmp_path / "s"), ServerSettings()) as (peer, other):
            lines = b"later\n" + (b"x" * 8000 + b"\n") * 100
            sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(peer, lines))
            while not service.requests:
                await asyncio.sleep(0.001)
            assert await ask(other) == b"reply\n"
            assert not sending.done()  # what is not yet needed is left where it is
            service.go.set()
            await sending
            peer.shutdown(socket.SHUT_WR)
            assert await received(peer) == b"reply\n" * 101

    asyncio.run(asyncio.wait_for(run(), 10))


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


def test_a_connection_is_idle_from_its_last_reply_on(tmp_path: Path, clock: Clock) -> None:
    async def run() -> None:
        service, settings = Patient(), ServerSettings(idle_connection=60, write_timeout=0.2)
        async with served(service, str(tmp_path / "s"), settings) as (peer, other):
            clock.behind = 100.0
            peer.send(b"later\n")
            while not service.requests:
                await asyncio.sleep(0.001)
            clock.behind = 0.0
            assert await ask(other) == b"reply\n"
            service.go.set()
            assert await asyncio.get_running_loop().sock_recv(peer, PIECE) == b"reply\n"
            await asyncio.sleep(0.2)  # in which the server looks for idle connections
            assert await ask(peer) == b"reply\n"

    asyncio.run(asyncio.wait_for(run(), 5))


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

    asyncio.run(asyncio.wait_for(run(), 5))


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
            while not service.parts:
                await asyncio.sleep(0.001)
            for _turn in range(1000):
                await asyncio.sleep(0)
            assert service.parts < 50
            data = await received(peer)
            assert data[: 100 * PIECE] == bytes(100 * PIECE)
            assert b'"timeout"' in data[100 * PIECE :]

    asyncio.run(asyncio.wait_for(run(), 10))


def test_who_is_refused_behind_a_request_can_send_to_the_end_and_reads_why(tmp_path: Path) -> None:
    async def run() -> None:
        service = Patient()
        async with served(service, str(tmp_path / "s"), ServerSettings()) as (peer, other):
            lines = b"later\n" + b"x" * (4 << 20)
            sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(peer, lines))
            while not service.requests:
                await asyncio.sleep(0.001)
            assert await ask(other) == b"reply\n"
            service.go.set()
            await sending
            reply, refusal = (await received(peer)).splitlines()
            assert reply == b"reply"
            assert b'"limit"' in refusal

    asyncio.run(asyncio.wait_for(run(), 10))


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

    asyncio.run(asyncio.wait_for(run(), 10))


def test_one_uid_leaves_others_room_for_what_they_send(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, uids = str(tmp_path / "s"), iter([1, 1, 2])
    monkeypatch.setattr("circleosd.server.peer_of", lambda sock: Peer(next(uids), 0, 0))
    part = b"x" * (400 << 10)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            service, settings = Patient(), ServerSettings(max_buffered=1 << 20)
            service.go.set()
            server = Server(service, listener, settings, max_line=1 << 20, manager=Silent())
            serving = asyncio.create_task(server.run())
            with connected(path) as one, connected(path) as another, connected(path) as third:
                await loop.sock_sendall(one, part)
                while server.booked[1] < len(part) - SMALL:
                    await asyncio.sleep(0.001)
                await loop.sock_sendall(another, part)
                assert b"for uid 1" in await received(another)
                await loop.sock_sendall(third, part + b"\n")
                assert await loop.sock_recv(third, PIECE) == b"reply\n"
            server.stop()
            await serving

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_refused_peer_that_stays_holds_nothing_of_what_all_share(tmp_path: Path) -> None:
    path = str(tmp_path / "s")

    async def run() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            server = Server(Patient(), listener, ServerSettings(), max_line=4 * SMALL, manager=Silent())
            serving = asyncio.create_task(server.run())
            with connected(path) as peer:
                await asyncio.get_running_loop().sock_sendall(peer, b"x" * (4 * SMALL + 1))
                assert b"a line may have at most" in await received(peer)
                assert (server.service.connections(), server.booked.total()) == (1, 0)
            server.stop()
            await serving

    asyncio.run(asyncio.wait_for(run(), 20))


def test_descriptors_that_nobody_took_are_closed_with_their_connection(tmp_path: Path) -> None:
    async def run() -> None:
        theirs, passed = os.pipe()
        os.set_blocking(theirs, False)
        try:
            async with served(Patient(), str(tmp_path / "s"), ServerSettings()) as (peer, _):
                socket.send_fds(peer, [b"now\n"], [passed])
                os.close(passed)
                assert await asyncio.get_running_loop().sock_recv(peer, PIECE) == b"reply\n"
            assert os.read(theirs, 1) == b""
        finally:
            os.close(theirs)

    asyncio.run(asyncio.wait_for(run(), 5))


class Taking(Patient):
    """Takes a descriptor for the request `take` and refuses every other, once it is let go."""

    name = "taking"

    async def dispatch(self, line: bytes, peer: Peer, files: Descriptors) -> bytes:
        await self.go.wait()
        if line != b"take":
            return b"refused\n"
        descriptor = files.take()
        try:
            return os.read(descriptor, 10) + b"\n"
        finally:
            os.close(descriptor)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_request_does_not_get_the_descriptor_of_one_before_it(tmp_path: Path, at_once: bool) -> None:
    for name in ("first", "second"):
        (tmp_path / name).write_text(name)

    async def run() -> None:
        async with served(service := Taking(), str(tmp_path / "s"), ServerSettings()) as (peer, _):
            peer.setblocking(True)
            if not at_once:
                service.go.set()
            expected = [b"refused\n", b"second\n"]
            for line, name, reply in zip((b"other\n", b"take\n"), ("first", "second"), expected, strict=True):
                with (tmp_path / name).open() as file:
                    socket.send_fds(peer, [line], [file.fileno()])
                if not at_once:
                    assert await asyncio.to_thread(peer.recv, PIECE) == reply
            if at_once:
                service.go.set()
                told = b""
                while len(told) < len(b"".join(expected)):
                    told += await asyncio.to_thread(peer.recv, PIECE)
                assert told == b"".join(expected)

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize("late", [False, True])
def test_descriptors_of_a_refused_peer_are_closed_though_it_stays(tmp_path: Path, late: bool) -> None:
    async def run() -> None:
        theirs, passed = os.pipe()
        os.set_blocking(theirs, False)
        settings = ServerSettings(idle_connection=0.1, read_timeout=0.1)
        try:
            async with served(service := Patient(), str(tmp_path / "s"), settings) as (peer, _):
                if late:
                    assert b'"timeout"' in await received(peer)
                socket.send_fds(peer, [b"x"], [passed])
                os.close(passed)
                if not late:
                    assert b'"timeout"' in await received(peer)
                while True:
                    with contextlib.suppress(BlockingIOError):
                        assert os.read(theirs, 1) == b""
                        break
                    await asyncio.sleep(0.001)
                assert service.connections() == 2
        finally:
            os.close(theirs)

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_connection_that_has_gone_leaves_no_task(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(Patient(), str(tmp_path / "s"), ServerSettings()) as (peer, other):
            for sock in (peer, other):
                assert await ask(sock) == b"reply\n"
            before = len(asyncio.all_tasks())
            peer.close()
            while len(asyncio.all_tasks()) == before:
                await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(run(), 5))
