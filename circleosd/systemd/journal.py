"""The journal: the services' log, and the ledger's rows with structured fields (systemd.journal-fields(7))."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import sys
from typing import Any

from circleosd.api.common import Event
from circleosd.steering import plain, word

log = logging.getLogger(__name__)

SOCKET = "/run/systemd/journal/socket"
PATIENCE = 5.0  # seconds that a row waits for a journald that accepts nothing; other changes wait for that one
_SEALED = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

# One identifier for each kind of row, explained in the installed catalog (units/circleosd.catalog).
MESSAGE_IDS = {
    "done": "d97d231a40db4ad483bd3886e5099d0d",
    "intent": "10b91a703a9c4d179a742193e6442330",
    "outcome": "9e9577aebc4d4363a5771de86462e77d",
    "failed": "ac140fc2c6de431f9d386f233397e8b8",
    "denied": "a85b7acb4f1f4652a20f4c30fd25298e",
}

ROW = "CIRCLEOSD_ROW"  # the field with a complete row of the ledger


def _one_line(text: str) -> str:
    return plain(text.replace("\n", " "))


class _OneLine(logging.Formatter):
    """A message is one line, whatever a plugin or a client wrote; only a traceback after it has more."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # logging's name for it
        return _one_line(super().formatMessage(record))


class _Prefixed(_OneLine):
    """Each line prefixed with its priority, as the journal reads it from standard error (sd-daemon(3))."""

    _PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in self._PRIORITIES if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).split("\n"))


def set_up() -> None:
    """Log to standard error, with priorities where that is the journal (JOURNAL_STREAM, systemd.exec(5))."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Prefixed() if _is_the_journal(sys.stderr.fileno()) else _OneLine(logging.BASIC_FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("circleosd").setLevel(logging.DEBUG)  # of libraries only important messages, of plugins all


def complain(text: str) -> None:
    """Report an error on one line of standard error, with a priority if that is the journal. If it is full, do not."""
    with contextlib.suppress(OSError):
        print("<3>" * _is_the_journal(2) + _one_line(text), file=sys.stderr)


def _is_the_journal(descriptor: int) -> bool:
    try:
        device, inode = os.environ.get("JOURNAL_STREAM", "").split(":")
        status = os.fstat(descriptor)
        return (status.st_dev, status.st_ino) == (int(device), int(inode))
    except (OSError, ValueError):
        return False


class Mirror:
    """Writes rows of the ledger to the journal; does nothing if no journal is running.

    After a row has waited in vain, later ones do not wait until journald accepts one again; then the number of missing
    rows is logged.
    """

    def __init__(self) -> None:
        self._lacks = 0  # rows that journald has not accepted since the last accepted one

    def __call__(self, event: Event) -> None:
        """Write a row. If that fails, log why."""
        entry = b"".join(_field(name, text.encode()) for name, text in _fields(event).items())
        try:
            _send(entry, 0.0 if self._lacks else PATIENCE)
        except (TimeoutError, BlockingIOError):
            self._lacks += 1
            if self._lacks == 1:
                log.warning("row %d of the ledger is not in the journal: journald accepts nothing", event["seq"])
        except OSError as exc:
            log.warning("row %d of the ledger is not in the journal: %s", event["seq"], exc.strerror or exc)
        else:
            if self._lacks:
                log.warning("journald accepts rows again; missing before row %d: %d", event["seq"], self._lacks)
            self._lacks = 0


def _fields(event: Event) -> dict[str, str]:
    """A row as fields of the journal."""
    actor = event["actor"]
    who = f"{actor['user']} (uid {actor['uid']})" if actor["user"] else f"uid {actor['uid']}"
    if actor["plugin"]:
        called = event["params"].get("called_by")
        who = f"plugin {actor['plugin']}, by {who}" + (f", called by {called}" if called else "")
    what = " ".join(filter(None, (event["action"], event["object"] and word(event["object"]))))
    before, after = event["before"], event["after"]
    change = None if before is None and after is None else f"{_text(before)} → {_text(after)}"
    how = ": ".join(filter(None, (event["phase"], "; ".join(filter(None, (change, event["message"]))))))
    return {
        # Paths and a plugin's own texts may be anything; journalctl(1) hides messages that would control a terminal.
        "MESSAGE": _one_line(f"{who}: {what}: {how}"),
        "MESSAGE_ID": MESSAGE_IDS[event["phase"]],
        "PRIORITY": "5" if event["error"] is None else "4",
        "SYSLOG_IDENTIFIER": f"circleosd-{event['service']}",
        "CIRCLEOSD_ACTION": event["action"],
        "CIRCLEOSD_OBJECT": event["object"] or "",
        "CIRCLEOSD_USER": actor["user"] or "",
        "CIRCLEOSD_UID": str(actor["uid"]),
        "CIRCLEOSD_PLUGIN": actor["plugin"] or "",
        "CIRCLEOSD_PHASE": event["phase"],
        "CIRCLEOSD_ERROR": event["error"] or "",
        "CIRCLEOSD_SEQ": str(event["seq"]),
        ROW: json.dumps(event, ensure_ascii=False, separators=(",", ":")),
    }


def _text(value: Any) -> str:
    """A state before or after an act, as `circlectl system history` shows it."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={_text(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "-" if value is None else str(value)


def _send(entry: bytes, patience: float) -> None:
    """Write an entry (systemd.io/JOURNAL_NATIVE_PROTOCOL). Raises OSError, TimeoutError after `patience` seconds.

    sd_journal_send(3) waits for journald indefinitely, and systemd-python does so while holding Python's lock: no other
    thread could run, and the watchdog would kill the service.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(patience)
        try:
            sock.connect(SOCKET)
        except (FileNotFoundError, ConnectionRefusedError):
            return
        try:
            sock.send(entry)
        except OSError as exc:
            if exc.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            with open(os.memfd_create("entry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "wb", buffering=0) as file:
                file.write(entry)
                fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALED)
                socket.send_fds(sock, [], [file.fileno()])


def _field(name: str, value: bytes) -> bytes:
    if b"\n" in value:
        return b"%s\n%s%s\n" % (name.encode(), len(value).to_bytes(8, "little"), value)
    return b"%s=%s\n" % (name.encode(), value)
