"""A service that kills itself at a commit of one's choice: `python -m tests.crashing SERVICE`.

The file in `$CRASH_PLAN` says at which: `N before` or `N after`, counted from the file's appearance. It is removed at
the crash. Production code has no such hook; the one method that commits is replaced here.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from circleosd.__main__ import main
from circleosd.database import Database

PLAN = Path(os.environ["CRASH_PLAN"])
COMMIT = Database._commit
counted = {"plan": 0, "commits": 0}


def commit(database: Database) -> None:
    """Commit, and crash if the plan says so."""
    try:
        plan, (number, when) = PLAN.stat().st_ino, PLAN.read_text(encoding="ascii").split()
    except FileNotFoundError:
        return COMMIT(database)
    if counted["plan"] != plan:
        counted.update(plan=plan, commits=0)
    counted["commits"] += 1
    hit = counted["commits"] == int(number)
    if hit and when == "before":
        crash()
    COMMIT(database)
    if hit:
        crash()
    return None


def crash() -> None:
    """End at once, as a power cut would."""
    PLAN.unlink()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    Database._commit = commit  # type: ignore[method-assign,assignment]  # the point of this module
    main()
