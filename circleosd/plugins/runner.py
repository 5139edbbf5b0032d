"""One worker process per plugin: started on the first call through the registry, given up when idle, replaced when
broken.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from circleosd import upstream
from circleosd.config import PluginSettings
from circleosd.errors import CircleError, Limit, NotFound, PluginFailed, Timeout, Unavailable
from circleosd.plugins.manifest import Manifest
from circleosd.plugins.store import Loaded
from circleosd.plugins.workers import Worker, WorkerGone
from circleosd.worker import frames
from circleosd.worker.cachekey import cache_key

log = logging.getLogger(__name__)

STAGED = ".staged"  # what an upgrade's instance has behind the plugin's name, so that the old version goes on meanwhile
SWEEP = 2.0  # seconds between looks for idle workers


class Runner:
    """The worker of one version of one plugin; `instance` is the name of its unit, circleosd-plugin@INSTANCE."""

    def __init__(self, instance: str, manifest: Manifest, digest: str) -> None:
        self.instance = instance
        self.manifest = manifest
        self.digest = digest
        self.worker: Worker | None = None
        self.waiting = 0
        self.used = time.monotonic()
        self.connecting = asyncio.Lock()
        self.places = asyncio.Semaphore(manifest.limits.concurrency)


class Runners:
    """All workers. `registry` is where service-registry listens, `sockets` the directory of the workers' sockets.

    `open_artifact` gives a descriptor of what the store holds under a digest; `cache` keeps compilations.
    """

    def __init__(
        self,
        registry: str,
        sockets: Path,
        cache: Path,
        open_artifact: Callable[[str], int],
        settings: PluginSettings,
    ) -> None:
        self._registry = registry
        self._sockets = sockets
        self._cache = cache
        self._open_artifact = open_artifact
        self._settings = settings
        self._runners: dict[str, Runner] = {}
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def probe(
        self, manifest: Manifest, digest: str, artifact: int, *, upgrade: bool
    ) -> tuple[Runner, frames.Ready]:
        """Have a worker load an artifact that is not in the store yet. Raises `BadRequest` with the reason if it
        cannot.
        """
        runner = Runner(manifest.name + (STAGED if upgrade else ""), manifest, digest)
        try:
            return runner, await self._connect(runner, artifact)
        except BaseException:
            await self.discard(runner)
            raise

    async def adopt(self, name: str, runner: Runner) -> None:
        """From now on calls of `name` go to the version that `runner` probed."""
        if not runner.instance.endswith(STAGED):
            self._runners[name] = runner
            return
        if old := self._runners.pop(name, None):
            await self._hang_up(old)
        await self.discard(runner)

    async def discard(self, runner: Runner) -> None:
        """End a worker and its socket."""
        if runner.worker:
            runner.worker.close()
        await self._units("stop", runner.instance + ".socket", runner.instance)

    async def remove(self, name: str) -> None:
        """The plugin is gone: let its call in hand end, then end its worker."""
        runner = self._runners.pop(name, None)
        if runner:
            await self._hang_up(runner)
        await self._units("stop", name + ".socket", name)

    async def call(self, plugin: Loaded, function: str, payload: str) -> str:
        """Call a function with a text and return its reply.

        Raises `PluginFailed`, `Timeout`, `Limit` as the plugin's failure says, `Limit` too when too many calls wait.
        """
        name = plugin.manifest.name
        runner = self._runners.get(name)
        if runner is None or runner.digest != plugin.digest:
            runner = self._runners[name] = Runner(name, plugin.manifest, plugin.digest)
        if runner.waiting >= self._settings.queue:
            raise Limit(f"{runner.waiting} calls of {name} are waiting already (plugins.queue); try again later")
        runner.waiting += 1
        try:
            async with runner.places:
                worker = runner.worker
                if worker is None or worker.lost:
                    worker = await self._ready(runner)
                try:
                    reply = await worker.call(function, payload.encode(), plugin.manifest.limits.time)
                except Timeout:
                    if worker.lost:  # it did not even end itself
                        await self._units("stop", runner.instance)
                    raise
                except WorkerGone as exc:
                    raise PluginFailed(f"{exc}{await self._how_it_ended(runner.instance)}") from exc
                finally:
                    runner.used = time.monotonic()
                return reply.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise PluginFailed(f"{name} replied with what is not UTF-8 text") from exc
        finally:
            runner.waiting -= 1

    async def watch_idle(self) -> None:
        """End workers without calls for `idle_worker` seconds; runs until cancelled."""
        while True:
            await asyncio.sleep(min(SWEEP, self._settings.idle_worker))
            limit = time.monotonic() - self._settings.idle_worker
            for runner in self._runners.values():
                if runner.worker and not runner.waiting and runner.used < limit:
                    runner.worker.close()
                    runner.worker = None

    async def _ready(self, runner: Runner) -> Worker:
        """The connected worker; started and loaded if there is none."""
        async with runner.connecting:
            if runner.worker is None or runner.worker.lost:
                artifact = self._open_artifact(runner.digest)
                try:
                    await self._connect(runner, artifact)
                except WorkerGone as exc:
                    raise PluginFailed(f"{exc}{await self._how_it_ended(runner.instance)}") from exc
                finally:
                    os.close(artifact)
            assert runner.worker is not None
            return runner.worker

    async def _connect(self, runner: Runner, artifact: int) -> frames.Ready:
        manifest = runner.manifest
        path = self._sockets / f"{runner.instance}.sock"
        compiled = self._cache / cache_key(runner.digest)
        descriptors = [artifact]
        cached = _open_if_there(compiled) if manifest.plugin_type == "wasm" else None
        if cached is not None:
            descriptors.append(cached)
        limits = manifest.limits
        load = frames.Load(
            name=manifest.name,
            plugin_type=manifest.plugin_type,
            abi=manifest.abi,
            entry=manifest.entry if manifest.plugin_type == "native" else None,
            instance=manifest.instance,
            limits=frames.Limits(limits.memory, limits.time, limits.output, limits.concurrency),
            deterministic=manifest.deterministic,
            config=manifest.config,
            granted=(),
            precompiled=cached is not None,
        )
        try:
            for attempt in ("listening", "started"):
                worker = Worker(manifest.name, _no_capability)
                try:
                    ready = await worker.load(path, load, descriptors, self._settings.load_time)
                    break
                except (FileNotFoundError, ConnectionRefusedError) as exc:
                    if attempt == "started":
                        raise Unavailable(f"the socket of the worker of {manifest.name} does not listen") from exc
                    await self._units("start", runner.instance + ".socket")
                except OSError as exc:
                    raise Unavailable(f"cannot reach the worker of {manifest.name}: {exc.strerror or exc}") from exc
        finally:
            if cached is not None:
                os.close(cached)
        runner.worker = worker
        runner.used = time.monotonic()
        if worker.compiled is not None:
            await asyncio.to_thread(_store_whole, compiled, worker.compiled)
            worker.compiled = None
        return ready

    async def _hang_up(self, runner: Runner) -> None:
        """Close a runner's connection once its calls have ended, for a bounded time."""
        deadline = time.monotonic() + runner.manifest.limits.time
        while runner.waiting and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        if runner.worker:
            runner.worker.close()

    async def _units(self, action: str, *instances: str) -> None:
        """Start or stop units of workers through the registry."""
        for instance in instances:
            try:
                await self._ask({"action": action, "name": f"plugin@{instance}"})
            except NotFound:
                continue  # never started, or gone already: stopping has nothing to do

    async def _how_it_ended(self, instance: str) -> str:
        """What the service manager knows of a worker's end, as the end of a sentence."""
        for _ in range(20):
            try:
                state: dict[str, Any] = await self._ask({"action": "status", "name": f"plugin@{instance}"})
            except CircleError:
                return ""
            if state["state"] != "active":
                break
            await asyncio.sleep(0.02)  # the connection breaks a moment before the process is reaped
        if state["result"] == "signal" and state["exit_status"]:
            return f" by the signal {signal.Signals(state['exit_status']).name}"
        return f" with exit status {state['exit_status']}" if state["exit_status"] else ""

    async def _ask(self, request: dict[str, Any]) -> Any:
        return await upstream.ask(self._registry, request, timeout=self._settings.load_time)


async def _no_capability(call: str, args: dict[str, str]) -> bytes:
    return frames.host_error_body("denied", f"this plugin has not been granted {call.partition('.')[0]}")


def _open_if_there(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _store_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all. A cache that cannot be written costs time, nothing else."""
    fd, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except OSError as exc:
        log.warning("cannot keep a compilation: %s", exc)
        os.unlink(name)
