"""Signing a plugin: completes its manifest and lets ssh-keygen sign it; the private key never leaves its owner."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from typing import Annotated, Any, BinaryIO, TypedDict

from circlectl.asking import Asking
from circlectl.replacing import replace
from circleosd.api.contract import Doc, Mark, Request, contract
from circleosd.api.plugins import ELF, NAMESPACE, WASM, once
from circleosd.errors import BadRequest, CircleError, NotFound, Unavailable
from circleosd.policy import Access

PIECE = 1 << 20


class Signed(TypedDict):
    """The files written, and the artifact's sha256 in hex and size in bytes, as now stated in the manifest."""

    manifest: str
    signature: str
    digest: str
    size: int


@contract
class Sign(Request, action="sign", access=Access.ANYONE, reply=Signed):
    """Write the artifact's sha256 and size into a plugin's manifest, and sign that with an SSH key."""

    path: Annotated[str, Doc("the artifact, .wasm or .so")]
    key: Annotated[str, Doc("the SSH key to sign with, or its public key if an agent holds the private key"),
                   Mark.OPTION]  # fmt: skip
    manifest: Annotated[str | None, Doc("its manifest; default: the .json file next to the artifact"), Mark.OPTION] = (
        None
    )


CONTRACTS: tuple[type[Request], ...] = (Sign,)


def sign(ask: Asking, request: dict[str, Any]) -> tuple[Any, CircleError | None]:
    """Write the manifest and its signature. Uses no service."""
    if "key" not in request:
        raise BadRequest("plugin sign needs --key, the SSH key to sign with")
    path = request["path"]
    where = request.get("manifest") or os.path.splitext(path)[0] + ".json"
    digest, size, head = _measure(path)
    manifest = _manifest(where)
    content = (json.dumps(manifest | {"sha256": digest, "size": size}, ensure_ascii=False, indent=2) + "\n").encode()
    _require_loadable(content, head)
    signature = _signature(content, request["key"])
    _write(os.path.realpath(where), content)  # a link is kept, and its target is a manifest
    _write(f"{where}.sig", signature)
    return Signed(manifest=where, signature=f"{where}.sig", digest=digest, size=size), None


def _manifest(path: str) -> dict[str, Any]:
    try:
        with _opened(path) as file:
            manifest = json.load(file, object_pairs_hook=once)
        json.dumps(manifest, ensure_ascii=False, allow_nan=False).encode()
    except FileNotFoundError:
        raise NotFound(f"cannot sign without a manifest: no such file: {path}; it needs at least a name") from None
    except (OSError, ValueError, RecursionError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else exc
        raise BadRequest(f"cannot read the manifest {path}: {why}") from exc
    if not isinstance(manifest, dict):
        raise BadRequest(f"the manifest {path} is not a JSON object")
    return manifest


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """A regular file, as plugin-manager requires. Never waits, as for a pipe. Raises OSError, `BadRequest`."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise BadRequest(f"{path} is not a regular file")
        yield file


def _require_loadable(content: bytes, head: bytes) -> None:
    """Refuse a manifest that no plugin manager would load, using the plugin manager's own code. Raises `BadRequest`."""
    from circleosd.plugins import manifest as manifests  # as expensive as starting a service, but only signing needs it

    if len(content) > manifests.MAX_MANIFEST:
        raise BadRequest(f"the completed manifest is larger than {manifests.MAX_MANIFEST} bytes")
    manifests.check_kind(manifests.parse(content), head)


def _measure(path: str) -> tuple[str, int, bytes]:
    """The sha256 of an artifact, its size and its first bytes."""
    import hashlib

    digest, size, head = hashlib.sha256(), 0, b""
    try:
        with _opened(path) as file:
            while piece := file.read(PIECE):
                head = head or piece[:16]
                if not head.startswith((WASM, ELF)):
                    raise BadRequest(f"{path} is not a plugin: neither WebAssembly nor a shared object (ELF)")
                digest.update(piece)
                size += len(piece)
    except FileNotFoundError:
        raise NotFound(f"no such file: {path}") from None
    except OSError as exc:
        raise BadRequest(f"cannot read {path}: {exc.strerror}") from exc
    return digest.hexdigest(), size, head


def _signature(content: bytes, key: str) -> bytes:
    """The signature of `content` made by ssh-keygen, which prompts for a passphrase on the terminal itself."""
    import subprocess

    if not os.path.exists(key):
        raise NotFound(f"no such key: {key}")
    try:
        done = subprocess.run(
            ["ssh-keygen", "-Y", "sign", "-f", key, "-n", NAMESPACE], input=content, capture_output=True, check=False
        )
    except OSError as exc:
        raise Unavailable(f"cannot run ssh-keygen to sign: {exc.strerror}; install the OpenSSH client") from exc
    if done.returncode or not done.stdout.startswith(b"-----BEGIN SSH SIGNATURE-----"):
        lines = (line.strip(" @\r") for line in done.stderr.decode("utf-8", "replace").split("\n"))
        reason = "; ".join(filter(None, lines))
        raise BadRequest(f"cannot sign with {key}: {reason or 'ssh-keygen gave no reason'}")
    return done.stdout


def _write(path: str, content: bytes) -> None:
    """Replace a file by a new one with the same mode, and a link itself, which the plugin's author may have made."""
    try:
        kept = os.path.isfile(path) and not os.path.islink(path)
        replace(path, content, stat.S_IMODE(os.stat(path).st_mode) if kept else None)
    except OSError as exc:
        raise BadRequest(f"cannot write {path}: {exc.strerror}") from exc


COMMANDS = {"sign": sign}
