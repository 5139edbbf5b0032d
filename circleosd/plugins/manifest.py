"""The manifest of a plugin: its name, its requests, and how it is run. Pure functions of bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import PurePath
from typing import Annotated, Any, NamedTuple

from circleosd.api.contract import Between, Length, Pattern, Rule, quoted
from circleosd.api.plugins import ELF, PLUGIN_NAME, WASM, PluginName, once
from circleosd.config import PluginSettings
from circleosd.errors import BadRequest, Limit
from circleosd.plugins import capabilities
from circleosd.worker.frames import MAX_PAYLOAD, Abi, Instance, PluginType

MAX_MANIFEST = 64 * 1024  # bytes
MAX_NUMBER = (1 << 63) - 1
MAX_CAPABILITIES = 64

# The limits of the protocol between manager and worker (circleosd/worker/frames.py).
PROTOCOL = {"output": MAX_PAYLOAD, "concurrency": 64}

STRICT = {"extra": "forbid", "strict": True}  # data read from JSON has the types below and no others


class _Known(Rule):
    """The name of an existing capability."""

    def check(self, value: str) -> None:
        try:
            capabilities.check(value)
        except BadRequest as exc:
            raise ValueError(str(exc)) from None


class _Asked(Rule):
    """Each capability once."""

    def check(self, value: tuple[Capability, ...]) -> None:
        names = [item.name for item in value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"asks for {quoted(twice)} twice")


class _Environment(Rule):
    """May become the environment of a program (environ(7)), which could not contain anything else."""

    def check(self, value: dict[str, str]) -> None:
        for name, text in value.items():
            if not name or "=" in name or "\0" in name + text:
                raise ValueError(f"{quoted(name)}: a name must not be empty or contain =, and NUL is not allowed")


@dataclass(frozen=True)
class Capability:
    """A host interface that the plugin requests, and the reason."""

    __pydantic_config__ = STRICT

    name: Annotated[str, Length(1, 200), _Known()]
    reason: Annotated[str, Length(0, 500)] = ""


@dataclass(frozen=True)
class Limits:
    """The limits that the plugin requests: memory, output and storage in bytes, time per call in seconds.

    None means the host's default.
    """

    __pydantic_config__ = STRICT

    memory: Annotated[int | None, Between(64 * 1024, MAX_NUMBER)] = None
    time: Annotated[float | None, Between(0.001, MAX_NUMBER)] = None
    output: Annotated[int | None, Between(1, MAX_NUMBER)] = None
    concurrency: Annotated[int | None, Between(1, MAX_NUMBER)] = None
    storage: Annotated[int | None, Between(0, MAX_NUMBER)] = None


class Bounds(NamedTuple):
    """The limits that apply to a plugin, in the units of `Limits`."""

    memory: int
    time: float
    output: int
    concurrency: int
    storage: int


@dataclass(frozen=True)
class Manifest:
    """A plugin's manifest, as the author wrote it."""

    __pydantic_config__ = STRICT

    name: PluginName
    # It is shown between the name and the signer, so it must not be able to pretend what follows it.
    version: Annotated[str, Pattern("[!-~]{1,64}", "1 to 64 visible ASCII characters without blanks")] = "0"
    description: Annotated[str, Length(0, 500)] = ""
    plugin_type: PluginType = "wasm"
    entry: Annotated[str | None, Length(1, 128)] = None
    abi: Abi | None = None
    capabilities: Annotated[tuple[Capability, ...], _Asked()] = ()
    limits: Limits = Limits()
    config: Annotated[dict[str, str], _Environment()] = field(default_factory=dict)
    instance: Instance = "fresh"
    deterministic: bool = False
    sha256: Annotated[str | None, Pattern("[0-9a-f]{64}", "a sha256 in hexadecimal, in lower case")] = None
    size: Annotated[int | None, Between(0, MAX_NUMBER)] = None

    @property
    def asked(self) -> tuple[str, ...]:
        """The names of the capabilities that it requests."""
        return tuple(item.name for item in self.capabilities)


def parse(content: bytes | dict[str, Any]) -> Manifest:
    """Read a manifest, from the bytes of its file or as JSON that was sent inline. Raises `BadRequest`."""
    value = _within(content) if isinstance(content, dict) else _json(content)
    if isinstance(value, dict) and isinstance(asked := value.get("capabilities"), list):
        if len(asked) > MAX_CAPABILITIES:  # before checking each, which is slow if all are wrong
            raise BadRequest(
                f"the manifest is invalid: capabilities: may have at most {MAX_CAPABILITIES}, not {len(asked)}"
            )
        # A bare name is short for a capability without a reason.
        value = {**value, "capabilities": [{"name": item} if isinstance(item, str) else item for item in asked]}
    from circleosd.validation import ValidationError, first_wrong

    try:
        # As JSON, in which a tuple is represented by a list.
        return _reader()(_text(value))
    except ValidationError as exc:
        _, place, what = first_wrong(exc)
        where = ".".join(map(str, place)) or "the manifest"
        raise BadRequest(f"the manifest is invalid: {where}: {what}") from exc


