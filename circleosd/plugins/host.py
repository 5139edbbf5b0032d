"""The host interfaces: the host calls of plugins, each requiring a capability (ABI.md, «Host calls»).

The worker also refuses calls that were not granted, but it may be compromised: the decision is made here, based on the
grants at the time of the call. The clock and the plugin's configuration are provided by the worker itself, based on the
grants when its call began.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from circleosd import upstream
from circleosd.errors import BadRequest, CircleError, Denied, Unavailable
from circleosd.plugins import capabilities
from circleosd.plugins.cause import Cause
from circleosd.plugins.events import Events
from circleosd.plugins.keyvalue import KeyValue
from circleosd.plugins.plugin import Plugin
from circleosd.plugins.workers import HostCalls
from circleosd.worker import frames
from circleosd.worker.host import CALLS, needed_capability

log = logging.getLogger(__name__)

LASTING = frozenset({"kv.set", "kv.delete", "services.restart", "events.emit"})
PRIVILEGED = frozenset({"services.restart"})  # an attempt without the capability is recorded in the ledger
# So a worker passes every such attempt on, whether granted or not.
PASSED_ON = tuple(needed_capability(call, dict.fromkeys(CALLS[call].arguments, "*")) for call in PRIVILEGED)

OnDenied = Callable[[Plugin, str, str, Denied, Cause], Awaitable[None]]


class Host:
    """Answers host calls.

    `registry` is where service-registry listens. `denied` is called for each denied attempt at a privileged act:
    plugin, call, object, reason, and cause.
    """

    def __init__(self, kv: KeyValue, events: Events, registry: str, denied: OnDenied) -> None:
        self._kv = kv
        self._events = events
        self._registry = registry
        self._denied = denied

    def of(self, plugin: Plugin) -> HostCalls:
        """The function that answers the host calls of one plugin."""
        return functools.partial(self._answer, plugin)

    async def _answer(self, plugin: Plugin, call: str, args: dict[str, str], cause: Cause) -> bytes:
        """The body of HOST_REPLY. Never raises."""
        try:
            return frames.host_reply_body(await self._carry_out(plugin, call, args, cause))
        except CircleError as error:
            return frames.host_error_body(error.code, str(error))
        except Exception:
            log.exception("plugin %s: the host call %s failed", plugin.name, call)
            return frames.host_error_body("internal", "an internal error; the host's log has the details")

    async def _carry_out(self, plugin: Plugin, call: str, args: dict[str, str], cause: Cause) -> Any:
        known = CALLS.get(call)
        if known is None:
            raise BadRequest(f"no host call {call[:80]!r}")
        if set(args) != set(known.arguments):
            raise BadRequest(f"the arguments of {call} are: {', '.join(known.arguments) or 'none'}")
        capability = needed_capability(call, args)
        if not plugin.holds(capability):
            error = Denied(f"this plugin has not been granted the capability {capability[:200]}")
            if call in PRIVILEGED:
                await self._denied(plugin, call, next(iter(args.values()))[:200], error, cause)
            raise error
        if plugin.loading and call in LASTING:
            raise Unavailable(f"cannot do {call} while the plugin is being loaded: it may not change anything yet")
        return await self._do(plugin, call, args, cause)

    async def _do(self, plugin: Plugin, call: str, args: dict[str, str], cause: Cause) -> Any:
        match call:
            case "kv.get":
                return await self._kv.get(plugin.name, args["key"])
            case "kv.set":
                return await self._kv.set(plugin.name, args["key"], args["value"], plugin.bounds.storage)
            case "kv.delete":
                return await self._kv.delete(plugin.name, args["key"])
            case "kv.keys":
                return await self._kv.keys(plugin.name, args["prefix"])
            case "services.list":
                return [_service(item) for item in await self._ask(plugin, {"action": "list"})]
            case "services.status":
                return _service(await self._ask(plugin, {"action": "status", "name": _named(args)}))
            case "services.restart":
                await self._ask(plugin, {"action": "restart", "name": _named(args), **cause.recorded()})
                return None
            case "events.emit":
                capabilities.check_topic(args["topic"])
                return await self._events.emit(plugin, args["topic"], args["payload"], cause)
            case _:
                raise BadRequest(f"this host does not support {call}")

    async def _ask(self, plugin: Plugin, request: dict[str, str]) -> Any:
        """Ask the registry on behalf of this plugin. The worker's deadline for its call also limits this."""
        return await upstream.ask(self._registry, {**request, "on_behalf": plugin.name}, timeout=plugin.bounds.time)


def _named(args: dict[str, str]) -> str:
    """The name for a request to the registry, cut if it is too long for any service; the registry then refuses it."""
    return args["name"][:200]


def _service(found: dict[str, Any]) -> dict[str, str]:
    return {name: found[name] for name in ("name", "state", "description")}
