"""The units of workers, circleosd-plugin@, which service-registry starts, stops and reports on for the manager."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from circleosd import upstream
from circleosd.errors import CircleError, NotFound, Unavailable
from circleosd.plugins.failures import End

if TYPE_CHECKING:  # another service's contracts, not needed at run time
    from circleosd.api.registry import ServiceStatus

log = logging.getLogger(__name__)

LOOKS = 20  # checks of a worker that has ended, until that is visible …
LOOK = 0.02  # … with so many seconds in between
PATIENCE = 100  # checks of a worker that must end by itself, which takes some milliseconds


def see_log(instance: str) -> str:
    """The next step for who needs to know more about a worker, as the end of a sentence."""
    return f"see: circlectl service logs plugin@{instance}"


class WorkerUnits:
    """`registry` is where service-registry listens; it may take `timeout` seconds to answer.

    An instance is the part after the @ in the names of a worker's socket and service.
    """

    def __init__(self, registry: str, timeout: float) -> None:
        self._registry = registry
        self._timeout = timeout

    async def listen(self, instance: str) -> None:
        """Start a worker's socket. Raises `Unavailable`, which is not a failure of the plugin: none of it ran."""
        try:
            await self._ask("start", f"{instance}.socket")
        except Unavailable:
            raise
        except CircleError as exc:
            raise Unavailable(f"cannot start the worker of {instance}: {exc}") from exc

    async def remove(self, instance: str) -> None:
        """Stop a worker and its socket, as `stop` does."""
        await self.stop(f"{instance}.socket")
        await self.stop(instance)

    async def held_back(self, instance: str) -> Unavailable | None:
        """The error if no worker was started: its socket gave up after too many starts, or the host lacks resources.

        This is not a failure of the plugin, none of whose code ran.
        """
        state = await self._state(f"{instance}.socket")
        if state and state["result"] == "trigger-limit-hit":
            return Unavailable(
                f"the worker of {instance} was started too often in a short time, so systemd refuses to start it; "
                f"try again in a few seconds, or see: journalctl --unit 'circleosd-plugin@{instance}.*'"
            )
        state = await self._state(instance)
        if state and state["result"] == "resources":
            return Unavailable(f"the worker of {instance} cannot be started; {see_log(instance)}")
        return None

    async def _state(self, unit: str) -> ServiceStatus | None:
        """The state of a worker or a socket; None if unknown."""
        try:
            state: ServiceStatus = await self._ask("status", unit)
        except CircleError:
            return None
        return state

    async def how_it_ended(self, instance: str) -> End:
        """What the service manager knows about a worker's end."""
        if (state := await self._ended(instance, LOOKS)) is None:
            return End()
        return End(state["signal"], state["exit_status"], state["result"] == "oom-kill")  # systemd.exec(5)

    async def see_off(self, instance: str) -> None:
        """Stop a worker whose connection was closed but that does not end by itself; native code can cause this."""
        state = await self._ended(instance, PATIENCE)
        if state and state["state"] == "active":
            await self.stop(instance)

    async def _ended(self, instance: str, looks: int) -> ServiceStatus | None:
        """The state of a worker that has ended, or still has not after all checks; None if unknown."""
        for _ in range(looks):
            state = await self._state(instance)
            if state is None or state["state"] not in ("active", "deactivating"):
                break
            # The connection breaks before the process is reaped, and an out-of-memory kill is reported even earlier.
            await asyncio.sleep(LOOK)
        return state

    async def stop(self, unit: str) -> None:
        """Stop a worker, which its socket may start again, or a socket. Errors are logged."""
        try:
            await self._ask("stop", unit)
        except NotFound:
            return  # never started, or already gone: nothing to do
        except CircleError as error:
            log.warning("cannot stop the worker %s: %s", unit, error)

    async def _ask(self, action: str, unit: str) -> Any:
        return await upstream.ask(self._registry, {"action": action, "name": f"plugin@{unit}"}, timeout=self._timeout)
