"""Contracts of plugin-manager: loading, trusting, calling and setting aside plugins."""

from dataclasses import field
from typing import Annotated, Any, Literal, TypedDict

from circleosd.api.common import EVERYWHERE
from circleosd.api.contract import Between, Doc, Effect, Length, Mark, Pattern, Request, contract, quoted
from circleosd.errors import BadRequest
from circleosd.policy import Access

SERVICE = "plugin-manager"
GROUP = "plugin"

NAMESPACE = "circleosd-plugin"  # what a manifest is signed for (ssh-keygen(1), -n)
# How artifacts begin.
ELF = b"\x7fELF"
WASM = b"\0asm"

PLUGIN_NAME = r"[a-z0-9][a-z0-9_-]{0,47}"
PLUGIN_NAMES = Pattern(PLUGIN_NAME, "a plugin name: a lower-case ASCII letter or digit, then those, _ or -, at most 48")
PluginName = Annotated[str, Doc("the plugin's name"), PLUGIN_NAMES]
FunctionName = Annotated[str, Doc("the function to call"), Length(1, 256)]
ArtifactPath = Annotated[
    str,
    Doc("the artifact, .wasm or .so; how to make one: plugins/README.md of the documentation"),
    Length(1, 4096),
    Mark.FILE,
]
SignaturePath = Annotated[
    str | None, Doc("the signature of the manifest; default: its name and .sig"), Mark.FILE, Mark.OPTION
]
CapabilityName = Annotated[str, Doc("a capability that it asks for, such as kv or services:restart:nginx"),
                           Length(1, 200)]  # fmt: skip


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a manifest, for `json.loads`. Raises `BadRequest` where a name stands twice: who reads it must see
    what counts.
    """
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        raise BadRequest(f"the manifest is wrong: it names {quoted(max(names, key=names.count))} twice")
    return members


class Capability(TypedDict):
    """A capability that a plugin asks for, why, and whether it has it."""

    name: str
    reason: str
    granted: bool


class Plugin(TypedDict):
    """A loaded plugin. `digest` is the sha256 of its artifact in hex, times in seconds since the epoch.

    `signer` is whom trusted-signers names for the key that signed it, `state` ready, quarantined or disabled. Of its
    `calls`, also of events, `failures` ended by a trap, a time-out, an exceeded limit or the end of the worker.
    """

    id: str
    version: str
    plugin_type: str
    abi: str
    functions: list[str]
    capabilities: list[Capability]
    description: str
    digest: str
    loaded: float
    signer: str | None
    calls: int
    failures: int
    state: str


class Details(Plugin):
    """One plugin in detail. Sizes in bytes, times in seconds since the epoch, `limits.time` in seconds.

    `reason` and `since` are of `state`.
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
    """A manifest whose signature counts: whose it is, and what it is of."""

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
    """Load a plugin from a file, or upgrade the loaded one of that name."""

    path: ArtifactPath
    manifest: Annotated[
        str | dict[str, Any] | None,
        Doc("its manifest; default: the .json file beside the artifact, else one without capabilities"),
        Mark.FILE,
        Mark.OPTION,
    ] = None
    signature: SignaturePath = None
    grant: Annotated[
        str | list[str],
        Doc("capabilities to grant, can be given several times; all: what it asks for"),
        Mark.OPTION,
    ] = ""
    sha256: Annotated[
        str | None,
        Doc("the sha256 that the artifact must have, in hex"),
        Pattern("[0-9a-f]{64}", "64 hex digits, in lower case"),
        Mark.OPTION,
    ] = None
    trust: Annotated[bool, Doc("load it although no trusted signer signed it"), Mark.OPTION] = False
    files: Annotated[
        list[Literal["path", "manifest", "signature"]],
        Doc("which of the above come as descriptors with the request (SCM_RIGHTS, unix(7)), in order"),
        Mark.HIDDEN,
    ] = field(default_factory=list)


@contract
class Verify(Request, action="verify", access=Access.VIEWER, reply=Verified):
    """Check a plugin's signature, and that manifest and artifact belong together, without loading it."""

    path: ArtifactPath
    manifest: Annotated[
        str | None, Doc("its manifest; default: the .json file beside the artifact"), Mark.FILE, Mark.OPTION
    ] = None
    signature: SignaturePath = None
    signers: Annotated[
        str | None, Doc("who is trusted, an allowed_signers file; default: the host's trusted-signers"),
        Mark.FILE, Mark.OPTION,
    ] = None  # fmt: skip
    files: Annotated[
        list[Literal["path", "manifest", "signature", "signers"]],
        Doc("which of the above come as descriptors with the request (SCM_RIGHTS, unix(7)), in order"),
        Mark.HIDDEN,
    ] = field(default_factory=list)


@contract
class ListPlugins(Request, action="list", access=Access.VIEWER, reply=list[Plugin], rows="id"):
    """List the loaded plugins: what they are, how often they were called and how often that failed."""


@contract
class Show(Request, action="show", access=Access.VIEWER, reply=Details, object="id"):
    """Show one plugin in detail: signer, capabilities, limits, calls, failures."""

    id: PluginName


@contract
class Invoke(Request, action="invoke", access=Access.OPERATOR, reply=str, object="id"):
    """Call a function of a plugin with a text and print its reply."""

    id: PluginName
    func: FunctionName
    payload: Annotated[str, Doc("the text that the function gets"), Mark.STDIN] = ""


@contract
class GrantCapability(Request, action="grant", access=Access.ADMIN, reply=Plugin, effect=Effect.STATE, object="id"):
    """Grant a plugin a capability that it asks for, from now on."""

    id: PluginName
    capability: CapabilityName


@contract
class RevokeCapability(Request, action="revoke", access=Access.ADMIN, reply=Plugin, effect=Effect.STATE, object="id"):
    """Take a capability away from a plugin, from now on."""

    id: PluginName
    capability: CapabilityName


@contract
class Disable(Request, action="disable", access=Access.ADMIN, reply=Plugin, effect=Effect.STATE, object="id"):
    """Set a plugin aside: it stays loaded and is not called until it is enabled."""

    id: PluginName
    reason: Annotated[str, Doc("why, for those who try to call it"), Length(0, 500), Mark.OPTION] = ""


@contract
class Enable(Request, action="enable", access=Access.ADMIN, reply=Plugin, effect=Effect.STATE, object="id"):
    """Bring back a plugin that was disabled, or quarantined after failures."""

    id: PluginName


@contract
class Events(Request, action="events", access=Access.OPERATOR, reply=list[PluginEvent], stream=True):
    """Show the last events that plugins emitted; a stream of events with follow."""

    topic: Annotated[str | None, Doc("only events of this topic"), Length(1, 128), Mark.OPTION] = None
    lines: Annotated[int, Doc("at most this many, the newest"), Between(0, 1000), Mark.OPTION] = 50
    follow: Annotated[bool, Doc("go on with what they emit from now on, until interrupted"), Mark.OPTION] = False


@contract
class Unload(Request, action="unload", access=Access.ADMIN, reply=Plugin, effect=Effect.STATE, object="id"):
    """Unload a plugin and forget it, with what it was granted and what it keeps."""

    id: PluginName


CONTRACTS: tuple[type[Request], ...] = (
    Load, ListPlugins, Show, Invoke, GrantCapability, RevokeCapability, Disable, Enable, Verify, Events, Unload,
    *EVERYWHERE,
)  # fmt: skip