def _within(value: dict[str, Any]) -> dict[str, Any]:
    """A manifest that was sent inline, checked against the size limit of a file."""
    if len(_text(value)) > MAX_MANIFEST:
        raise BadRequest(f"the manifest is larger than {MAX_MANIFEST} bytes")
    return value


def _text(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as exc:
        raise BadRequest("the manifest is invalid: it contains half a surrogate pair, which is not text") from exc


@cache
def _reader() -> Callable[[bytes], Manifest]:
    """The reader of JSON, made when the first manifest is given: a start needs only stored ones."""
    from circleosd.validation import validator

    return validator(Manifest).validate_json


def dump(manifest: Manifest) -> str:
    """A manifest in stored form."""
    return json.dumps(asdict(manifest), ensure_ascii=False)


def restore(stored: str) -> Manifest:
    """A stored manifest. Raises `BadRequest` for one written by another version or damaged by a failing disk."""
    try:
        value = json.loads(stored)
        asked = tuple(Capability(**item) for item in value.pop("capabilities"))
        return Manifest(**value | {"capabilities": asked, "limits": Limits(**value["limits"])})
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise BadRequest(f"its stored manifest cannot be read: {exc}") from exc


def _json(content: bytes) -> Any:
    """The value of a JSON text (RFC 8259) without duplicate names."""
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=once, parse_constant=_no_number)
    except (ValueError, RecursionError) as exc:
        raise BadRequest(f"the manifest is not JSON: {exc}") from exc


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not allowed")


def derive(path: str, head: bytes) -> Manifest:
    """The manifest of an artifact that has none: named after its file, without capabilities."""
    stem = PurePath(path).stem
    name = re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-_")[:48]
    if not stem.isascii() or not re.fullmatch(PLUGIN_NAME, name):
        raise BadRequest(f"cannot derive a plugin name from {stem!r}; provide a manifest with a name")
    return Manifest(name=name, plugin_type=type_of(head))


def type_of(head: bytes) -> PluginType:
    """The type of an artifact, by its first bytes. Raises `BadRequest` for anything that is not a plugin."""
    if head.startswith(WASM):
        return "wasm"
    if head.startswith(ELF):
        return "native"
    if head.lstrip().startswith((b"(", b";;")):
        raise BadRequest("this is WebAssembly text: convert it to a binary with wat2wasm; see: plugins/README.md")
    raise BadRequest("this is not a plugin: neither WebAssembly nor a shared object (ELF)")


def check(manifest: Manifest, head: bytes, ceiling: PluginSettings) -> None:
    """Check a manifest against its artifact and the host's ceilings. Raises `BadRequest`, `Limit`."""
    check_kind(manifest, head)
    for name in Bounds._fields:
        asked, most = getattr(manifest.limits, name), _ceiling(name, ceiling)
        if asked is not None and asked > most:
            raise Limit(f"the manifest asks for {name} {asked}; this host allows {most} (plugins.{name})")


def check_kind(manifest: Manifest, head: bytes) -> None:
    """Check a manifest against the first bytes of its artifact, independent of the host. Raises `BadRequest`."""
    found = type_of(head)
    if manifest.plugin_type != found:
        raise BadRequest(f'the artifact is {found}, so its manifest needs "plugin_type": "{found}"')
    if manifest.abi is not None and (manifest.abi == "native") != (found == "native"):
        raise BadRequest(f"the manifest says abi {manifest.abi}, but the artifact is {found}")
    if manifest.deterministic and found == "native":
        raise BadRequest(
            "the manifest says deterministic, but the artifact is native, where instructions are not counted"
        )


def bounds(manifest: Manifest, settings: PluginSettings) -> Bounds:
    """The limits that apply to a plugin: as requested, else the host's default; never more than the ceiling."""
    values = {}
    for name in Bounds._fields:
        asked = getattr(manifest.limits, name)
        values[name] = min(getattr(settings, f"default_{name}") if asked is None else asked, _ceiling(name, settings))
    if manifest.instance == "shared" and manifest.plugin_type == "wasm":
        values["concurrency"] = 1  # one instance serves one call at a time
    return Bounds(**values)


def _ceiling(name: str, settings: PluginSettings) -> float:
    most: float = getattr(settings, name)
    return min(most, PROTOCOL[name]) if name in PROTOCOL else most
