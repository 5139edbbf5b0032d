"""A connection to systemd over a bus that answers when the test says so."""

from __future__ import annotations

import asyncio
import gc
import socket
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from dbus_fast import Message, MessageType
from dbus_fast.aio import MessageBus

from circleosd.errors import Timeout, Unavailable
from circleosd.systemd.bus import CALL_SIZE, DAEMON, IN_FLIGHT, Connection, connect
from circleosd.systemd.buserrors import Lost
from circleosd.systemd.names import MANAGER, SYSTEMD
from tests.waiting import SECONDS

RULE = "type='signal'"


class Bus:
    """What `Connection` needs of dbus-fast. It answers at once what is asked of the bus, and of systemd its owner."""

    connected = True

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self._serial = 0

    def add_message_handler(self, handler: Any) -> None:
        self._handler = handler

    async def wait_for_disconnect(self) -> None:
        await asyncio.Event().wait()

    def disconnect(self) -> None:
        self.connected = False

    def next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def send(self, message: Message) -> asyncio.Future[None]:
        self.sent.append(message)
        if message.destination != SYSTEMD or message.member == "Subscribe":
            body = [":1.1"] if message.member == "GetNameOwner" else []
            asyncio.get_running_loop().call_soon(self.answer, message, body)
        sent = asyncio.get_running_loop().create_future()
        sent.set_result(None)
        return sent

    def answer(self, call: Message, body: list[str]) -> None:
        kind = MessageType.METHOD_RETURN
        self._handler(Message(message_type=kind, reply_serial=call.serial, signature="s" * len(body), body=body))

    def refuse(self, call: Message, error: str) -> None:
        self._handler(Message(message_type=MessageType.ERROR, error_name=error, reply_serial=call.serial))

    def members(self) -> list[str | None]:
        """What was sent, in order."""
        return [message.member for message in self.sent]


