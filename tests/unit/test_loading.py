"""From the files of a request to a plugin that may be loaded."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from circleosd.api.plugins import Load, Verify
from circleosd.config import PluginSettings
from circleosd.plugins.files import Given
from circleosd.plugins.loading import VERIFIED_AT_ONCE, Loading
from circleosd.plugins.signatures import Signatures, Signer
from circleosd.plugins.store import Artifacts
from circleosd.wire import encode

WASM = b"\0asm\1\0\0\0"


class Waiting(Signatures):
    """Signatures that nobody has verified yet."""

    def __init__(self) -> None:
        super().__init__([], "warn", {})
        self.asked = 0

    async def verify(self, manifest: bytes, signature: bytes, signers: bytes | None = None) -> Signer:
        self.asked += 1
        await asyncio.Event().wait()
        raise AssertionError("nobody does")


def test_of_verifications_at_once_few_have_a_copy_and_a_load_does_not_wait_for_them(tmp_path: Path) -> None:
    plugin = tmp_path / "plugin.wasm"
    plugin.write_bytes(WASM)
    digest = "93a44bbb96c751218e4c00d479e4c14358122a389acca16205b1e4d0dc5f9476"
    plugin.with_suffix(".json").write_bytes(encode({"name": "plugin", "sha256": digest, "size": len(WASM)}))
    (tmp_path / "plugin.json.sig").write_bytes(b"-")
    store, files, nobody = tmp_path / "store", Given({}, os.getpid()), Waiting()
    loading = Loading(Artifacts(store), nobody, PluginSettings())

    async def scenario() -> int:
        async with asyncio.timeout(10):
            asking = [asyncio.create_task(loading.verify(files, Verify(str(plugin)))) for _ in range(20)]
            while nobody.asked < VERIFIED_AT_ONCE:
                await asyncio.sleep(0.01)
            async with loading.candidate(files, Load(str(plugin))):
                copies = len([*store.iterdir()])
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            return copies

    assert asyncio.run(scenario()) == VERIFIED_AT_ONCE + 1
    assert not [*store.iterdir()]
