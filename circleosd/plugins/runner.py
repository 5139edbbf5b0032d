"""One worker process per plugin: started by the first call, stopped when idle, replaced when broken."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from circleosd.config import PluginSettings
from circleosd.errors import CircleError, PluginFailed, Timeout, Unavailable
from circleosd.fair import Fair
from circleosd.places import Places
from circleosd.plugins.cause import NOBODY, Cause
from circleosd.plugins.compiled import Compiled, Incoming
from circleosd.plugins.failures import BrokeProtocol, End, WorkerGone, cut_off, exceeded, is_fault
from circleosd.plugins.host import PASSED_ON
from circleosd.plugins.plugin import Plugin
from circleosd.plugins.workers import GRACE, HostCalls, Worker
from circleosd.plugins.workerunits import WorkerUnits, see_log
from circleosd.worker import frames
from circleosd.worker.cachekey import cache_key
from circleosd.worker.limits import hard_deadline

log = logging.getLogger(__name__)

STAGED = ".staged"  # suffix of the instance of an upgrade, while the old version keeps running
NATIVE_START = 10.0  # seconds for a worker to start, without compilation
SWEEP = 2.0  # seconds between checks for idle workers


class NotStarted(Unavailable):
    """A worker did not accept its connection in time, so no code of the plugin ran."""


class Superseded(Exception):
    """Before a call began, its version was replaced or removed, or the plugin was held back."""


class Runner:
    """The worker of one version of a plugin with certain grants. Its unit is circleosd-plugin@ with `instance`."""

    def __init__(self, instance: str, plugin: Plugin, queue: int) -> None:
        self.instance = instance
        self.plugin = plugin
        at_once = plugin.bounds.concurrency
        # Every caller leaves half of the queue to others.
        self.places = Places(f"calls of {plugin.name}", at_once + queue, at_once + (queue + 1) // 2, "plugins.queue")
        self.granted = plugin.granted
        self.worker: Worker | None = None
        self.retired = False  # no further calls begin here
        self.finished = asyncio.Event()  # … and the last has ended
        self.used = time.monotonic()
        self.connecting = asyncio.Lock()
        self.turns = Fair(at_once)

    @property
    def live(self) -> Worker | None:
        """The worker, unless none was started yet or its connection is lost."""
        return None if self.worker is None or self.worker.lost else self.worker

    def close(self) -> None:
        """Close the connection to the worker, which then ends by itself."""
        if self.worker:
            self.worker.close()

    def load_request(self, *, precompiled: bool) -> frames.Load:
        """The request that tells the worker what to run."""
        manifest, bounds = self.plugin.manifest, self.plugin.bounds
        return frames.Load(
            name=manifest.name,
            plugin_type=manifest.plugin_type,
            abi=manifest.abi,
            entry=manifest.entry if manifest.plugin_type == "native" else None,
            instance=manifest.instance,
            limits=frames.Limits(bounds.memory, bounds.time, bounds.output, bounds.concurrency),
            deterministic=manifest.deterministic,
            config=manifest.config if self.plugin.holds("config") else {},
            granted=(*self.granted, *PASSED_ON),
            precompiled=precompiled,
        )


class Runners:
    """All workers.

    `registry` is where service-registry listens, `sockets` the directory of the workers' sockets. `open_artifact`
    returns a descriptor of the artifact stored under a digest; `host` makes the function that answers a plugin's host
    calls; `failing` is awaited before the reply to the call that was one failure in a row too many.
    """

    def __init__(
        self,
        registry: str,
        sockets: Path,
        compiled: Compiled,
        open_artifact: Callable[[str], int],
        host: Callable[[Plugin], HostCalls],
        failing: Callable[[Plugin], Awaitable[None]],
        settings: PluginSettings,
    ) -> None:
        self._units = WorkerUnits(registry, settings.load_time)
        self._sockets = sockets
        self._compiled = compiled
        self._open_artifact = open_artifact
        self._host = host
        self._failing = failing
        self._settings = settings
        self._runners: dict[str, Runner] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # tasks that end workers, by plugin name

    async def probe(self, plugin: Plugin, artifact: int, *, upgrade: bool) -> tuple[Runner, frames.Ready]:
        """Have a worker load an artifact that is not in the store yet. Raises `BadRequest` if it cannot."""
        runner = Runner(plugin.name + (STAGED if upgrade else ""), plugin, self._settings.queue)
        try:
            ready = await self._connect(runner, artifact, NOBODY)
            if lacking := {"landlock", "seccomp"} - {item.partition("-")[0] for item in ready.sandbox}:
                missing = " and ".join(sorted(lacking))
                log.warning("plugin %s: its worker runs without %s, which this host lacks", plugin.name, missing)
            return runner, ready
        except BaseException as exc:
            try:
                error = await self._why_gone(runner, exc) if isinstance(exc, WorkerGone) else None
            finally:
                await self.discard(runner)
            if error:
                raise error from exc
            raise

    async def adopt(self, runner: Runner) -> None:
        """From now on, calls of the plugin go to the version that `runner` probed."""
        name = runner.plugin.name
        if runner.instance == name:
            self._runners[name] = runner
            return
        await self._retired(name)
        await self.discard(runner)

    async def discard(self, runner: Runner) -> None:
        """End a worker and its socket."""
        runner.close()
        await self._units.remove(runner.instance)

    async def remove(self, name: str) -> None:
        """The plugin was removed: let its running calls finish, then end its worker and its socket."""
        await self._retired(name)
        await self._units.remove(name)

    def retire(self, name: str) -> None:
        """End the plugin's worker once its running calls have finished; the next call gets another."""
        if runner := self._runners.pop(name, None):
            runner.retired = True
            self._end(name, self._hang_up(runner))

    def connected(self, name: str) -> bool:
        """Whether the plugin currently has a worker."""
        runner = self._runners.get(name)
        return runner is not None and runner.live is not None

    def waiting(self, name: str) -> int:
        """The number of running and waiting calls of the plugin."""
        runner = self._runners.get(name)
        return runner.places.taken if runner else 0

    async def watch_idle(self) -> None:
        """End workers without calls for `idle_worker` seconds; runs until cancelled."""
        while True:
            await asyncio.sleep(min(SWEEP, self._settings.idle_worker))
            limit = time.monotonic() - self._settings.idle_worker
            for name, runner in [*self._runners.items()]:
                if runner.worker and not runner.places.taken and runner.used < limit:
                    self.retire(name)

    async def close(self) -> None:
        """End all workers."""
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for runner in self._runners.values():
            runner.close()

    async def clean(self, names: set[str]) -> None:
        """Stop the sockets left behind by a manager that died: of staged versions, and of plugins not in `names`."""
        for path in self._sockets.glob("*.sock"):
            if path.stem not in names:
                log.info("stopping the worker of %s, which is not loaded", path.stem)
                await self._units.remove(path.stem)

    # calls

    async def call(
        self,
        plugin: Plugin,
        function: str,
        payload: str,
        uid: int | None = None,
        cause: Cause = NOBODY,
        renew: Callable[[], Awaitable[None]] | None = None,
    ) -> str:
        """Call a function with a text and return its reply; the queue is limited per `uid`.

        `renew` is awaited before a call that has waited, and raises an error if the caller may not call any more.
        Raises `PluginFailed`, `Timeout`, `Limit` according to the plugin's failure, `Limit` also if too many calls are
        waiting, `Superseded` if the caller has to check again whether the plugin may be called.
        """
        reply = await self._serve(plugin, frames.INVOKE, function, payload.encode(), cause, uid, renew)
        try:
            return reply.decode()
        except UnicodeDecodeError as exc:
            raise PluginFailed(f"the worker of {plugin.name} sent a reply that is not UTF-8 text") from exc

    async def event(self, plugin: Plugin, topic: str, payload: str, cause: Cause) -> None:
        """Deliver an event. Raises as `call` does, and `NotFound` if the plugin does not take events."""
        await self._serve(plugin, frames.EVENT, topic, payload.encode(), cause, None)

    async def _serve(
        self,
        plugin: Plugin,
        kind: int,
        name: str,
        payload: bytes,
        cause: Cause,
        uid: int | None,
        renew: Callable[[], Awaitable[None]] | None = None,
    ) -> bytes | bytearray:
        """Carry out a call or event when its turn comes, and update the plugin's record."""
        runner = self._of(plugin)
        runner.places.take(uid)
        try:
            waited = await runner.turns.begin(uid)
            try:
                if runner.retired or plugin.health.held_for(time.monotonic()):
                    raise Superseded
                if (worker := runner.live) is None:
                    worker, waited = await self._ready(runner, cause), True
                if renew and waited:
                    await renew()
                    if runner.retired or worker.lost:
                        raise Superseded
                began = time.monotonic()
                try:
                    reply = await worker.call(kind, name, payload, plugin.bounds.time, cause)
                except CircleError as error:
                    raise await self._blame(runner, worker, error, time.monotonic() - began) from error
                plugin.health.succeeded()
                runner.used = time.monotonic()
                return reply
            finally:
                runner.turns.end()
        finally:
            runner.places.leave(uid)
            # Whoever retired it may have waited for less time than its worker took to start.
            if runner.retired and not runner.places.taken:
                runner.finished.set()
                runner.close()

    def _of(self, plugin: Plugin) -> Runner:
        """The runner of this version with its current grants."""
        runner = self._runners.get(plugin.name)
        if runner is None or runner.plugin is not plugin or runner.granted is not plugin.granted:
            self.retire(plugin.name)
            runner = self._runners[plugin.name] = Runner(plugin.name, plugin, self._settings.queue)
        return runner

    async def _blame(self, runner: Runner, worker: Worker, error: CircleError, took: float) -> CircleError:
        """The error for the caller of a call that failed after so many seconds; the plugin's own fault is recorded."""
        plugin = runner.plugin
        runner.used = time.monotonic()
        if not is_fault(error):
            plugin.health.succeeded()
            return error
        # Of all the calls that ended with one worker, one counts.
        counts, worker.counted = not worker.counted, worker.lost
        step = ""
        if isinstance(error, WorkerGone):
            end = await self._how_it_ended(runner, error)
            error = cut_off(error, end, plugin.bounds, took)
            if end != End() and exceeded(end, plugin.bounds) is None:
                step = f"; {see_log(runner.instance)}"
        elif isinstance(error, Timeout) and worker.lost and counts:  # it did not even end itself
            await self._units.stop(runner.instance)
        if counts:
            await self._failed(plugin, error)
        return WorkerGone(f"{error}{step}") if step else error

    async def _failed(self, plugin: Plugin, error: CircleError) -> None:
        plugin.health.failed(str(error), time.monotonic(), time.time())
        if plugin.health.quarantine_due:
            await self._failing(plugin)

    # starting workers

    async def _ready(self, runner: Runner, cause: Cause) -> Worker:
        """The connected worker; started and loaded, because of `cause`, if there is none.

        Raises `Superseded` if it comes too late.
        """
        async with runner.connecting:
            if not runner.retired:  # otherwise this would wait for itself
                await self._left(runner.plugin.name)
            if not runner.retired and runner.live is None:
                artifact = self._open_artifact(runner.plugin.digest)
                try:
                    await self._connect(runner, artifact, cause)
                except (CircleError, asyncio.CancelledError) as exc:
                    if isinstance(exc, (NotStarted, Timeout, asyncio.CancelledError)):
                        # Otherwise it may keep every later connection waiting, and one that dies before it accepts
                        # would be restarted over and over for the abandoned connection, which its socket still holds.
                        self._end(runner.plugin.name, self._units.remove(runner.instance))
                    if isinstance(exc, (Unavailable, asyncio.CancelledError)):
                        raise
                    why = await self._why_gone(runner, exc) if isinstance(exc, WorkerGone) else PluginFailed(str(exc))
                    if isinstance(why, (PluginFailed, Timeout)):
                        await self._failed(runner.plugin, why)
                    raise why from exc
                finally:
                    os.close(artifact)
            if runner.retired:
                raise Superseded
            assert runner.worker is not None
            return runner.worker

    async def _connect(self, runner: Runner, artifact: int, cause: Cause) -> frames.Ready:
        """Have the worker load the plugin, with the existing compilation, or store the one that it makes."""
        manifest = runner.plugin.manifest
        with contextlib.ExitStack() as stack:
            descriptors, incoming = [artifact], None
            if manifest.plugin_type == "wasm":
                key = cache_key(runner.plugin.digest, deterministic=manifest.deterministic)
                cached = self._compiled.open(key)
                if cached is not None:
                    stack.callback(os.close, cached)
                    descriptors.append(cached)
                # A cached compilation that turns out not to fit is redone.
                incoming = self._compiled.incoming(key)
                stack.callback(incoming.discard)
            ready = await self._loaded(runner, descriptors, incoming, cause)
            if incoming is not None and incoming.complete:
                await incoming.keep()
                await asyncio.to_thread(self._compiled.sweep)
        return ready

    async def _loaded(
        self, runner: Runner, descriptors: list[int], incoming: Incoming | None, cause: Cause
    ) -> frames.Ready:
        """Connect to the worker, starting its socket if it does not listen, and have it load the passed files."""
        plugin = runner.plugin
        path = str(self._sockets / f"{runner.instance}.sock")
        timeout = self._settings.load_time
        if plugin.manifest.plugin_type == "native":  # its code may have blocked the signal that ends its worker
            timeout = min(timeout, NATIVE_START + hard_deadline(plugin.bounds.time))
        for attempt in ("listening", "started"):
            worker = Worker(plugin.name, self._host(plugin), plugin.bounds.concurrency, plugin.voice)
            try:
                load = runner.load_request(precompiled=len(descriptors) > 1)
                ready = await worker.load(path, load, descriptors, timeout, incoming, cause)
                break
            except (FileNotFoundError, ConnectionRefusedError) as exc:
                if attempt == "started":
                    raise Unavailable(f"the socket of the worker of {plugin.name} does not listen") from exc
                await self._units.listen(runner.instance)
            except OSError as exc:
                raise await self._units.held_back(runner.instance) or Unavailable(
                    f"cannot reach the worker of {plugin.name}: {exc.strerror or exc}"
                ) from exc
            except BaseException as exc:
                worker.abort()
                if isinstance(exc, Timeout) and not worker.heard:
                    why = f"the worker of {plugin.name} did not start within {timeout:g} s"
                    raise NotStarted(f"{why}; {see_log(runner.instance)}") from exc
                raise
        runner.worker = worker
        runner.used = time.monotonic()
        return ready

    # ending workers

    def _end(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """End a worker of the plugin with `work`; until that is done, the plugin gets no other."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _retired(self, name: str) -> None:
        """Retire the plugin's worker; wait until it and all others retired before have ended."""
        self.retire(name)
        await self._left(name)

    async def _left(self, name: str) -> None:
        """Wait until the plugin's earlier workers have ended, with their calls: they still use the unit."""
        if leaving := [task for task in self._tasks if task.get_name() == name]:
            await asyncio.wait(leaving)

    async def _hang_up(self, runner: Runner) -> None:
        """Close a runner's connection once its calls have finished, within a limited time: each may have had to wait
        for its instance, which may take as long as a call. Then make sure that the worker ends.
        """
        try:
            if runner.places.taken:
                async with asyncio.timeout(2 * (runner.plugin.bounds.time + GRACE)):
                    await runner.finished.wait()
        except TimeoutError:
            log.warning("plugin %s: its worker is ended although calls are still running", runner.plugin.name)
        finally:
            runner.close()
        if runner.worker:
            await self._units.see_off(runner.instance)

    async def _why_gone(self, runner: Runner, gone: WorkerGone) -> CircleError:
        """The error for a worker that ended before its plugin was loaded."""
        if held_back := await self._units.held_back(runner.instance):
            return held_back
        end = await self._how_it_ended(runner, gone)
        if limit := exceeded(end, runner.plugin.bounds):
            return type(limit)(f"{runner.plugin.name} cannot be loaded: {limit}")
        return PluginFailed(f"{gone}{end}; {see_log(runner.instance)}")

    async def _how_it_ended(self, runner: Runner, gone: WorkerGone) -> End:
        """How a worker ended by itself; unknown if it was disconnected."""
        return End() if isinstance(gone, BrokeProtocol) else await self._units.how_it_ended(runner.instance)