def test_the_bus_is_asked_for_signals_though_the_first_who_wants_them_gives_up_before_it_is() -> None:
    async def main() -> None:
        bus = Bus()
        connection = Connection(bus)  # type: ignore[arg-type]  # what it needs of one
        await connection.find_systemd()
        async with connection.signals([], lambda signal: True):
            pass  # systemd sends its signals from now on

        async def listen() -> None:
            async with connection.signals([RULE], lambda signal: True, keep=True):
                await connection.call(MANAGER, "StartUnit")

        # systemd has as much to answer as it may have: nothing more is sent.
        calls = [asyncio.create_task(connection.call(MANAGER, "GetUnit")) for _ in range(IN_FLIGHT // CALL_SIZE)]
        listening = [asyncio.create_task(listen()) for _ in range(2)]
        while bus.members().count("GetUnit") < len(calls):
            await asyncio.sleep(0)
        await asyncio.sleep(0)  # both have come as far as they get
        assert bus.members()[-1] == "GetUnit"
        first, second = listening
        first.cancel()
        await asyncio.wait([first])
        for call in [*bus.sent]:
            if call.member == "GetUnit":
                bus.answer(call, [])
        while "StartUnit" not in bus.members():
            await asyncio.sleep(0)
        *_, asked, started = [message for message in bus.sent if message.member in ("AddMatch", "StartUnit")]
        assert (asked.member, asked.body, started.member) == ("AddMatch", [RULE], "StartUnit")
        second.cancel()
        await asyncio.gather(*calls)

    asyncio.run(asyncio.wait_for(main(), SECONDS))


def test_a_call_is_lost_whose_reply_went_with_who_was_asked() -> None:
    async def main() -> None:
        bus = Bus()
        connection = Connection(bus)  # type: ignore[arg-type]  # what it needs of one
        call = asyncio.create_task(connection.call(MANAGER, "StartUnit"))
        while not bus.sent:
            await asyncio.sleep(0)
        bus.refuse(bus.sent[0], "org.freedesktop.DBus.Error.NoReply")
        with pytest.raises(Lost):
            await call

    asyncio.run(asyncio.wait_for(main(), SECONDS))


def test_a_call_that_nobody_answers_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circleosd.systemd.bus.CALL_TIMEOUT", 0.01)

    async def main() -> None:
        connection = Connection(Bus())  # type: ignore[arg-type]  # what it needs of one
        with pytest.raises(Timeout, match=r"systemd1 did not answer within 0\.01 s"):
            await connection.call(MANAGER, "GetUnit")
        with pytest.raises(Timeout, match=r"systemd1 did not answer within 0\.02 s"):
            await connection.call(MANAGER, "Reload", timeout=0.02)

    asyncio.run(asyncio.wait_for(main(), SECONDS))


async def daemon(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Lets a peer in, as a message bus does, and answers its first call (D-Bus Specification, "Authentication")."""
    while (line := await reader.readline()) != b"BEGIN\r\n":
        if b"AUTH" in line:
            writer.write(b"OK 1234deadbeef\r\n")
    await reader.readuntil(b"Hello\0")
    kind = MessageType.METHOD_RETURN
    hello = Message(message_type=kind, reply_serial=1, sender=DAEMON[0], signature="s", body=[":1.7"], serial=1)
    writer.write(bytes(hello._marshall(False)))


@asynccontextmanager
async def connected(directory: Path) -> AsyncIterator[tuple[Connection, Callable[[], None]]]:
    """A connection to a bus, and what ends the bus without the event loop noticing it before its next turn."""
    peers: list[asyncio.StreamWriter] = []

    async def let_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await daemon(reader, writer)
        peers.append(writer)

    server = await asyncio.start_unix_server(let_in, directory / "bus")
    connection = Connection(await MessageBus(bus_address=f"unix:path={directory}/bus").connect())
    while not peers:
        await asyncio.sleep(0)
    yield connection, lambda: peers[0].get_extra_info("socket").shutdown(socket.SHUT_RDWR)
    await connection.close()
    peers[0].close()
    server.close()


def test_a_call_behind_the_end_of_the_bus_is_lost_and_leaves_no_word_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with connected(tmp_path) as (connection, end):
            end()
            with pytest.raises(Lost):
                await connection.call(MANAGER, "Subscribe")

    asyncio.run(asyncio.wait_for(main(), SECONDS))
    gc.collect()
    assert not caplog.records, caplog.text


def test_who_gives_up_listening_as_the_bus_ends_has_given_up(tmp_path: Path) -> None:
    async def main() -> None:
        async with connected(tmp_path) as (connection, end):
            connection._subscribed = True  # there is no systemd on this bus
            connection._matches[RULE] = 1  # nor who answers; another one listens to that, too
            listening = asyncio.Event()

            async def listen() -> None:
                async with connection.signals([RULE], lambda signal: True) as signals:
                    connection._matches[RULE] -= 1  # which has given up meanwhile
                    listening.set()
                    await signals.get()

            task = asyncio.create_task(listen())
            await listening.wait()
            end()
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()

    asyncio.run(asyncio.wait_for(main(), SECONDS))


@pytest.mark.parametrize("ends", [False, True])
def test_a_bus_without_a_systemd_is_said_to_lack_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    monkeypatch.setattr("circleosd.systemd.bus.ARRIVAL", 20.0 if ends else 0.1)

    async def let_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await daemon(reader, writer)
        await reader.readuntil(b"AddMatch\0")
        if not ends:
            await reader.read()
        writer.close()

    async def main() -> None:
        async with await asyncio.start_unix_server(let_in, tmp_path / "bus"):
            await connect(f"unix:path={tmp_path}/bus")

    why = "the connection was lost" if ends else "it did not come within 0.1 s"
    with pytest.raises(Unavailable, match=f"^cannot find systemd on the message bus at unix:path=.*/bus: {why}$"):
        asyncio.run(asyncio.wait_for(main(), SECONDS))


LOOPS = pytest.mark.skipif(
    tuple(map(int, version("dbus-fast").split(".")[:3])) < (4, 2, 8), reason="this dbus-fast would loop forever"
)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("address", ""),
        ("refusal", "authentication failed: "),
        pytest.param("silence", "", marks=LOOPS),
        ("no text", "'utf-8' codec "),
        ("nonsense", ""),
        ("no name", ""),
        ("hanging up", "it hung up$"),
    ],
)
def test_a_bus_that_lets_nobody_in_cannot_be_reached(tmp_path: Path, fault: str, why: str) -> None:
    async def turn_away(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"AUTH EXTERNAL")
        if fault == "refusal":
            writer.write(b"REJECTED EXTERNAL\r\n")
        elif fault == "no text":
            writer.write(b"\xff\r\n")
        elif fault != "silence":
            writer.write(b"OK 1234deadbeef\r\n")
            await reader.readuntil(b"Hello\0")
            nameless = Message(message_type=MessageType.METHOD_RETURN, reply_serial=1, sender=DAEMON[0], serial=1)
            writer.write({"nonsense": b"?" * 64, "no name": bytes(nameless._marshall(False))}.get(fault, b""))
        writer.close()

    async def main() -> None:
        async with await asyncio.start_unix_server(turn_away, tmp_path / "bus"):
            await connect("nonsense" if fault == "address" else f"unix:path={tmp_path}/bus")

    with pytest.raises(Unavailable, match=rf"^cannot reach the message bus at [^ ]+: {why}"):
        asyncio.run(asyncio.wait_for(main(), SECONDS))
    with warnings.catch_warnings(action="ignore"):
        gc.collect()  # older releases of dbus-fast leave the socket of a failed connection to it
