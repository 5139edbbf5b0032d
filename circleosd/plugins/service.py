"""The actions of plugin-manager."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import time
from collections.abc import Sequence
from pathlib import Path

from circleosd.api.contract import quoted
from circleosd.api.plugins import Invoke, ListPlugins, Load, Plugin, Unload
from circleosd.config import PluginSettings
from circleosd.database import Database, Transaction
from circleosd.errors import BadRequest, Denied, NotFound
from circleosd.plugins import manifest as manifests
from circleosd.plugins import store
from circleosd.plugins.manifest import Manifest
from circleosd.plugins.runner import Runners
from circleosd.plugins.store import Artifacts, Loaded, Staged
from circleosd.service import Act, Handlers


class PluginService(Handlers):
    """Loads, lists, invokes and unloads."""

    def __init__(self, database: Database, artifacts: Artifacts, runners: Runners, settings: PluginSettings) -> None:
        self._database = database
        self._artifacts = artifacts
        self._runners = runners
        self._settings = settings
        self._plugins: dict[str, Loaded] = {}
        self._changing = asyncio.Lock()  # one load or unload at a time; calls go on meanwhile

    async def start(self) -> None:
        """Read what is loaded, and clear away what an interrupted load left."""
        self._plugins = {item.manifest.name: item for item in await self._database.read(store.plugins)}
        await asyncio.to_thread(self._artifacts.sweep, {item.digest for item in self._plugins.values()})

    def _find(self, name: str) -> Loaded:
        plugin = self._plugins.get(name)
        if plugin is None:
            raise NotFound(f"no plugin {name} is loaded; see: circlectl plugin list")
        return plugin

    async def load(self, request: Load, act: Act) -> Plugin:
        """Handler of `load`."""
        with contextlib.ExitStack() as open_files:
            passed: dict[str, int] = {}
            for name in request.files:
                passed[name] = act.files.take()
                open_files.callback(os.close, passed[name])
                _require_file(passed[name], name)
            directory = f"/proc/{act.caller.peer.pid}/cwd"
            given = await asyncio.to_thread(self._manifest_source, request, passed, directory)
            source = passed.get("path")
            if source is None:
                source = _open(request.path, directory)
                open_files.callback(os.close, source)
            async with self._changing:
                staged = await asyncio.to_thread(self._artifacts.stage, source, self._settings.max_artifact)
                try:
                    manifest = (
                        manifests.parse(given) if given is not None else manifests.derive(request.path, staged.head)
                    )
                    act.object = manifest.name
                    return await self._load(request, manifest, staged, act)
                finally:
                    staged.path.unlink(missing_ok=True)

    async def _load(self, request: Load, manifest: Manifest, staged: Staged, act: Act) -> Plugin:
        manifests.check(manifest, staged.head, self._settings)
        if manifest.sha256 not in (None, staged.digest):
            raise BadRequest(f"the artifact's sha256 is {staged.digest}, the manifest names {manifest.sha256}")
        if manifest.plugin_type == "native" and not request.trust:
            raise Denied(
                "native code is not confined by WebAssembly; load it with trust (--trust) if you trust its author"
            )
        before = self._plugins.get(manifest.name)
        fd = os.open(staged.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            runner, ready = await self._runners.probe(manifest, staged.digest, fd, upgrade=before is not None)
        finally:
            os.close(fd)
        loaded = Loaded(
            manifest=manifest,
            digest=staged.digest,
            abi=ready.abi,
            functions=tuple(ready.functions),
            description=manifest.description or ready.description or "",
            loaded=time.time(),
        )

        def work(tx: Transaction) -> None:
            store.put(tx, loaded)
            act.commit(tx, before=_brief(before), after=_brief(loaded))

        try:
            await asyncio.to_thread(self._artifacts.keep, staged)
            await self._database.write(work)
        except BaseException:
            await self._runners.discard(runner)
            raise
        self._plugins[manifest.name] = loaded
        await self._runners.adopt(manifest.name, runner)
        await self._sweep()
        return _shown(loaded)

    def _manifest_source(
        self, request: Load, passed: dict[str, int], directory: str
    ) -> bytes | dict[str, object] | None:
        """The manifest as it was given: passed, inline, named, or beside the artifact; None when there is none."""
        if "manifest" in passed:
            return _read(passed["manifest"], "the manifest")
        if isinstance(request.manifest, dict):
            return request.manifest
        path = request.manifest
        if path is None:
            if "path" in passed:
                return None
            path = str(Path(request.path).with_suffix(".json"))
            if not os.path.exists(os.path.join(directory, path)):
                return None
        fd = _open(path, directory)
        try:
            return _read(fd, path)
        finally:
            os.close(fd)

    async def _sweep(self) -> None:
        await asyncio.to_thread(self._artifacts.sweep, {item.digest for item in self._plugins.values()})

    async def list(self, request: ListPlugins, act: Act) -> Sequence[Plugin]:
        """Handler of `list`."""
        return [_shown(plugin) for _, plugin in sorted(self._plugins.items())]

    async def invoke(self, request: Invoke, act: Act) -> str:
        """Handler of `invoke`."""
        plugin = self._find(request.id)
        if request.func not in plugin.functions:
            raise NotFound(f"{request.id} has no function {request.func[:64]!r}; it has: {', '.join(plugin.functions)}")
        return await self._runners.call(plugin, request.func, request.payload)

    async def unload(self, request: Unload, act: Act) -> Plugin:
        """Handler of `unload`."""
        async with self._changing:
            plugin = self._find(request.id)

            def work(tx: Transaction) -> None:
                store.delete(tx, request.id)
                act.commit(tx, before=_brief(plugin))

            await self._database.write(work)
            del self._plugins[request.id]
            await self._runners.remove(request.id)
            await self._sweep()
            return _shown(plugin)


def _shown(plugin: Loaded) -> Plugin:
    manifest = plugin.manifest
    return Plugin(
        id=manifest.name,
        version=manifest.version,
        plugin_type=manifest.plugin_type,
        abi=plugin.abi,
        functions=[*plugin.functions],
        capabilities=[item.name for item in manifest.capabilities],
        description=plugin.description,
        digest=plugin.digest,
        loaded=plugin.loaded,
    )


def _brief(plugin: Loaded | None) -> dict[str, str] | None:
    return {"version": plugin.manifest.version, "digest": plugin.digest} if plugin else None


def _open(path: str, directory: str) -> int:
    """Open a file that the request names; a relative path starts at `directory`. Raises `NotFound`, `BadRequest`.

    The service opens it with its own rights; a client that can read a file which the service cannot passes a
    descriptor.
    """
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its writer.
        fd = os.open(os.path.join(directory, path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(f"no file {path}") from None
    except (OSError, ValueError) as exc:
        raise BadRequest(f"cannot open {quoted(path)}: {getattr(exc, 'strerror', None) or exc}") from exc
    try:
        _require_file(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _require_file(fd: int, what: str) -> None:
    """Raises `BadRequest` for a directory, a pipe or a device, whose reading might never end."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise BadRequest(f"cannot read {quoted(what)}: it is not a regular file")


def _read(fd: int, what: str) -> bytes:
    """The content of a small file."""
    content = b""
    try:
        while len(content) <= manifests.MAX_MANIFEST and (chunk := os.read(fd, manifests.MAX_MANIFEST)):
            content += chunk
    except OSError as exc:
        raise BadRequest(f"cannot read {what}: {exc.strerror}") from exc
    if len(content) > manifests.MAX_MANIFEST:
        raise BadRequest(f"{what} is larger than {manifests.MAX_MANIFEST} bytes")
    return content
