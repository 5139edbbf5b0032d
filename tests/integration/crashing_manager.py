"""plugin-manager as it is, but for a step at which it is killed: `crashing_manager.py FILE`.

FILE names the step while it exists: a function below and `before` or `after`, such as `Artifacts.keep before`.
"""

from __future__ import annotations

import functools
import inspect
import os
import pkgutil
import signal
import sys
from pathlib import Path
from typing import Any

from circleosd import __main__

# By step: the module or class, and the name of the function there.
STEPS = {
    "stage": ("circleosd.plugins.artifacts:Artifacts", "stage"),
    "probe": ("circleosd.plugins.runner:Runners", "probe"),
    "keep": ("circleosd.plugins.artifacts:Artifacts", "keep"),
    "put": ("circleosd.plugins.store", "put"),
    "put_record": ("circleosd.plugins.store", "put_record"),  # the last statement but the ledger's before COMMIT
    "delete": ("circleosd.plugins.store", "delete"),
    "committed": ("circleosd.database:Transaction", "committed"),
    "adopt": ("circleosd.plugins.runner:Runners", "adopt"),
    "remove": ("circleosd.plugins.runner:Runners", "remove"),
    "forget": ("circleosd.plugins.keyvalue:KeyValue", "forget"),
    "sweep": ("circleosd.plugins.service:PluginService", "_sweep"),
    "unlink": ("circleosd.plugins.artifacts:Artifacts", "sweep"),
}

changing: list[str] = []


def main(armed: Path) -> None:
    compose = __main__._plugins

    async def composed(*args: Any) -> Any:
        for step, (place, name) in STEPS.items():  # not before: it is the command that begins to import
            owner = pkgutil.resolve_name(place)
            setattr(owner, name, wrapped(getattr(owner, name), step, armed))
        return await compose(*args)

    __main__._plugins = composed  # type: ignore[assignment]  # what composes plugin-manager
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
