"""Logging to the journal with structured fields (systemd.journal-fields(7)), or to standard error without one."""

from __future__ import annotations

import json
import logging
import os
import sys

from systemd import journal

from circleosd.api.common import Event

# One identifier for each kind of row, explained in the shipped catalog (units/circleosd.catalog).
MESSAGE_IDS = {
    "done": "d97d231a40db4ad483bd3886e5099d0d",
    "intent": "10b91a703a9c4d179a742193e6442330",
    "outcome": "9e9577aebc4d4363a5771de86462e77d",
    "failed": "ac140fc2c6de431f9d386f233397e8b8",
    "denied": "a85b7acb4f1f4652a20f4c30fd25298e",
}


def _journald_holds_stderr() -> bool:
    """Whether standard error is connected to the journal (JOURNAL_STREAM, systemd.exec(5))."""
    try:
        device, inode = os.environ.get("JOURNAL_STREAM", "").split(":")
        stat = os.fstat(sys.stderr.fileno())
        return (stat.st_dev, stat.st_ino) == (int(device), int(inode))
    except (OSError, ValueError):
        return False


def set_up(service: str) -> None:
    """Send this process's log to the journal where it has one, else to standard error."""
    handler: logging.Handler
    if _journald_holds_stderr():
        handler = journal.JournalHandler(SYSLOG_IDENTIFIER=f"circleosd-{service}")
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"{service}[{os.getpid()}]: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def mirror(event: Event) -> None:
    """Write a row of the ledger to the journal. Does nothing where no journal runs."""
    actor = event["actor"]
    who = f"{actor['user']} (uid {actor['uid']})" if actor["user"] else f"uid {actor['uid']}"
    what = " ".join(filter(None, (event["action"], event["object"])))
    how = f"{event['phase']}: {event['message']}" if event["message"] else event["phase"]
    journal.send(
        f"{who}: {what}: {how}",
        MESSAGE_ID=MESSAGE_IDS[event["phase"]],
        PRIORITY=5 if event["error"] is None else 4,
        SYSLOG_IDENTIFIER=f"circleosd-{event['service']}",
        CIRCLEOSD_ACTION=event["action"],
        CIRCLEOSD_OBJECT=event["object"] or "",
        CIRCLEOSD_USER=actor["user"] or "",
        CIRCLEOSD_UID=str(actor["uid"]),
        CIRCLEOSD_PHASE=event["phase"],
        CIRCLEOSD_ERROR=event["error"] or "",
        CIRCLEOSD_SEQ=str(event["seq"]),
        CIRCLEOSD_ROW=json.dumps(event, ensure_ascii=False, separators=(",", ":")),
    )
