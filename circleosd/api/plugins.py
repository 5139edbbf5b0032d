"""Contracts of plugin-manager: loading, trusting, calling and disabling plugins."""

from collections import Counter
from dataclasses import field
from typing import Annotated, Any, Literal, TypedDict

from circleosd.api.common import EVERYWHERE
from circleosd.api.contract import Between, Doc, Effect, Length, Mark, Pattern, Request, contract, quoted
from circleosd.errors import BadRequest
from circleosd.policy import Access

SERVICE = "plugin-manager"
GROUP = "plugin"

NAMESPACE = "circleosd-plugin"  # of a manifest's signature (ssh-keygen(1), -n)
# How artifacts begin.
ELF = b"\x7fELF"
WASM = b"\0asm"

PLUGIN_NAME = r"[a-z0-9][a-z0-9_-]{0,47}"
PLUGIN_NAMES = Pattern(
    PLUGIN_NAME, "a plugin name: a lower-case ASCII letter or digit, then those, _ or -, at most 48 characters"
)
PluginName = Annotated[str, Doc("the plugin's name"), PLUGIN_NAMES]
FunctionName = Annotated[str, Doc("the function to call"), Length(1, 256)]
ArtifactPath = Annotated[
    str,
    Doc("the artifact, .wasm or .so; to write one, see plugins/README.md in the documentation"),
    Length(1, 4096),
    Mark.FILE,
]
SignaturePath = Annotated[
    str | None, Doc("the manifest's signature; default: the manifest's path with .sig added"), Mark.FILE, Mark.OPTION
]
CapabilityName = Annotated[str, Doc("a capability that it requests, such as kv or services:restart:nginx"),
                           Length(1, 200)]  # fmt: skip


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of a manifest. Raises `BadRequest` for a name that appears twice: which one counts is unclear."""
    members = dict(pairs)
    if len(members) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise BadRequest(f"the manifest is invalid: {quoted(twice)} appears twice")
    return members


class Capability(TypedDict):
    """A capability that a plugin requests, the reason, and whether it is granted."""

    name: str
    reason: str
    granted: bool


class Plugin(TypedDict):
    """A loaded plugin. `digest` is the sha256 of its artifact in hex, times in seconds since the epoch.

    `manifest_digest` is the sha256 of its manifest file, or of what is stored of a manifest without a file; None for a
    plugin that was loaded before this was kept.

    `signer` is the principal in trusted-signers whose key signed it, `state` is ready, held-back (after failures, for
    some time), quarantined or disabled. `calls` includes events; `failures` counts those that ended by a trap, a
    timeout, an exceeded limit or the worker's end.
    """

    id: str
    version: str
    plugin_type: str
    abi: str
    functions: list[str]
    capabilities: list[Capability]
    description: str
    digest: str
    manifest_digest: str | None
    loaded: float
    signer: str | None
    calls: int
    failures: int
    state: str


class Details(Plugin):
    """One plugin in detail. Sizes in bytes, times in seconds since the epoch, `limits.time` in seconds.

    `reason` and `since` say why it is in its `state`, and since when.
    """

    reason: str | None
    since: float | None
    key: str | None
    imports: list[str]
    instance: str
    deterministic: bool
    limits: dict[str, float]
    stored: int
    last_error: str | None
    last_failed: float | None
    worker: str
    waiting: int


class Verified(TypedDict):
    """A manifest with a valid signature: who signed it, and what it describes."""

    name: str
    version: str
    signer: str
    key: str
    digest: str
    size: int
    capabilities: list[Capability]


class PluginEvent(TypedDict):
    """An event that a plugin emitted. The time is in seconds since the epoch."""

    seq: int
    time: float
    plugin: str
    topic: str
    payload: str


@contract
class Load(Request, action="load", access=Access.ADMIN, reply=Plugin, effect=Effect.STATE, object="path", claimed=True):
    """Load a plugin from a file, or upgrade a loaded plugin of the same name."""

    path: ArtifactPath
    manifest: Annotated[
        str | dict[str, Any] | None,
        Doc("its manifest; default: the .json file next to the artifact, else a manifest without capabilities"),
        Mark.FILE,
        Mark.OPTION,
    ] = None
    signature: SignaturePath = None
    grant: Annotated[
        str | list[str],
        Doc('a capability to grant, or "all" for all that it requests; may be given several times'),
        Mark.OPTION,
    ] = ""
    sha256: Annotated[
        str | None,
        Doc("the artifact's expected sha256, in hex"),
        Pattern("[0-9a-f]{64}", "64 hex digits, in lower case"),
        Mark.OPTION,
    ] = None
    trust: Annotated[bool, Doc("load it even though no trusted signer has signed it"), Mark.OPTION] = False
    files: Annotated[
        list[Literal["path", "manifest", "signature"]],
        Doc("which of the above are passed as descriptors with the request (SCM_RIGHTS, unix(7)), in order"),
        Mark.HIDDEN,
    ] = field(default_factory=list)


@contract
class Verify(Request, action="verify", access=Access.VIEWER, reply=Verified):
    """Check a plugin's signature, and that its manifest matches the artifact, without loading it."""

    path: ArtifactPath
    manifest: Annotated[
        str | None, Doc("its manifest; default: the .json file next to the artifact"), Mark.FILE, Mark.OPTION
    ] = None
    signature: SignaturePath = None
    signers: Annotated[
        str | None, Doc("an allowed_signers file with the keys to trust; default: the host's trusted-signers"),
        Mark.FILE, Mark.OPTION,
    ] = None  # fmt: skip
    files: Annotated[
        list[Literal["path", "manifest", "signature", "signers"]],
        Doc("which of the above are passed as descriptors with the request (SCM_RIGHTS, unix(7)), in order"),
        Mark.HIDDEN,
    ] = field(default_factory=list)


