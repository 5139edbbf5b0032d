"""Signatures of manifests: OpenSSH's, made and checked by `ssh-keygen -Y` (ssh-keygen(1), PROTOCOL.sshsig).

The signed data are the bytes of the manifest, in the namespace `circleosd-plugin`; the manifest contains the sha256 and
the size of the artifact. `trusted-signers` in the configuration directory is an ALLOWED SIGNERS file, `revoked-signers`
a list of public keys or a KRL. Nothing here computes or parses a signature.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from circleosd.api.plugins import NAMESPACE
from circleosd.errors import Denied, Timeout, Unavailable, unreadable
from circleosd.paths import Check, anybody

SIGNERS = "trusted-signers"
REVOKED = "revoked-signers"

MAX_SIGNATURE = 16 * 1024  # bytes; one of the largest RSA keys with a certificate has 10 KiB
MAX_SIGNERS = 256 * 1024
MAX_SAID = 64 * 1024  # bytes of ssh-keygen's output that are looked at
SECONDS = 10.0  # for one signature; a run of ssh-keygen takes some 10 ms
MAX_LINES = 16  # lines of trusted-signers that are tried for one key; each takes two runs


class UnknownSigner(Denied):
    """The signature is intact, but not by a trusted signer: whoever loads the plugin may know them better."""


class _OtherPurpose(UnknownSigner):
    """The line of trusted-signers with the key is for other namespaces."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


class Signer(NamedTuple):
    """The signer: `principal` as named in trusted-signers, `key` the kind and fingerprint of the key.

    `principal` is None if there is no trusted-signers file.
    """

    principal: str | None
    key: str


class _Ran(NamedTuple):
    status: int
    out: str
    err: str


