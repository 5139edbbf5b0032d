"""The instances that serve the calls of one plugin: each is made before its call if possible, and deleted after it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

from circleosd.worker.engine import Engine, Pointer
from circleosd.worker.failure import PluginFailure


class InStore(Protocol):
    """An instance in a store of its own. After a trap it is `broken`."""

    context: Pointer
    broken: bool

    def delete(self) -> None: ...


Instance = TypeVar("Instance", bound=InStore)
T = TypeVar("T")


class Instances(Generic[Instance]):
    """Instances made by `make`. If `shared`, one serves all calls until it breaks, else each serves one call.

    Calls may come from several threads if they are not shared.
    """

    def __init__(self, engine: Engine, make: Callable[[], Instance], *, shared: bool) -> None:
        self._engine = engine
        self._make = make
        self._shared = shared
        self._ready: list[Instance] = []
        self._spent: list[Instance] = []

    def add(self, instance: Instance) -> None:
        """An instance is ready for a call."""
        self._ready.append(instance)

    def put_back(self, instance: Instance) -> None:
        """An instance was used."""
        (self._ready if self._shared and not instance.broken else self._spent).append(instance)

    def serve(self, work: Callable[..., T], *arguments: object) -> T:
        """Does the `work` of a call with an instance that is ready, or a new one, which may run from now on."""
        instance = self._take()
        try:
            return work(instance, *arguments)
        except PluginFailure as exc:
            exc.restarted = self._shared and instance.broken
            raise
        finally:
            self.put_back(instance)

    def _take(self) -> Instance:
        """Making it takes a part of the call's time, but not of its fuel: whether a call runs out of fuel must not
        depend on when its instance is made.
        """
        try:
            instance = self._ready.pop()
        except IndexError:
            instance = self._make()
            if not self._engine.deterministic:
                return instance
        self._engine.allow(instance.context)
        return instance

    def prepare(self, anticipate: Callable[[Instance], None] = lambda instance: None) -> None:
        """Between two calls: deletes used instances and makes that of the next call, which `anticipate` prepares."""
        with suppress(IndexError):  # another thread may take what this one found
            while self._spent:
                self._spent.pop().delete()
        if not self._ready:
            # What fails here will fail again, and be reported, in the call that needs the instance.
            with suppress(PluginFailure):
                instance = self._make()
                try:
                    anticipate(instance)
                except PluginFailure:
                    instance.delete()
                    raise
                self._ready.append(instance)