@contract
class ListPlugins(Request, action="list", access=Access.VIEWER, reply=list[Plugin], rows="id"):
    """List the loaded plugins, with the number of their calls and failures."""


@contract
class Show(Request, action="show", access=Access.VIEWER, reply=Details, object="id"):
    """Show one plugin in detail: signer, capabilities, limits, calls, failures."""

    id: PluginName


@contract
class Invoke(Request, action="invoke", access=Access.OPERATOR, reply=str, object="id"):
    """Call a function of a plugin with a payload and print its reply."""

    id: PluginName
    func: FunctionName
    payload: Annotated[str, Doc("the text to pass to the function"), Mark.STDIN] = ""


@contract
class GrantCapability(Request, action="grant", access=Access.ADMIN, reply=Plugin, effect=Effect.STATE, object="id"):
    """Grant a plugin a capability that it requests."""

    id: PluginName
    capability: CapabilityName


@contract
class RevokeCapability(Request, action="revoke", access=Access.ADMIN, reply=Plugin, effect=Effect.STATE, object="id"):
    """Revoke a capability of a plugin."""

    id: PluginName
    capability: CapabilityName


@contract
class Disable(Request, action="disable", access=Access.ADMIN, reply=Plugin, effect=Effect.STATE, object="id"):
    """Disable a plugin: it stays loaded, but is not called until it is enabled."""

    id: PluginName
    reason: Annotated[str, Doc("the reason, shown to those who try to call it"), Length(0, 500), Mark.OPTION] = ""


@contract
class Enable(Request, action="enable", access=Access.ADMIN, reply=Plugin, effect=Effect.STATE, object="id"):
    """Enable a plugin that was disabled, or quarantined after failures."""

    id: PluginName


@contract
class Events(Request, action="events", access=Access.OPERATOR, reply=list[PluginEvent], stream=True):
    """Show the latest events that plugins emitted."""

    topic: Annotated[str | None, Doc("only events of this topic"), Length(1, 128), Mark.OPTION] = None
    lines: Annotated[int, Doc("only the last so many events"), Between(0, 1000), Mark.OPTION] = 50
    follow: Annotated[bool, Doc("keep printing new events until interrupted"), Mark.OPTION] = False


@contract
class Unload(Request, action="unload", access=Access.ADMIN, reply=Plugin, effect=Effect.STATE, object="id"):
    """Unload a plugin and delete its grants and stored data."""

    id: PluginName


CONTRACTS: tuple[type[Request], ...] = (
    Load, ListPlugins, Show, Invoke, GrantCapability, RevokeCapability, Disable, Enable, Verify, Events, Unload,
    *EVERYWHERE,
)  # fmt: skip
