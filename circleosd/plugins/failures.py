"""How plugins fail: the errors for what a worker reports, and for how it ends. No I/O here."""

from __future__ import annotations

from typing import NamedTuple

from circleosd.errors import BadRequest, CircleError, Limit, NotFound, PluginFailed, Timeout, Unavailable
from circleosd.plugins.manifest import Bounds
from circleosd.worker.frames import Failed
from circleosd.worker.limits import NO_MEMORY


class Trapped(PluginFailed):
    """The plugin's code did something forbidden, and was stopped."""


class Exceeded(Limit):
    """The plugin's code exceeded a limit, and was stopped."""


class WorkerGone(PluginFailed):
    """The worker's process ended while it was needed."""


class BrokeProtocol(WorkerGone):
    """The worker was disconnected for what it sent, which is why it ended."""


class End(NamedTuple):
    """How a worker ended: by a signal, or with an exit status; neither if that is unknown."""

    signal: str | None = None
    status: int | None = None
    out_of_memory: bool = False  # of the unit or the host: killed by the kernel

    def __str__(self) -> str:
        """The end of a sentence."""
        if self.signal:
            return f" by {self.signal}{', out of memory (oom-kill)' if self.out_of_memory else ''}"
        return f" with exit status {self.status}" if self.status is not None else ""


# How a worker ends itself if plugin code cannot be interrupted, and if it has no memory left.
OVERDUE = End(signal="SIGALRM")
EXHAUSTED = End(status=NO_MEMORY)


def exceeded(end: End, bounds: Bounds) -> CircleError | None:
    """The error for the limit because of which a worker ended itself; None if it ended in another way."""
    if end == OVERDUE:
        return Timeout(f"took longer than {bounds.time:g} s")
    if end == EXHAUSTED:
        return Exceeded(f"used up its limit for memory of {bounds.memory} bytes")
    return None


def cut_off(gone: WorkerGone, end: End, bounds: Bounds, took: float) -> CircleError:
    """The error for a call that was cut off after `took` seconds, because its worker ended."""
    limit = exceeded(end, bounds)
    if limit is None:
        return WorkerGone(f"{gone}{end}")
    if end == OVERDUE and took < bounds.time:
        return WorkerGone(f"{gone}, for something else in it {limit}")
    return type(limit)(f"{limit}, and its worker was ended")


def is_fault(error: CircleError) -> bool:
    """Whether an error of `Worker.call` is the plugin's fault, not its answer or its caller's mistake."""
    return isinstance(error, (Trapped, Exceeded, WorkerGone, Timeout))


_STOPPED: dict[str, type[CircleError]] = {
    "plugin-failed": Trapped,
    "timeout": Timeout,
    "limit": Exceeded,
    "not-found": NotFound,
    "bad-request": BadRequest,
    "unavailable": Trapped,  # a worker that is ready does not say so
}
_REPORTED = {**_STOPPED, "plugin-failed": PluginFailed, "limit": Limit}


def of_call(failed: Failed) -> CircleError:
    """The error for a failed call, with the plugin's own message or the trap and its backtrace."""
    message = _with_backtrace(failed)
    if failed.restarted:
        message += "; its state was discarded"
    error: type[CircleError] = (_REPORTED if failed.reported else _STOPPED)[failed.code]
    return error(message)


def of_load(name: str, failed: Failed) -> CircleError:
    """The error for a failed load: an artifact that cannot run is the request's mistake, unless prevented."""
    error = {"limit": Limit, "timeout": Timeout, "unavailable": Unavailable}.get(failed.code, BadRequest)
    return error(f"{name} cannot be loaded: {_with_backtrace(failed)}")


def _with_backtrace(failed: Failed) -> str:
    return failed.message + (f" (at {', '.join(failed.backtrace)})" if failed.backtrace else "")
