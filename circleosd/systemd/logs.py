"""A unit's lines in the journal (systemd.journal-fields(7)), read with systemd-python's `journal.Reader`.

A reader belongs to the thread that opened it (sd-journal(3)): the functions here that are not coroutines block and use
theirs within one call; `follow` has its own thread.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from systemd import journal

from circleosd.api.registry import MAX_LINES
from circleosd.errors import Limit, Unavailable
from circleosd.paths import SERVICES
from circleosd.registry.units import LogLine, Scope
from circleosd.steering import plain
from circleosd.systemd.journal import ROW

MAX_TEXT = 2048  # characters of a line that are shown; journald itself cuts at 48 KiB (LineMax=)
BATCH = 200  # lines after which `follow` delivers what it has read so far
SETTLE = 1.0  # seconds for journald to write how a unit ended: 2–4 ms when idle, over 300 when flooded
STRAGGLERS = 0.05  # seconds by which lines may come later than systemd's message that the run is over; measured: 0.1 ms
MOST_READ = 50_000  # entries, in some seconds: a unit may log any number of them that have no lines …
READING = 20.0  # seconds: … or that have very many fields
EARLY = 0.05  # seconds by which a line may seem older than its run, whose time is taken after the process was created

# systemd's messages that a unit could not be started; that its run ended badly, or well.
_NOT_STARTED = "be02cf6855d2428ba40df7e9d022f03d"
_ENDED = ("d9b373ed55a64feb8242e02dbe79a49c", "7ad2d189f7e94e70a38c781354912448")
_INVOCATION: dict[Scope, str] = {"system": "INVOCATION_ID", "user": "USER_INVOCATION_ID"}  # in messages of the manager
_FILES = (Path("/var/log/journal"), Path("/run/log/journal"))
# Rows of a ledger come by another transport (_TRANSPORT=journal), and may be very many: there, they are not even read.
_WITH_LEDGER = {f"circleosd-{part}.service" for part in SERVICES.values()}
_NOT_ROWS = ("_TRANSPORT=stdout", "_TRANSPORT=syslog", "_TRANSPORT=audit")
_WITH_DEFAULT = 1 << 6  # SD_JOURNAL_INCLUDE_DEFAULT_NAMESPACE, sd_journal_open(3), which systemd-python does not define


class Source(NamedTuple):
    """A unit by its name in the journal, the scope of its manager, and its log namespace (LogNamespace=)."""

    unit: str
    scope: Scope
    namespace: str = ""


def tail(source: Source, lines: int, since: float | None) -> list[LogLine]:
    """The last `lines` lines of a unit and of the manager about it, oldest first, none older than `since`.

    `lines` is limited to MAX_LINES. Raises `Unavailable` if this process may not read the journal, `Limit` if they are
    not among the last entries.
    """
    with _about(source) as reader:
        return _last(reader, source, lines, since)[0]


def of_run(source: Source, began: float, invocation: str, lines: int, *, ended: bool) -> list[str]:
    """The last lines that the processes of one run of a unit logged; empty if they cannot be read.

    `began` is in seconds since the epoch, `invocation` the run's InvocationID in hexadecimal. With `ended`, waits a
    moment for journald to catch up.
    """
    scope = source.scope
    if scope == "system" and not _readable():
        return []
    if ended:
        _settle(invocation, scope)
    found: list[LogLine] = []  # newest first
    with _about(source) as reader, suppress(Limit):
        for entry in _backwards(reader, source, began - EARLY):
            if len(found) >= lines:
                break
            if _by_manager(entry, scope):
                if entry.get(_INVOCATION[scope], invocation) != invocation:
                    break  # older entries are about the previous run
            # journald may be too late to learn the invocation of a process that ends immediately
            elif entry.get("_SYSTEMD_INVOCATION_ID", invocation) == invocation:
                found += reversed([*_lines(entry)])
    return [line.text for line in reversed(found[: min(lines, MAX_LINES)])]


async def follow(source: Source, lines: int, since: float | None) -> AsyncGenerator[LogLine, None]:
    """The lines of `tail`, then every new line, until the iterator is closed. Raises `Unavailable`, `Limit`."""
    thread = ThreadPoolExecutor(1, "journal")
    loop = asyncio.get_running_loop()
    follower = _Follower()
    try:
        found = await loop.run_in_executor(thread, follower.open, source, lines, since)
        while True:
            for line in found:
                yield line
            if len(found) < BATCH:
                await _until_readable(follower.descriptor, follower.timeout)
            found = await loop.run_in_executor(thread, follower.read)
    finally:
        thread.submit(follower.close)
        thread.shutdown(wait=False)


class _Follower:
    """A reader that continues where it stopped; all methods run in one thread."""

    def __init__(self) -> None:
        self._reader: Any = None
        self.descriptor = -1
        self.timeout: float | None = None

    def open(self, source: Source, lines: int, since: float | None) -> list[LogLine]:
        """Start; return the existing lines."""
        self._reader = reader = _about(source)
        try:
            self.descriptor = reader.fileno()  # from here on, changes are noticed
        except OSError as exc:
            raise Limit(
                f"cannot follow the log of {source.unit}: {exc.strerror}; too many logs are being followed"
            ) from exc
        began = time.time()
        found, cursor = _last(reader, source, lines, since)
        if cursor is None:
            reader.seek_realtime(began)
        else:
            reader.seek_cursor(cursor)
            _entry(reader.get_next)
        self._note_timeout()
        return found

    def read(self) -> list[LogLine]:
        """Read the lines that came since, at most BATCH plus those of one entry."""
        self._reader.process()
        found: list[LogLine] = []
        while len(found) < BATCH and (entry := _entry(self._reader.get_next)):
            found += _lines(entry)
        self._note_timeout()
        return found

    def close(self) -> None:
        """Close the reader."""
        if self._reader is not None:
            self._reader.close()

    def _note_timeout(self) -> None:
        milliseconds = self._reader.get_timeout_ms()  # for file systems that do not report changes
        self.timeout = None if milliseconds < 0 else milliseconds / 1000


async def _until_readable(descriptor: int, timeout: float | None) -> None:
    """Wait until the journal may have changed, at most `timeout` seconds."""
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    loop.add_reader(descriptor, changed.set)
    try:
        async with asyncio.timeout(timeout):
            await changed.wait()
    except TimeoutError:
        return
    finally:
        loop.remove_reader(descriptor)


def _settle(invocation: str, scope: Scope) -> None:
    """Wait until the end of a run is in the journal.

    The lines of a process may be written after its unit's failure, but not long after; systemd's last message about a
    failed start of a unit is that it failed to start.
    """
    deadline = time.monotonic() + SETTLE
    with _reader() as reader:
        reader.add_match(f"{_INVOCATION[scope]}={invocation}")
        reader.add_match(*(f"MESSAGE_ID={ending}" for ending in (_NOT_STARTED, *_ENDED)))
        while (left := deadline - time.monotonic()) > 0:
            if not (entry := _entry(reader.get_next)):
                reader.wait(left)
            elif not _by_manager(entry, scope):  # anybody can log with these fields, even with several of each
                continue
            elif entry["MESSAGE_ID"].hex == _NOT_STARTED:
                return
            else:
                deadline = min(deadline, time.monotonic() + STRAGGLERS)


def _readable() -> bool:
    """Whether this process may read the system's journal: as root or in the group systemd-journal."""
    files = [path for directory in _FILES for path in directory.glob("*/system.journal")]
    return not files or any(os.access(path, os.R_OK) for path in files)


