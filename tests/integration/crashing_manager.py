"""plugin-manager as it is, but for a step at which it is killed: `crashing_manager.py FILE`.

FILE names the step while it exists: a function below and `before` or `after`, such as `Artifacts.keep before`.
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
from pathlib import Path
from typing import Any

from circleosd import __main__, database
from circleosd.plugins import keyvalue, runner, service, store

STEPS: dict[str, tuple[Any, str]] = {
    "stage": (store.Artifacts, "stage"),
    "probe": (runner.Runners, "probe"),
    "keep": (store.Artifacts, "keep"),
    "put": (store, "put"),
    "put_record": (store, "put_record"),  # the last statement but the ledger's before COMMIT
    "delete": (store, "delete"),
    "committed": (database.Transaction, "committed"),
    "adopt": (runner.Runners, "adopt"),
    "remove": (runner.Runners, "remove"),
    "forget": (keyvalue.KeyValue, "forget"),
    "sweep": (service.PluginService, "_sweep"),
    "unlink": (store.Artifacts, "sweep"),
}

changing: list[str] = []


def main(armed: Path) -> None:
    for step, (owner, name) in STEPS.items():
        setattr(owner, name, wrapped(getattr(owner, name), step, armed))
    sys.argv = ["circleosd", "plugin-manager"]
    __main__.main()


def wrapped(function: Any, step: str, armed: Path) -> Any:
    """`function`, with the process's death before or after it."""

    def die_if(when: str) -> None:
        if step in ("put", "delete"):
            changing.append(step)
        if step == "committed" and not changing:
            return  # another transaction than that of a load or unload
        if armed.exists() and armed.read_text() == f"{step} {when}":
            armed.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if (step, when) == ("committed", "after"):
            changing.clear()

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def waiting(*args: Any, **kwargs: Any) -> Any:
            die_if("before")
            result = await function(*args, **kwargs)
            die_if("after")
            return result

        return waiting

    @functools.wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        die_if("before")
        result = function(*args, **kwargs)
        die_if("after")
        return result

    return plain


if __name__ == "__main__":
    main(Path(sys.argv[1]))
