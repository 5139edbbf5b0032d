"""SSH keys and signatures, made by the real ssh-keygen."""

from __future__ import annotations

import subprocess
from pathlib import Path

NAMESPACE = "circleosd-plugin"


def new_key(directory: Path, name: str, kind: str = "ed25519") -> Path:
    """A new key without a passphrase; its public half is beside it."""
    key = directory / name
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", name, "-f", key], check=True)
    return key


def public(key: Path) -> str:
    """Kind and value of a public key, as allowed_signers lines have them."""
    return " ".join(key.with_name(key.name + ".pub").read_text().split()[:2])


def sign(key: Path, content: bytes, namespace: str = NAMESPACE) -> bytes:
    """What `ssh-keygen -Y sign` makes of `content`."""
    done = subprocess.run(
        ["ssh-keygen", "-q", "-Y", "sign", "-f", key, "-n", namespace], input=content, capture_output=True, check=True
    )
    return done.stdout