def _reader(namespace: str = "") -> Any:
    """A reader of this machine's whole journal: a user's journal has lines of services that run as that user.

    With a `namespace`, also of that one, which lacks the manager's messages about its units.
    """
    try:
        if namespace:
            reader = journal.Reader(journal.LOCAL_ONLY | _WITH_DEFAULT, namespace=namespace)
        else:
            reader = journal.Reader(journal.LOCAL_ONLY)
    except OSError as exc:
        raise Unavailable(f"cannot open the journal: {exc.strerror}") from exc
    reader.data_threshold = 4 * MAX_TEXT  # bytes of a field that are read; a character may take four
    # The others are for fields that are not used here, and some fail on a value that anybody can log.
    used = ("MESSAGE_ID", "__REALTIME_TIMESTAMP", "__MONOTONIC_TIMESTAMP", "__CURSOR")
    reader.converters = {name: reader.converters[name] for name in used}
    return reader


def _about(source: Source) -> Any:
    """A reader of the messages of a unit's processes and of its manager about it, as in journalctl -u."""
    unit, scope, namespace = source
    if scope == "system" and not _readable():
        raise Unavailable("this service may not read the journal; add its user to the group systemd-journal")
    reader = _reader(namespace)
    said = _NOT_ROWS if unit in _WITH_LEDGER else ()
    if scope == "system":
        reader.add_match(*said, _SYSTEMD_UNIT=unit)
        reader.add_disjunction()
        reader.add_match(_UID=0, UNIT=unit)  # from PID 1, and from its children that could not become the unit
    else:
        reader.add_match(*said, _SYSTEMD_USER_UNIT=unit, _UID=os.getuid())
        reader.add_disjunction()
        reader.add_match(USER_UNIT=unit, _UID=os.getuid())
    return reader


