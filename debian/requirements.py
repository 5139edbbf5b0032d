"""Print the part of requirements.lock that CircleOSD needs to run: without the `dev` extra, hashes included.

The lock says which versions, the metadata of what is installed in this environment says what needs what.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parent.parent


def pinned(lock: str) -> dict[str, str]:
    """The lock's entries by name, each with its hashes."""
    entries = re.split(r"\n(?=\S)", lock.strip())
    return {canonicalize_name(Requirement(entry.partition("\\")[0]).name): entry for entry in entries}


def closure(wanted: list[str]) -> set[str]:
    """The names of `wanted` and of all that these need here."""
    found: set[str] = set()
    left = [Requirement(text) for text in wanted]
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        left += [Requirement(text) for text in requires(name) or ()]
    return found


def main() -> None:
    entries = pinned((PROJECT / "requirements.lock").read_text())
    names = closure(tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"])
    if missing := names - entries.keys():
        sys.exit(f"requirements.lock lacks {', '.join(sorted(missing))}; see HACKING.md, Dependencies")
    print("\n".join(entries[name] for name in sorted(names)))


if __name__ == "__main__":
    main()
