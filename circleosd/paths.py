"""Paths. Plain strings and almost no imports, because every `circlectl` command imports this module."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping

from circleosd.errors import BadRequest, Denied

# The services, each with what follows "circleosd-" in the names of its units and of its user.
SERVICES = {"auth-service": "auth", "service-registry": "registry", "plugin-manager": "plugins"}
SYSTEM_RUNTIME = "/run/circleosd"
USER_RUNTIMES = "/run/user"  # the runtime directories of users, by uid
BOOTED = "/run/systemd/system"  # exists if the system was booted with systemd, sd_booted(3)
UNMAPPED = 65534  # the uid shown for users that a user namespace does not map (user_namespaces(7))
SUN_PATH = 107  # bytes of a Unix socket's path, unix(7)


def config_dirs(env: Mapping[str, str]) -> list[str]:
    """The directories with config.toml and services.d, least important first."""
    if only := env.get("CIRCLEOSD_CONFIG_DIR"):
        return [only]
    dirs = ["/etc/circleosd"]
    home = env.get("HOME")
    if xdg := _xdg(env, "XDG_CONFIG_HOME") or (home and f"{home}/.config"):
        dirs.append(f"{xdg}/circleosd")
    if home:
        dirs.append(f"{home}/.circleosd")
    return dirs


Check = Callable[[str | os.PathLike[str], os.stat_result], None]  # raises `Denied` for a file that must not be used


def anybody(path: str | os.PathLike[str], found: os.stat_result) -> None:
    """A `Check` that accepts everything."""


def only(owner: int) -> Check:
    """A check that accepts what only the user `owner` can have written."""

    def check(path: str | os.PathLike[str], found: os.stat_result) -> None:
        if found.st_uid != owner:
            step = f"see: chown {owner} {path}"
            if found.st_uid == UNMAPPED:
                step += (
                    "; if this user namespace does not map its owner, have CIRCLEOSD_CONFIG_DIR name another directory"
                )
            raise Denied(f"it belongs to uid {found.st_uid}, not to uid {owner}; {step}")
        if found.st_mode & 0o022:
            raise Denied(f"it is writable by others than its owner; see: chmod go-w {path}")

    return check


def runtime_dir(env: Mapping[str, str], scope: str | None = None) -> str:
    """The directory of the sockets.

    `scope`: "system" is /run/circleosd; "user" is that of the user's own systemd manager, or else of the user's
    `circleosd up`. The default is `$CIRCLEOSD_RUNTIME_DIR`, else /run/circleosd if it exists, else that of `up`. Raises
    `BadRequest` for any other scope.
    """
    if scope == "system":
        return SYSTEM_RUNTIME
    if scope == "user":
        own = user_runtime_dir(env)
        managers = f"{USER_RUNTIMES}/{os.getuid()}/circleosd"  # the variable is missing in cron jobs and behind sudo(8)
        the_systems = own == SYSTEM_RUNTIME and os.path.isdir(BOOTED)
        if the_systems or (not _xdg(env, "XDG_RUNTIME_DIR") and os.path.isdir(managers)):
            return managers
        return own
    if scope is not None:
        raise BadRequest(f"--scope must be system or user, not {scope[:64]!r}")
    if given := env.get("CIRCLEOSD_RUNTIME_DIR"):
        return given
    return SYSTEM_RUNTIME if os.path.isdir(SYSTEM_RUNTIME) else user_runtime_dir(env)


def user_runtime_dir(env: Mapping[str, str]) -> str:
    """`$XDG_RUNTIME_DIR/circleosd`; without that variable /run/circleosd for root, else below the state directory."""
    if xdg := _xdg(env, "XDG_RUNTIME_DIR"):
        return f"{xdg}/circleosd"
    return SYSTEM_RUNTIME if os.getuid() == 0 else f"{state_home(env)}/circleosd/run"


def state_home(env: Mapping[str, str]) -> str:
    """`$XDG_STATE_HOME`, by default ~/.local/state. Raises `BadRequest` if there is no home directory."""
    return _xdg(env, "XDG_STATE_HOME") or _below_home(env, ".local/state", "XDG_STATE_HOME")


def cache_home(env: Mapping[str, str]) -> str:
    """`$XDG_CACHE_HOME`, by default ~/.cache. Raises `BadRequest` if there is no home directory."""
    return _xdg(env, "XDG_CACHE_HOME") or _below_home(env, ".cache", "XDG_CACHE_HOME")


def home(env: Mapping[str, str]) -> str | None:
    """`$HOME`, by default the directory in the user database; None if there is none."""
    if given := env.get("HOME"):
        return given
    import pwd  # as in a unit of the system, which has no HOME

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return None


def _below_home(env: Mapping[str, str], name: str, variable: str) -> str:
    if own := home(env):
        return f"{own}/{name}"
    raise BadRequest(f"uid {os.getuid()} has no home directory; set HOME or {variable}")


def _xdg(env: Mapping[str, str], variable: str) -> str | None:
    """A variable of the XDG Base Directory Specification; relative paths are ignored, as it requires."""
    given = env.get(variable, "")
    return given if given.startswith("/") else None


def socket_path(service: str, runtime: str) -> str:
    """The path of a service's socket. Raises `BadRequest` if the path is too long for a socket."""
    path = f"{runtime}/{service}.sock"
    if len(os.fsencode(path)) > SUN_PATH:
        step = "choose a shorter directory, with CIRCLEOSD_RUNTIME_DIR or circleosd up --dir"
        raise BadRequest(f"cannot use {path} as a socket: a path may have at most {SUN_PATH} bytes; {step}")
    return path


@contextlib.contextmanager
def address(path: str) -> Iterator[str]:
    """The address of a socket at `path`; if that is too long, it goes through a descriptor of its directory.

    Only for sockets that nobody but CircleOSD connects to; others could not. Raises OSError.
    """
    if len(os.fsencode(path)) <= SUN_PATH:
        yield path
        return
    directory, name = os.path.split(path)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)