def _by_manager(entry: dict[str, Any], scope: Scope) -> bool:
    """Whether an entry about a unit comes from the service manager rather than from a process of the unit."""
    return entry.get("_SYSTEMD_UNIT" if scope == "system" else "_SYSTEMD_USER_UNIT") == "init.scope"


def _entry(step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The entry reached by a step of a reader; {} at the end. An entry damaged by a failing disk is skipped."""
    while True:
        try:
            return step()
        except UnicodeDecodeError:  # the name of a field
            continue


def _backwards(reader: Any, source: Source, since: float | None) -> Iterator[dict[str, Any]]:
    """The entries from the newest to that of `since`. Raises `Limit` after `MOST_READ` entries or `READING` seconds."""
    left, deadline = MOST_READ, time.monotonic() + READING
    reader.seek_tail()
    while entry := _entry(reader.get_previous):
        if since is not None and entry["__REALTIME_TIMESTAMP"].timestamp() < since:
            return
        yield entry
        left -= 1
        if not left or time.monotonic() > deadline:
            raise Limit(
                f"so many lines in the log of {source.unit} are too far back; "
                "ask for fewer of them, or only for later ones (--since)"
            )


def _last(reader: Any, source: Source, lines: int, since: float | None) -> tuple[list[LogLine], str | None]:
    """The last lines, oldest first, and the cursor of the newest entry; None if there is none."""
    lines = min(lines, MAX_LINES)
    newest: str | None = None
    found: list[LogLine] = []  # newest first
    for entry in _backwards(reader, source, since):
        newest = newest or entry["__CURSOR"]
        found += reversed([*_lines(entry)])
        if len(found) >= lines:
            break
    return found[:lines][::-1], newest


def _lines(entry: dict[str, Any]) -> Iterator[LogLine]:
    """An entry's message, line by line, safe for a terminal; without rows of a ledger, which fewer people may read."""
    if ROW in entry:
        return
    message = entry.get("MESSAGE", "")
    if isinstance(message, list):  # a field may occur several times
        message = message[0]
    text = message.decode("utf-8", "replace") if isinstance(message, bytes) else str(message)
    moment = entry["__REALTIME_TIMESTAMP"].timestamp()
    for line in text.splitlines():
        yield LogLine(moment, plain(line[:MAX_TEXT]))
