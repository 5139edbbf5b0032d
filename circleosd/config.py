"""Settings. Sources, later ones override earlier ones: the defaults, `/etc/circleosd/config.toml`,
`$XDG_CONFIG_HOME/circleosd/config.toml`, `~/.circleosd/config.toml`, and variables `CIRCLEOSD_<TABLE>_<KEY>` (such as
CIRCLEOSD_SERVER_IDLE_EXIT=5). If set, `$CIRCLEOSD_CONFIG_DIR` replaces all three directories.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, dataclass_transform, get_args

from circleosd.errors import BadRequest, Denied, unreadable
from circleosd.paths import Check, anybody, config_dirs

TrustPolicy = Literal["require", "warn", "off"]


@dataclass_transform(kw_only_default=True)
class Table:
    """Settings by name, with the defaults of their class.

    For a type checker this is a dataclass; but generating one at every start of a service took longer than reading the
    settings. Settings never change.
    """

    def __init__(self, **values: Any) -> None:
        self.__dict__.update({name: getattr(self, name) for name in self.names()} | values)

    @classmethod
    def names(cls) -> list[str]:
        """The names of all settings, in order."""
        return [*cls.__annotations__]


class ServerSettings(Table):
    """Limits of every service. Times in seconds, sizes in bytes.

    idle_exit: a service without connections exits after this time (0: never). idle_connection: a connection without a
    request is closed after this time. read_timeout: time for a line to arrive completely. write_timeout: time for the
    peer to read a reply. request_timeout: time for a request. max_buffered: memory for requests and replies of all
    connections, counting what exceeds 64 KiB of each; several connections of one uid may use half of it.
    """

    idle_exit: float = 30.0
    max_connections: int = 1024
    max_connections_per_uid: int = 512
    idle_connection: float = 60.0
    read_timeout: float = 20.0
    write_timeout: float = 20.0
    request_timeout: float = 180.0
    max_buffered: int = 64 * 1024 * 1024


class AuthSettings(Table):
    """auth-service. Times in seconds.

    session_lifetime: a session ends this long after its login. session_idle: a session ends this long after its last
    use. max_sessions: per user; one more ends the least recently used. login_tries: failed logins in a row before the
    next one has to wait. login_lockout: the longest such wait. hashing: how many passwords are hashed at once.
    login_queue: how many more may wait. hash_memory (KiB) and hash_passes: argon2id's parameters.
    """

    max_line: int = 64 * 1024
    session_lifetime: float = 12 * 3600.0
    session_idle: float = 2 * 3600.0
    max_sessions: int = 100
    login_tries: int = 5
    login_lockout: float = 900.0
    hashing: int = 2
    login_queue: int = 128
    # 19 MiB is OWASP's minimum for argon2id; with eight passes, one hash takes some 100 ms on a server core.
    hash_memory: int = 19 * 1024
    hash_passes: int = 8


class LedgerSettings(Table):
    """What each service's ledger keeps: at most `keep_rows` rows (some 700 bytes each), none older than `keep_days`."""

    keep_rows: int = 200_000
    keep_days: float = 400.0


class RegistrySettings(Table):
    """service-registry. `unit_timeout`: seconds that a job may take."""

    max_line: int = 64 * 1024
    unit_timeout: float = 120.0


class PluginSettings(Table):
    """plugin-manager. Memory, output, storage, artifacts and cache in bytes, times in seconds.

    memory, time, output, concurrency, storage: the most that a manifest may request; default_…: used if it does not
    say. idle_worker: a worker without calls ends after this time. queue: waiting calls per plugin. trust: whether a
    plugin must be signed by a trusted signer. grants: capabilities that plugins have without --grant. back_off_after
    and quarantine_after: failures in a row before calls are held back, and before the plugin is quarantined.
    """

    max_line: int = 8 * 1024 * 1024
    max_artifact: int = 64 * 1024 * 1024
    memory: int = 256 * 1024 * 1024
    time: float = 60.0
    output: int = 8 * 1024 * 1024
    concurrency: int = 16
    storage: int = 64 * 1024 * 1024
    default_memory: int = 64 * 1024 * 1024
    default_time: float = 5.0
    default_output: int = 1024 * 1024
    default_concurrency: int = 1
    default_storage: int = 1024 * 1024
    load_time: float = 120.0
    idle_worker: float = 20.0
    queue: int = 256
    cache: int = 512 * 1024 * 1024
    trust: TrustPolicy = "warn"
    grants: Mapping[str, list[str]] = MappingProxyType({})
    back_off_after: int = 3
    quarantine_after: int = 10


class Settings(Table):
    """All settings: a table for each service, and two that apply to all of them."""

    server: ServerSettings = ServerSettings()
    ledger: LedgerSettings = LedgerSettings()
    auth: AuthSettings = AuthSettings()
    registry: RegistrySettings = RegistrySettings()
    plugins: PluginSettings = PluginSettings()


# The minimum of numbers where it is not 1, or 0.001 for seconds and days. The bounds of a plugin are those of the
# manifest (circleosd/plugins/manifest.py).
_LEAST = {
    "server.idle_exit": 0,
    "auth.login_lockout": 0,
    "auth.login_queue": 0,
    "auth.hash_memory": 8,  # RFC 9106, 3.1
    "ledger.keep_rows": 0,
    "ledger.keep_days": 0,
    "plugins.memory": 64 * 1024,
    "plugins.default_memory": 64 * 1024,
    "plugins.storage": 0,
    "plugins.default_storage": 0,
    "plugins.cache": 0,
}
_MOST = {
    **dict.fromkeys(("auth.hash_memory", "auth.hash_passes"), 2**32 - 1),  # RFC 9106, 3.1
    **dict.fromkeys(("plugins.memory", "plugins.default_memory"), 2**48),  # what a process can address
}
_LONGEST = 1_000_000_000  # seconds, or days: thirty years from now is a date that can still be shown


