"""Whether a plugin is trusted enough to be loaded: what its signature is worth by the host's policy (plugins.trust)."""

from __future__ import annotations

from typing import NamedTuple

from circleosd.config import TrustPolicy
from circleosd.errors import Denied
from circleosd.plugins.manifest import Manifest
from circleosd.plugins.signatures import SIGNERS, Signatures, UnknownSigner
from circleosd.plugins.store import Loaded


class Trust(NamedTuple):
    """The basis of a load: the trusted signer, or the warning for the caller."""

    signer: str | None
    key: str | None
    warning: str | None


class Trusting:
    """Judges plugins by their signatures and the policy."""

    def __init__(self, signatures: Signatures, policy: TrustPolicy) -> None:
        self._signatures = signatures
        self._policy = policy

    async def judge(
        self, manifest: Manifest, content: bytes, signature: bytes | None, *, explicit: bool, before: Loaded | None
    ) -> Trust:
        """Decide whether a plugin may be loaded; `content` is its manifest as signed, `before` the loaded version.

        `explicit`: the caller explicitly trusts it. Raises `Denied` with the reason.
        """
        trust = await self._of_signature(content, signature, native=manifest.plugin_type == "native", explicit=explicit)
        if before and before.signer and not trust.signer and not explicit and self._policy != "off":
            raise Denied(
                f"the loaded version {before.manifest.version} is signed by {before.signer}, but this one is not: "
                f"{trust.warning}; load it with --trust if that is intended"
            )
        return trust

    async def _of_signature(self, content: bytes, signature: bytes | None, *, native: bool, explicit: bool) -> Trust:
        if self._policy == "off" and not native:
            return Trust(None, None, None)
        if signature is None:
            return self._unsigned("it is not signed", None, native=native, explicit=explicit)
        try:
            signer = await self._signatures.verify(content, signature)
        except UnknownSigner as error:
            if not explicit or self._policy == "require":
                raise
            return Trust(None, None, f"loaded on trust: {error}")
        if signer.principal is None:
            why = f"it is signed with the key {signer.key}, but this host trusts no signers yet ({SIGNERS})"
            return self._unsigned(why, signer.key, native=native, explicit=explicit)
        return Trust(signer.principal, signer.key, None)

    def _unsigned(self, why: str, key: str | None, *, native: bool, explicit: bool) -> Trust:
        if self._policy == "require":
            raise Denied(
                f"this host loads only plugins from trusted signers (plugins.trust = require): {why}; "
                f"have it signed by a signer in {SIGNERS}"
            )
        if native and not explicit:
            raise Denied(
                f"{why}, and native code is not confined by WebAssembly; "
                "load it with --trust if you trust its author, or have it signed"
            )
        return Trust(None, key, f"loaded on trust: {why}" if explicit else why)
