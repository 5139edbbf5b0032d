"""From the files of a request to a plugin that may be loaded: reads them and compares them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import PurePath
from typing import Any, NamedTuple

from circleosd.api.plugins import Load, Verified, Verify
from circleosd.config import PluginSettings
from circleosd.errors import BadRequest, Denied
from circleosd.fair import Fair
from circleosd.places import Places
from circleosd.plugins import capabilities
from circleosd.plugins import manifest as manifests
from circleosd.plugins.artifacts import Artifacts, Staged
from circleosd.plugins.files import Given
from circleosd.plugins.manifest import MAX_MANIFEST, Manifest
from circleosd.plugins.signatures import MAX_SIGNATURE, MAX_SIGNERS, Signatures
from circleosd.plugins.store import Loaded
from circleosd.plugins.trust import Trust
from circleosd.worker.frames import Ready

VERIFIED_AT_ONCE = 2  # plugins, for all who only ask
VERIFICATIONS = 128  # being verified or waiting, in total and per uid
VERIFICATIONS_OF_ONE = 16


class Candidate(NamedTuple):
    """A plugin to be loaded. `content` is the manifest as signed; None if it has no file."""

    manifest: Manifest
    staged: Staged
    content: bytes | None
    signature: bytes | None


class Loading:
    """Reads candidates, and verifies the signatures of those that are not to be loaded."""

    def __init__(self, artifacts: Artifacts, signatures: Signatures, settings: PluginSettings) -> None:
        self._artifacts = artifacts
        self._signatures = signatures
        self._settings = settings
        # Each has a copy of its artifact on disk. Loads come one at a time and do not wait for these.
        self._verifying = Fair(VERIFIED_AT_ONCE)
        self._verifications = Places("verifications", VERIFICATIONS, VERIFICATIONS_OF_ONE)

    @asynccontextmanager
    async def candidate(self, files: Given, request: Load | Verify) -> AsyncIterator[Candidate]:
        """Copy the artifact, and read its manifest and signature; the copy is removed in the end.

        Raises `NotFound`, `BadRequest`, `Limit` for files that cannot be read or do not match.
        """
        given, signature = await asyncio.to_thread(_texts, files, request)
        staging = asyncio.create_task(asyncio.to_thread(self._stage, files, request.path))
        try:
            staged = await asyncio.shield(staging)
        except asyncio.CancelledError:
            staging.add_done_callback(self._discard)  # the thread continues
            raise
        try:
            manifest = manifests.parse(given) if given is not None else manifests.derive(request.path, staged.head)
            manifests.check(manifest, staged.head, self._settings)
            _require_match(manifest, staged, signed=signature is not None)
            yield Candidate(manifest, staged, given if isinstance(given, bytes) else None, signature)
        finally:
            self._artifacts.discard(staged)

    def _discard(self, staging: asyncio.Task[Staged]) -> None:
        if not staging.cancelled() and not staging.exception():
            self._artifacts.discard(staging.result())

    def _stage(self, files: Given, path: str) -> Staged:
        """Copy the artifact in a thread, which may outlive the request and therefore owns the descriptor."""
        source = files.open("path", path)
        try:
            return self._artifacts.stage(source, self._settings.max_artifact)
        finally:
            os.close(source)

    async def verify(self, files: Given, request: Verify, uid: int | None) -> Verified:
        """The reply to `plugin verify`; limited per `uid`. Raises `Limit`, `Denied`, and as `candidate` does."""
        with self._verifications.held(uid):
            async with self._verifying.turn(uid):
                return await self._verify(files, request)

    async def _verify(self, files: Given, request: Verify) -> Verified:
        signers = None
        if request.signers is not None:
            signers = await asyncio.to_thread(files.read, "signers", request.signers, MAX_SIGNERS)
        async with self.candidate(files, request) as candidate:
            if candidate.content is None or candidate.signature is None:
                raise Denied(f"{PurePath(request.path).name} is not signed; see: circlectl plugin sign --help")
            signer = await self._signatures.verify(candidate.content, candidate.signature, signers)
            if signer.principal is None:
                raise Denied(
                    f"it is signed with the key {signer.key}, but this host trusts no signers yet; "
                    "add it with its owner to trusted-signers"
                )
            manifest = candidate.manifest
            return Verified(
                name=manifest.name,
                version=manifest.version,
                signer=signer.principal,
                key=signer.key,
                digest=candidate.staged.digest,
                size=candidate.staged.size,
                capabilities=[{"name": item.name, "reason": item.reason, "granted": False}
                              for item in manifest.capabilities],
            )  # fmt: skip


def _texts(files: Given, request: Load | Verify) -> tuple[bytes | dict[str, Any] | None, bytes | None]:
    """The manifest as given, as bytes if it is a file, and its signature."""
    if isinstance(request.manifest, dict):
        return request.manifest, None
    if request.manifest is not None:
        name = request.manifest
        content: bytes | None = files.read("manifest", name, MAX_MANIFEST)
    else:
        name = os.path.splitext(request.path)[0] + ".json"
        content = files.beside("manifest", name, MAX_MANIFEST)
    if content is None:
        return None, None
    if request.signature is not None:
        return content, files.read("signature", request.signature, MAX_SIGNATURE)
    return content, files.beside("signature", name + ".sig", MAX_SIGNATURE)


def _require_match(manifest: Manifest, staged: Staged, *, signed: bool) -> None:
    """Raises `BadRequest` unless the manifest matches the artifact; a signed one must have its digest and size."""
    if signed and (manifest.sha256 is None or manifest.size is None):
        raise BadRequest(
            "the manifest is signed but lacks the artifact's sha256 and size, so the signature does not cover it; "
            "sign it with: circlectl plugin sign"
        )
    if manifest.size is not None and manifest.size != staged.size:
        raise BadRequest(
            f"the artifact does not match the manifest: it has {staged.size} bytes, the manifest says {manifest.size}"
        )
    if manifest.sha256 is not None and manifest.sha256 != staged.digest:
        raise BadRequest(
            f"the artifact does not match the manifest: its sha256 is {staged.digest}, "
            f"the manifest says {manifest.sha256}"
        )


def as_loaded(candidate: Candidate, ready: Ready, trust: Trust) -> Loaded:
    """The stored form of a candidate that a worker is ready to run."""
    import hashlib  # see chain.linked

    manifest = candidate.manifest
    content = manifests.dump(manifest).encode() if candidate.content is None else candidate.content
    return Loaded(
        manifest=manifest,
        digest=candidate.staged.digest,
        abi=ready.abi,
        functions=tuple(ready.functions),
        imports=tuple(ready.imports),
        description=manifest.description or ready.description or "",
        loaded=time.time(),
        signer=trust.signer,
        key=trust.key,
        manifest_digest=hashlib.sha256(content).hexdigest(),
    )


def to_grant(manifest: Manifest, wanted: str | list[str]) -> dict[str, bool]:
    """The capabilities that a load grants. Raises `BadRequest` for one that the plugin does not request."""
    names = capabilities.split(wanted if isinstance(wanted, str) else ",".join(wanted))
    if capabilities.ALL in names:
        names = (*manifest.asked, *(name for name in names if name != capabilities.ALL))
    for name in names:
        require_asked(manifest, name)
    return dict.fromkeys(names, True)


def require_asked(manifest: Manifest, capability: str) -> None:
    """Raises `BadRequest` unless the plugin requests a capability."""
    if not capabilities.is_covered(capability, manifest.asked):
        asked = ", ".join(manifest.asked) or "nothing"
        raise BadRequest(f"{manifest.name} does not ask for {capability}; it asks for: {asked}")


def require_granted_growth(before: Manifest, manifest: Manifest, granted: Iterable[str]) -> None:
    """Raises `Denied` if an upgrade requests more than the previous version, and that is not granted."""
    granted = tuple(granted)
    missing = [
        item
        for item in manifest.capabilities
        if not capabilities.is_covered(item.name, before.asked) and not capabilities.holds(granted, item.name)
    ]
    if missing:
        listed = ", ".join(f"{item.name} ({item.reason or 'no reason given'})" for item in missing)
        names = ",".join(item.name for item in missing)
        raise Denied(
            f"{manifest.name} {manifest.version} asks for more than {before.version}: {listed}; "
            f"to allow it, load it with --grant {names}"
        )