def _merge(into: dict[str, Any], table: Mapping[str, Any]) -> None:
    for key, value in table.items():
        if isinstance(value, Mapping) and isinstance(into.setdefault(key, {}), dict):
            _merge(into[key], value)
        else:
            into[key] = value


class _Variable(str):
    """The text of a variable, which may represent a number."""

    __slots__ = ()


def _from_variables(env: Mapping[str, str]) -> dict[str, dict[str, _Variable]]:
    """The tables that CIRCLEOSD_<TABLE>_<KEY> variables set, values still text."""
    tables: dict[str, dict[str, _Variable]] = {}
    for table in Settings.names():
        prefix = f"CIRCLEOSD_{table.upper()}_"
        for key, value in env.items():
            if key.startswith(prefix):
                tables.setdefault(table, {})[key.removeprefix(prefix).lower()] = _Variable(value)
    return tables


def load(
    env: Mapping[str, str],
    check: Callable[[Settings], None] = lambda settings: None,
    may_write: Check = anybody,
) -> Settings:
    """Read all sources. Raises `BadRequest`, which names the wrong key and its file or variable.

    `check` raises ValueError for further errors, `may_write` raises `Denied` for files and directories of somebody who
    must not decide on settings.
    """
    merged: dict[str, Any] = {}
    sources: dict[str, Mapping[str, Any]] = {}
    for directory in config_dirs(env):
        path = f"{directory}/config.toml"
        try:
            with open(path, encoding="utf-8-sig") as file:  # with a byte order mark or without
                for place, found in ((directory, os.stat(directory)), (path, os.fstat(file.fileno()))):
                    may_write(place, found)
                text = file.read()
        except (FileNotFoundError, NotADirectoryError):  # for example if the home is /dev/null
            continue
        except Denied as exc:
            raise BadRequest(f"cannot use {place}: {exc}") from exc
        except (OSError, ValueError) as exc:
            what = unreadable(path, exc) if isinstance(exc, OSError) else exc
            raise BadRequest(f"cannot read {path}: {what}") from exc
        if all(line.lstrip()[:1] in ("", "#") for line in text.splitlines()):
            continue  # as installed: no need to wait for the parser to find that nothing is set
        import tomllib

        try:
            content = tomllib.loads(text)
        except (ValueError, RecursionError) as exc:
            raise BadRequest(f"cannot read {path}: {exc}") from exc
        sources[path] = content
        _merge(merged, content)
    if variables := _from_variables(env):
        sources["CIRCLEOSD_ variables"] = variables
        _merge(merged, variables)
    try:
        settings = _settings(merged)
        check(settings)
        return settings
    except ValueError as exc:
        where = [source for source, content in sources.items() if _fails(content, check, exc)] or [*sources]
        raise BadRequest(f"{exc} (from {', '.join(where)})") from exc


def _settings(tables: Mapping[str, Any]) -> Settings:
    """The settings of `tables`, with defaults for the rest. Raises ValueError, which names the error."""
    defaults = Settings()
    return Settings(**{table: _table(table, vars(defaults).get(table), values) for table, values in tables.items()})


def _fails(tables: Mapping[str, Any], check: Callable[[Settings], None], error: ValueError) -> bool:
    """Whether `tables` alone produce the same error."""
    try:
        check(_settings(tables))
    except ValueError as exc:
        return str(exc) == str(error)
    return False


def _table(name: str, defaults: Any, values: Any) -> Any:
    """A table with its values, and defaults for the rest. Raises ValueError, which names the error.

    Done by hand: the validators of requests, not needed otherwise at a start, would take a quarter of its time.
    """
    if defaults is None:
        raise ValueError(f"no such setting: {name}")
    if not isinstance(values, Mapping):
        raise ValueError(f"setting {name}: {values!r} is not a table")
    found = {}
    for key, value in values.items():
        if (default := vars(defaults).get(key)) is None:
            raise ValueError(f"no such setting: {name}.{key}")
        least = _LEAST.get(f"{name}.{key}", 1 if isinstance(default, int) else 0.001)
        most = _MOST.get(f"{name}.{key}", math.inf if isinstance(default, int) else _LONGEST)
        try:
            found[key] = _value(default, value, least, most)
        except (TypeError, ValueError, OverflowError):
            what = _KINDS[type(default)].format(bounds=f"from {least} " + ("on" if most == math.inf else f"to {most}"))
            raise ValueError(f"setting {name}.{key}: {value!r} is not {what}") from None
    return type(defaults)(**found)


_KINDS = {
    int: "a whole number {bounds}",
    float: "a number {bounds}",
    str: f"one of {', '.join(get_args(TrustPolicy))}",
    MappingProxyType: "a table of lists of capabilities",
}


def _value(default: Any, value: Any, least: float, most: float) -> Any:
    """A value of the default's type; numbers may come from the text of a variable.

    Raises ValueError, TypeError; OverflowError for an infinite number where a whole number is expected.
    """
    match default:
        case int() | float():
            if isinstance(value, str) and not isinstance(value, _Variable):
                raise TypeError
            number = type(default)(value)
            if isinstance(value, bool) or not least <= number <= most:
                raise ValueError
            if isinstance(value, float) and number != value:
                raise ValueError
            return number
        case str():
            if value not in get_args(TrustPolicy):
                raise ValueError
        case Mapping():
            if not isinstance(value, dict):
                raise TypeError
            for names in value.values():
                if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                    raise TypeError
    return value
