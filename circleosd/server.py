"""A service on its socket: who is let in, idle exit, readiness, watchdog."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import Protocol

from circleosd import wire
from circleosd.config import ServerSettings
from circleosd.connection import Connection, Dispatcher
from circleosd.discarding import crowded
from circleosd.errors import Limit, Unavailable, shortage
from circleosd.passing import PassingSocket
from circleosd.places import Places
from circleosd.turns import Turns

log = logging.getLogger(__name__)

ACCEPTED_AT_ONCE = 100
ACCEPT_AGAIN = 1.0  # seconds until the next attempt after a connection could not be accepted
SHUTDOWN = 20.0  # seconds that running requests get after SIGTERM; the units allow more
GIVEN_UP = 2.0  # and seconds to end those that took longer
LOOK = 0.05  # seconds between checks of the connections during a shutdown


class Manager(Protocol):
    """The messages of a server to the service manager (circleosd.systemd.notify)."""

    watchdog_interval: float | None

    def ready(self, status: str) -> None: ...

    def status(self, text: str) -> None: ...

    def alive(self) -> None: ...

    def stopping(self) -> None: ...


class Server:
    """Serves one service on one listening socket until it is idle or told to stop.

    `max_line` is in bytes; while the service is `busy`, it is not idle. The total number of connections does not apply
    to the uids in `ahead`.
    """

    def __init__(
        self,
        service: Dispatcher,
        listener: socket.socket,
        settings: ServerSettings,
        *,
        max_line: int,
        manager: Manager,
        busy: Callable[[], bool] = lambda: False,
        ahead: Collection[int] = (),
    ) -> None:
        self.service = service
        self.settings = settings
        self.max_line = max_line
        self.loop = asyncio.get_running_loop()
        self.booked: Counter[int] = Counter()
        self.turns = Turns(self.loop)
        self._listener = listener
        self._manager = manager
        self._busy = busy
        self._spare: int | None = None
        self._connections: set[Connection] = set()
        most, each = settings.max_connections, settings.max_connections_per_uid
        self._places = Places("connections", most, each, "server.max_connections", ahead)
        self._last_busy = time.monotonic()
        self._stop = asyncio.Event()
        service.connections = lambda: len(self._connections)

    def lost(self, connection: Connection) -> None:
        """A connection has ended."""
        self._connections.discard(connection)
        self._places.leave(connection.peer.uid)
        self._last_busy = time.monotonic()

    def stop(self) -> None:
        """Make `run` end once the running requests are answered. No more connections are accepted."""
        self._stop.set()

    async def run(self) -> None:
        """Serve until idle for `idle_exit` seconds, or `stop`.

        An idle exit loses no request: a connection counts from its accept(2), and one that was not accepted stays in
        the queue of the socket, which the service manager holds and listens on again.
        """
        _raise_descriptor_limit()
        self._listener.setblocking(False)
        self._listen()
        self._manager.ready("listening")
        timers = [self.loop.create_task(self._sweep())]
        if self._manager.watchdog_interval:
            timers.append(self.loop.create_task(self._feed_watchdog(self._manager.watchdog_interval)))
        try:
            await self._stop.wait()
        finally:
            self.loop.remove_reader(self._listener)
            self._manager.stopping()
            await self._finish()
            for timer in timers:
                timer.cancel()
            self._listener.close()
            if self._spare is not None:
                os.close(self._spare)

    def _listen(self) -> None:
        if self._spare is None:
            self._spare = _spare()
        if not self._stop.is_set():
            self.loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        """Accept some of the waiting connections; the loop calls again if there are more.

        With one at a time, many busy connections, which all get a turn in between, would keep the next one waiting.
        """
        for _ in range(ACCEPTED_AT_ONCE):
            if self._stop.is_set() or not self._accept_one():
                return

    def _accept_one(self) -> bool:
        """Accept one waiting connection; return whether there may be another."""
        try:
            accepted, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False
        except OSError as exc:
            if self._turn_away(exc):
                return True
            # The peer waits in the queue until there is a descriptor again.
            log.warning("cannot accept a connection: %s", exc)
            # The listener stays readable: checked again immediately, it would keep the loop busy.
            self.loop.remove_reader(self._listener)
            self.loop.call_later(ACCEPT_AGAIN, self._listen)
            return False
        self._last_busy = time.monotonic()
        sock = PassingSocket(accepted)
        sock.setblocking(False)
        peer = sock.peer
        try:
            if crowded(peer.uid):
                raise Limit(f"too many descriptors of uid {peer.uid} are waiting to be closed here; try again later")
            self._places.take(peer.uid)
        except Limit as refusal:
            # Answered and closed at once, and not counted: a flood of these must not pile up.
            with sock, contextlib.suppress(OSError):
                sock.send(wire.failure(refusal))
            return True
        connection = Connection(self, peer, sock.descriptors)
        self._connections.add(connection)
        self.loop.create_task(self._open(connection, sock))
        return True

    def _turn_away(self, exc: OSError) -> bool:
        """Accept a waiting client with the spare descriptor and tell it what is missing; whether that worked."""
        if (lacking := shortage(exc)) is None or self._spare is None:
            return False
        os.close(self._spare)
        try:
            accepted, _ = self._listener.accept()
            with accepted, contextlib.suppress(OSError):
                accepted.setblocking(False)
                accepted.send(wire.failure(lacking))
        except OSError:  # a thread took the descriptor, or the client has gone
            return False
        finally:
            self._spare = _spare()
        return True

    async def _open(self, connection: Connection, sock: socket.socket) -> None:
        try:
            await self.loop.connect_accepted_socket(lambda: connection, sock)
        except OSError as exc:
            log.warning("cannot serve a connection: %s", exc)
            sock.close()
            self.lost(connection)

    async def _sweep(self) -> None:
        """Check time-outs and idleness, four times within the shortest of them, but at most 20 times per second."""
        settings = self.settings
        shortest = min(
            settings.idle_exit or 60.0, settings.idle_connection, settings.read_timeout, settings.write_timeout
        )
        told = ""
        while True:
            before = time.monotonic()
            await asyncio.sleep(min(1.0, max(0.05, shortest / 4)))
            now = time.monotonic()
            status = f"listening; {self.service.requests} requests answered, {len(self._connections)} connected"
            if status != told:
                self._manager.status(status)
                told = status
            for connection in list(self._connections):
                # After a stop (SIGSTOP, a frozen cgroup), requests that arrived meanwhile are only read after this.
                connection.check(before)
            if self._connections or self._busy():
                self._last_busy = now
            elif settings.idle_exit and now - self._last_busy >= settings.idle_exit:
                self._stop.set()
                return

    async def _feed_watchdog(self, interval: float) -> None:
        while True:
            self._manager.alive()
            await asyncio.sleep(interval)

    async def _finish(self) -> None:
        """Let the running requests finish, for a limited time."""
        started = time.monotonic()
        while self._connections and time.monotonic() - started < SHUTDOWN:
            await asyncio.sleep(LOOK)  # data sent before we stopped may still be arriving
            for connection in list(self._connections):
                connection.check(time.monotonic())
                connection.close_if_quiet()
        told = f"{self.service.name} ended before this was done; see the outcome in: circlectl system history"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GIVEN_UP):
                await asyncio.gather(*(connection.give_up(Unavailable(told)) for connection in self._connections))


def _spare() -> int | None:
    """A descriptor to close when no others are left; None if there is none."""
    with contextlib.suppress(OSError):
        return os.open(os.devnull, os.O_RDONLY)
    return None


def _raise_descriptor_limit() -> None:
    """Allow as many descriptors as the hard limit; the loop uses epoll, which is not limited to 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
