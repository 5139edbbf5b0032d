"""Contracts of plugin-manager: loading, listing, invoking and unloading plugins."""

from dataclasses import field
from typing import Annotated, Any, Literal, TypedDict

from circleosd.api.common import EVERYWHERE
from circleosd.api.contract import Doc, Effect, Length, Mark, Pattern, Request, contract
from circleosd.policy import Access

SERVICE = "plugin-manager"
GROUP = "plugin"

PLUGIN_NAME = r"[a-z0-9][a-z0-9_-]{0,47}"
PluginName = Annotated[
    str,
    Doc("the plugin's name"),
    Pattern(PLUGIN_NAME, "a plugin name: a lower-case letter or digit, then those, _ or -, at most 48 in all"),
]
FunctionName = Annotated[str, Doc("the function to call"), Length(1, 256)]


class Plugin(TypedDict):
    """A loaded plugin. `digest` is the sha256 of its artifact in hex, times in seconds since the epoch."""

    id: str
    version: str
    plugin_type: str
    abi: str
    functions: list[str]
    capabilities: list[str]
    description: str
    digest: str
    loaded: float


@contract
class Load(Request, action="load", access=Access.ADMIN, reply=Plugin, effect=Effect.STATE, object="path", claimed=True):
    """Load a plugin from a file, or upgrade the loaded one of that name."""

    path: Annotated[str, Doc("the artifact, .wasm or .so"), Length(1, 4096), Mark.FILE]
    manifest: Annotated[
        str | dict[str, Any] | None,
        Doc("its manifest; default: the .json file beside the artifact, else one without capabilities"),
        Mark.FILE,
        Mark.OPTION,
    ] = None
    trust: Annotated[bool, Doc("run native code although no trusted signer signed it"), Mark.OPTION] = False
    files: Annotated[
        list[Literal["path", "manifest"]],
        Doc("which of the above come as descriptors with the request (SCM_RIGHTS, unix(7)), in order"),
        Mark.HIDDEN,
    ] = field(default_factory=list)


@contract
class ListPlugins(Request, action="list", access=Access.VIEWER, reply=list[Plugin], rows="id"):
    """List the loaded plugins."""


@contract
class Invoke(Request, action="invoke", access=Access.OPERATOR, reply=str, object="id"):
    """Call a function of a plugin with a text and print its reply."""

    id: PluginName
    func: FunctionName
    payload: Annotated[str, Doc("the text that the function gets")] = ""


@contract
class Unload(Request, action="unload", access=Access.ADMIN, reply=Plugin, effect=Effect.STATE, object="id"):
    """Unload a plugin and forget it."""

    id: PluginName


CONTRACTS: tuple[type[Request], ...] = (Load, ListPlugins, Invoke, Unload, *EVERYWHERE)
