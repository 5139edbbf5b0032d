"""Events that plugins emit: the latest are kept for people to read, and passed on to other plugins."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import cast

from circleosd.api.plugins import PluginEvent
from circleosd.database import Database, Transaction
from circleosd.errors import Limit
from circleosd.fair import Fair
from circleosd.places import Places
from circleosd.plugins.cause import Cause
from circleosd.plugins.plugin import Plugin

SCHEMA = """
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    time REAL NOT NULL,
    plugin TEXT NOT NULL,
    topic TEXT NOT NULL,
    payload TEXT NOT NULL
);
CREATE INDEX events_by_plugin ON events (plugin)
"""
KEPT = 1000  # events
MAX_PAYLOAD = 16 * 1024  # bytes of one event
WAITING = 64  # events that may wait for one follower
DEEPEST = 4  # how many events in a row may cause one another
FOLLOWED_AT_ONCE = 16  # events read at once for a follower, who may be slow
READINGS, READINGS_BY_ONE = 128, 16  # of the newest events in hand, and of one uid; each may have 16 MB

PassOn = Callable[[Plugin, str, str, Cause], None]


class _Follower:
    """Somebody who reads events of a topic, or of all, as they are emitted."""

    def __init__(self, topic: str | None) -> None:
        self._topic = topic
        self._queue: asyncio.Queue[PluginEvent] = asyncio.Queue(WAITING)
        self._lost = False

    def put(self, event: PluginEvent) -> None:
        """Never waits: a reader who is too slow loses the stream."""
        if self._topic not in (None, event["topic"]):
            return
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            self._lost = True

    async def next(self) -> PluginEvent:
        """The next event. Raises `Limit` after one was lost."""
        if self._lost:
            raise Limit(f"more than {WAITING} events were waiting to be read; follow again")
        return await self._queue.get()


class Events:
    """The events of all plugins. `pass_on` is called with each one: its plugin, topic and payload, and its cause."""

    def __init__(self, database: Database, pass_on: PassOn) -> None:
        self._database = database
        self._pass_on = pass_on
        self._followers: set[_Follower] = set()
        self._reading = Fair(1)
        self._readings = Places("readings of events", READINGS, READINGS_BY_ONE)

    async def emit(self, plugin: Plugin, topic: str, payload: str, cause: Cause) -> None:
        """Store an event that `cause` led to, and pass it on. Raises `Limit`."""
        if len(payload.encode()) > MAX_PAYLOAD:
            raise Limit(f"an event may have at most {MAX_PAYLOAD} bytes")
        if cause.depth >= DEEPEST:
            raise Limit(f"this event follows from a chain of {cause.depth} others; that is the limit")

        def work(tx: Transaction) -> tuple[int, float]:
            now = time.time()
            cursor = tx.execute(
                "INSERT INTO events (time, plugin, topic, payload) VALUES (?, ?, ?, ?)",
                (now, plugin.name, topic, payload),
            )
            if tx.execute("SELECT count(*) FROM events").fetchone()[0] > KEPT:
                tx.execute(f"DELETE FROM events WHERE seq = ({_LEAST_MISSED})")
            return cursor.lastrowid or 0, now

        seq, now = await self._database.write(work)
        event = PluginEvent(seq=seq, time=now, plugin=plugin.name, topic=topic, payload=payload)
        for follower in self._followers:
            follower.put(event)
        self._pass_on(plugin, topic, payload, cause)

    async def last(self, count: int, topic: str | None, uid: int | None) -> list[PluginEvent]:
        """The newest events, oldest first; the places are limited per `uid`. Raises `Limit`."""
        with self._readings.held(uid):
            async with self._reading.turn(uid):  # otherwise many would be in memory before they are sent
                return await self._database.scan(lambda connection: _last(connection, count, topic))

    async def follow(self, count: int, topic: str | None) -> AsyncGenerator[PluginEvent, None]:
        """The newest events, then new ones as they are emitted. Raises `Limit` if they are not read fast enough."""
        follower = _Follower(topic)
        self._followers.add(follower)
        try:
            known = 0
            if count:
                known = await self._database.scan(lambda connection: _before(connection, count, topic))
                while found := await self._database.scan(partial(_after, seq=known, topic=topic)):
                    for event in found:
                        known = event["seq"]
                        yield event
            while True:
                event = await follower.next()
                if event["seq"] > known:
                    yield event
        finally:
            self._followers.discard(follower)


# The oldest event of the plugin that has most: one that emits very many must not displace those of others.
_LEAST_MISSED = "SELECT min(seq) FROM events GROUP BY plugin ORDER BY count(*) DESC, min(seq) LIMIT 1"
_EVENTS = "SELECT seq, time, plugin, topic, payload FROM events WHERE (:topic IS NULL OR topic = :topic)"


def _last(connection: sqlite3.Connection, count: int, topic: str | None) -> list[PluginEvent]:
    given = {"topic": topic, "count": count}
    rows = connection.execute(f"{_EVENTS} ORDER BY seq DESC LIMIT :count", given).fetchall()
    return [cast(PluginEvent, dict(row)) for row in reversed(rows)]


def _before(connection: sqlite3.Connection, count: int, topic: str | None) -> int:
    """The number of the event before the newest `count`; 0 if there is none."""
    given = {"topic": topic, "count": count}
    row = connection.execute(f"{_EVENTS} ORDER BY seq DESC LIMIT 1 OFFSET :count", given).fetchone()
    return row["seq"] if row else 0


def _after(connection: sqlite3.Connection, seq: int, topic: str | None) -> list[PluginEvent]:
    """The first events after that number."""
    given = {"topic": topic, "seq": seq, "count": FOLLOWED_AT_ONCE}
    rows = connection.execute(f"{_EVENTS} AND seq > :seq ORDER BY seq LIMIT :count", given)
    return [cast(PluginEvent, dict(row)) for row in rows]