class Signatures:
    """Verifies signatures, by the last trusted-signers and revoked-signers in `directories`.

    `may_write` raises `Denied` for files and directories of somebody who must not decide on signers.
    """

    def __init__(self, directories: Sequence[Path], environment: Mapping[str, str], may_write: Check = anybody) -> None:
        self._directories = directories
        self._may_write = may_write
        self._environment = {name: environment[name] for name in ("PATH", "TZ", "HOME") if name in environment} | {
            "LC_ALL": "C"
        }

    async def verify(self, manifest: bytes, signature: bytes, signers: bytes | None = None) -> Signer:
        """The signer of `manifest`. `signers` replaces the host's trusted-signers.

        Raises `Denied`, `Unavailable` if ssh-keygen or a list of keys cannot be used, `Timeout`.
        """
        try:
            async with asyncio.timeout(SECONDS):
                with contextlib.ExitStack() as files:
                    armored = files.enter_context(_in_memory(signature))
                    given = self._found(SIGNERS) if signers is None else files.enter_context(_in_memory(signers))
                    trusted = given and files.enter_context(_unmarked(given))
                    key = await self._whole(manifest, armored)
                    await self._not_revoked(manifest, armored, key)
                    if trusted is None:
                        return Signer(None, key)
                    return Signer(await self._trusted(manifest, armored, trusted, key), key)
        except TimeoutError as exc:
            raise Timeout(f"ssh-keygen did not answer within {SECONDS:g} s") from exc

    async def _trusted(self, manifest: bytes, signature: str, trusted: str, key: str) -> str:
        """The principal for a key that trusted-signers trusts for plugins."""
        refusal: UnknownSigner | None = None
        with contextlib.ExitStack() as file:
            for _ in range(MAX_LINES):
                try:
                    principal = await self._principal(signature, trusted, key)
                    await self._valid(manifest, signature, trusted, principal, key)
                except _OtherPurpose as error:
                    # ssh-keygen names the principal of the first line with the key, whatever that line is for.
                    refusal = refusal or error
                    rest = b"".join(Path(trusted).read_bytes().splitlines(keepends=True)[error.line :])
                    file.close()
                    trusted = file.enter_context(_in_memory(rest))
                except UnknownSigner as error:
                    raise refusal or error from None
                else:
                    return principal
        raise UnknownSigner(
            f"{SIGNERS} has {MAX_LINES} lines with the key {key} that do not allow {NAMESPACE}; "
            "move the line that does before them",
        )

    async def _whole(self, manifest: bytes, signature: str) -> str:
        """The key that signed the manifest, no matter whose it is."""
        ran = await self._run(["-Y", "check-novalidate", "-n", NAMESPACE, "-s", signature], manifest)
        if ran.status == 0 and (good := re.search(r"\bwith (\S+) key (\S+)", ran.out)):
            return f"{good[1]} {good[2]}"
        if "namespace" in ran.err:
            raise Denied(
                f"the signature was made for another purpose: its namespace is not {NAMESPACE}; "
                "sign it with: circlectl plugin sign",
            )
        if "incorrect signature" in ran.err:
            raise Denied(
                "the signature does not match the manifest: one of them was changed after signing; "
                "get both from the author again",
            )
        raise Denied(f"the signature cannot be read: {_last_line(ran.err)}; get it again")

    async def _not_revoked(self, manifest: bytes, signature: str, key: str) -> None:
        """Raises `Denied` for a revoked key, trusted or not, `Unavailable` if revoked-signers cannot be read."""
        revoked = self._found(REVOKED)
        if revoked is None:
            return
        # Only its debug output distinguishes a revoked key from an unknown one.
        nobody = ["-Y", "verify", "-f", os.devnull, "-I", "nobody", "-n", NAMESPACE, "-s", signature]
        ran = await self._run(["-vvv", *nobody, "-r", revoked], manifest)
        reason = re.search(r"sshkey_check_revoked: (.*)", ran.err)
        if reason and "revoked" in reason[1]:
            raise Denied(f"the signer's key {key} is revoked; do not use what it signed")
        if reason:
            raise _unreadable(revoked, reason[1].strip())

    async def _principal(self, signature: str, trusted: str, key: str) -> str:
        """The principal in trusted-signers for the key of the signature."""
        ran = await self._run(["-Y", "find-principals", "-s", signature, "-f", trusted], b"")
        if ran.status == 0 and ran.out.strip():
            # A pattern that starts with ! says whose key it is not (PATTERNS, ssh_config(5)).
            patterns = (pattern.strip() for pattern in re.split("[,\n]", ran.out.strip()))
            if named := next((pattern for pattern in patterns if not pattern.startswith("!")), None):
                return named
        if reason := re.search(r"key has expired.*valid-before (\S+)", ran.err):
            raise UnknownSigner(f"the signer's key {key} was valid only until {reason[1]}; have it signed again")
        if reason := re.search(r"key is not yet valid.*valid-after (\S+)", ran.err):
            raise UnknownSigner(
                f"the signer's key {key} is not valid until {reason[1]}; wait, or have it signed again",
            )
        if reason := re.search(r'Unable to (?:open|read) allowed keys file ".*": (.*)', ran.err):
            raise _unreadable(trusted, reason[1].strip())
        if "-CERT " in key:  # ssh-keygen does not say which of these it is
            raise UnknownSigner(
                f"it is signed with the certificate {key}, which no cert-authority in {SIGNERS} vouches for: it has "
                "expired, is not yet valid, or is for other principals or from another authority; see: ssh-keygen -L",
            )
        why = f"it is signed with the key {key}, which {SIGNERS} does not name"
        if unusable := re.search(r":(\d+): (.*)", ran.err):
            why += f" (its line {unusable[1]} is not valid, see ssh-keygen(1), ALLOWED SIGNERS: {unusable[2].strip()})"
        raise UnknownSigner(f"{why}; add it if you trust it")

    async def _valid(self, manifest: bytes, signature: str, trusted: str, principal: str, key: str) -> None:
        arguments = ["-Y", "verify", "-f", trusted, "-I", principal, "-n", NAMESPACE, "-s", signature]
        if revoked := self._found(REVOKED):  # again: `_not_revoked` relies on messages, this on an exit status
            arguments += ["-r", revoked]
        ran = await self._run(arguments, manifest)
        if ran.status == 0:
            return
        if other := re.search(r":(\d+): .*not permitted for use in signature namespace", ran.err):
            raise _OtherPurpose(
                f"{SIGNERS} trusts the key {key} of {principal}, but not for {NAMESPACE}; "
                "see namespaces in ssh-keygen(1)",
                int(other[1]),
            )
        raise UnknownSigner(
            f"the signature by {principal} is not accepted: {_last_line(ran.err)}; see ssh-keygen(1), ALLOWED SIGNERS",
        )

    def _found(self, name: str) -> str | None:
        """The file of that name that counts, even if it is a dangling link: its reader reports that.

        Raises `Unavailable` if that cannot be determined, or if others could have written it.
        """
        for directory in reversed(self._directories):
            path = directory / name
            try:
                path.lstat()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as exc:
                raise _unreadable(str(path), exc) from exc
            try:
                for place in (directory, path):
                    self._may_write(place, place.stat())
            except Denied as error:
                raise Unavailable(f"cannot use {place}: {error}") from error
            except FileNotFoundError:  # a dangling link, which its reader reports
                return str(path)
            except OSError as exc:
                raise _unreadable(str(path), exc) from exc
            return str(path)
        return None

    async def _run(self, arguments: Sequence[str], given: bytes) -> _Ran:
        """Run ssh-keygen with `given` on its standard input. Raises `Unavailable`."""
        files = [int(item.rpartition("/")[2]) for item in arguments if item.startswith("/proc/self/fd/")]
        try:
            process = await asyncio.create_subprocess_exec(
                "ssh-keygen",
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=files,
                env=self._environment,
            )
        except OSError as exc:
            why = f"cannot run ssh-keygen, which verifies signatures: {exc.strerror or exc}"
            if isinstance(exc, FileNotFoundError):
                why += "; install the OpenSSH client"
            raise Unavailable(why) from exc
        try:
            out, err = await process.communicate(given)
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()
        assert process.returncode is not None
        return _Ran(process.returncode, _text(out), _text(err))


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """A path to a file with `content` that exists only in memory (memfd_create(2)), for a child that inherits it."""
    descriptor = os.memfd_create("signature")
    try:
        os.write(descriptor, content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _unmarked(path: str) -> Iterator[str]:
    """A path to the file without its byte order mark, which ssh-keygen would take for a part of the first name."""

    def at_once(name: str, flags: int) -> int:  # even a pipe
        return os.open(name, flags | os.O_NONBLOCK)

    with contextlib.ExitStack() as files:
        with contextlib.suppress(OSError), open(path, "rb", opener=at_once) as file:  # ssh-keygen says why
            if file.read(len(BOM_UTF8)) == BOM_UTF8:
                path = files.enter_context(_in_memory(file.read()))
        yield path


def _unreadable(path: str, why: OSError | str) -> Unavailable:
    return Unavailable(f"cannot read {path}: {unreadable(path, why)}")


def _text(data: bytes) -> str:
    return data[:MAX_SAID].decode("utf-8", "replace")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["ssh-keygen gave no reason"])[-1]
