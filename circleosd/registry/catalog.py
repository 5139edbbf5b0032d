"""The catalog: which names exist and which units they stand for.

It is read from `services.d/*.toml` in the configuration directories:

    [[service]]
    name = "nginx"
    unit = "nginx.service"
    description = "the web server"          # optional
    verbs = ["start", "stop", "restart"]    # optional; default: all, with reload, enable and disable
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, get_args

from circleosd.api.contract import Length, Pattern
from circleosd.api.plugins import PLUGIN_NAME
from circleosd.api.registry import ServiceName
from circleosd.errors import BadRequest, CircleError, Denied, NotFound, shortage, unreadable
from circleosd.paths import SERVICES, Check, anybody
from circleosd.registry.units import Switch, Verb

AnyVerb = Literal[Verb, Switch]
ALL_VERBS: tuple[AnyVerb, ...] = get_args(AnyVerb)
PLUGIN_PREFIX = "plugin@"
MAX_FILE = 1024 * 1024  # bytes of a catalog file; some 10,000 services
WORKER_UNITS = "circleosd-plugin@"
WORKER = rf"{PLUGIN_NAME}(?:\.staged)?"  # the instance of such a unit; for an upgrade, see plugins/runner.py
WORKER_VERBS: tuple[AnyVerb, ...] = ("start", "stop", "restart")

if TYPE_CHECKING:  # a registry without catalog files does not need validators
    from pydantic_core import SchemaValidator

UnitName = Annotated[
    str,
    # systemd.unit(5): at most 255 characters of this set, and a type
    Pattern(
        r"[a-zA-Z0-9:_.\\-]+(@[a-zA-Z0-9:_.\\-]+)?\.(service|socket|timer|path|target|mount|slice)",
        "the full name of a unit (service, socket, timer, path, target, mount, slice), such as nginx.service",
    ),
    Length(3, 255),
]


@dataclass(frozen=True)
class Entry:
    """A cataloged service."""

    name: ServiceName
    unit: UnitName
    description: str = ""
    verbs: list[AnyVerb] | None = None

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # pydantic's own protocol


OWN = tuple(Entry(name, f"circleosd-{part}.service") for name, part in SERVICES.items())
# Under another name, the registry could stop itself while it waits for the result.
OWN_UNITS = frozenset(re.sub(r"service$", kind, entry.unit) for entry in OWN for kind in ("service", "socket"))


class Catalog(NamedTuple):
    """Names and their entries. `problems`: why files could not be used; `unread`: one could not even be read."""

    entries: dict[str, Entry]
    problems: tuple[str, ...]
    unread: bool = False

    @property
    def complaint(self) -> str | None:
        """What to tell whoever may miss an entry: the first problem, and how many more there are."""
        if not self.problems:
            return None
        more = f" (and {len(self.problems) - 1} more)" if self.problems[1:] else ""
        return f"cannot use a catalog file{more}: {self.problems[0]}"

    def find(self, name: str, *, workers: bool = True, sockets: bool = True) -> Entry:
        """The entry with that name; with `workers`, `plugin@X` is the worker of the plugin X, and with `sockets`,
        `plugin@X.socket` is its socket.

        Raises `NotFound`.
        """
        if entry := self.entries.get(name):
            return entry
        worker = re.fullmatch(rf"{PLUGIN_PREFIX}({WORKER})(\.socket)?", name)
        if worker and workers and (sockets or not worker[2]):
            unit = f"{WORKER_UNITS}{worker[1]}{worker[2] or '.service'}"
            return Entry(name, unit, f"worker of the plugin {worker[1]}", [*WORKER_VERBS])
        step = self.complaint or "see: circlectl service list; to add it, see circleosd(8)"
        raise NotFound(f"no service {name} in the catalog; {step}")


def plugin_entry(unit: str) -> Entry:
    """The entry of a worker's unit, `circleosd-plugin@X.service`."""
    name = unit.removeprefix(WORKER_UNITS).removesuffix(".service")
    return Entry(PLUGIN_PREFIX + name, unit, f"worker of the plugin {name}", [*WORKER_VERBS])


class Reader:
    """Reads the drop-in files of `directories` again whenever one has changed, and while one of them cannot be read.

    Files and directories that `check` refuses are skipped.
    """

    def __init__(self, directories: Sequence[Path], check: Check = anybody) -> None:
        self._directories = directories
        self._check = check
        self._seen: object = None
        self._catalog = Catalog({}, ())

    def __call__(self) -> Catalog:
        """The catalog as currently on disk. Raises `Limit` as `read` does."""
        files, problems = _files(self._directories, self._check)
        # ctime: a change of mode or owner may make a file readable. Size: two quick writes may have the same ctime.
        found = [(path, _stat(path)) for path in files]
        seen = (problems, [(path, now and (now.st_ctime_ns, now.st_ino, now.st_size)) for path, now in found])
        if seen != self._seen or self._catalog.unread:  # the cause of a problem need not be in the files
            self._catalog, self._seen = read(self._directories, check=self._check), seen
        return self._catalog


def text_of(path: Path, check: Check = anybody, flags: int = 0) -> str:
    """The text of a catalog file, after `check` has accepted it. `flags` as in open(2).

    Never blocks, as opening a pipe would. Raises OSError, ValueError, `BadRequest`, and what `check` raises.
    """
    # With a descriptor, open would leak that of a directory.
    with open(path, "rb", opener=lambda name, usual: os.open(name, usual | os.O_NONBLOCK | flags)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_FILE:
            raise BadRequest(f"it is not a regular file of at most {MAX_FILE} bytes")
        check(path, found)
        return file.read(MAX_FILE).decode("utf-8-sig")  # with a byte order mark or without


def read(directories: Sequence[Path], text: Callable[[Path, Check], str] = text_of, check: Check = anybody) -> Catalog:
    """Read the drop-in files, each with `text`, if `check` accepts them and their directories. Of two entries with the
    same name, the later one counts.

    A file that cannot be used is skipped and listed in `problems`: one bad file must not disable all services. Raises
    `Limit` if descriptors or memory are lacking: what is in the files is then not known.
    """
    entries, unread = {entry.name: entry for entry in OWN}, False
    files, problems = _files(directories, check)
    for path in files:
        try:
            for entry in parse(text(path, check)):
                if entry.name in {own.name for own in OWN} or entry.name.startswith(PLUGIN_PREFIX):
                    raise BadRequest(f"the name {entry.name} is reserved for CircleOSD")
                if entry.unit in OWN_UNITS or entry.unit.startswith(WORKER_UNITS):
                    raise BadRequest(f"the unit {entry.unit} belongs to CircleOSD, which catalogs it itself")
                entries[entry.name] = entry
        except (OSError, ValueError, RecursionError, CircleError) as exc:
            if lacking := shortage(exc):
                raise lacking from exc
            unread = unread or isinstance(exc, OSError)
            problems.append(f"{path}: {unreadable(path, exc) if isinstance(exc, OSError) else exc}")
    return Catalog(entries, tuple(problems), unread)


def parse(text: str) -> list[Entry]:
    """The entries of one file. Raises `BadRequest` or ValueError with the error."""
    import tomllib

    from circleosd.validation import ValidationError, first_wrong

    tables = {"service": [], **tomllib.loads(text)}  # a file may be empty or contain only comments
    if set(tables) != {"service"} or not isinstance(tables["service"], list):
        raise BadRequest("a catalog file may contain only [[service]] tables")
    try:
        entries: list[Entry] = _entries().validate_python(tables["service"])
    except ValidationError as exc:
        _, (number, *where), what = first_wrong(exc)
        field = f", {'.'.join(map(str, where))}" if where else ""
        raise BadRequest(f"[[service]] number {int(number) + 1}{field}: {what}") from exc
    seen: set[str] = set()
    for count, entry in enumerate(entries, 1):
        if entry.name in seen:
            raise BadRequest(f"[[service]] number {count}, name: the file already has a service {entry.name}")
        seen.add(entry.name)
    return entries


@cache
def _entries() -> SchemaValidator:
    from circleosd.validation import validator

    return validator(list[Entry])


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # just removed, or a dangling link
        return None


def _files(directories: Sequence[Path], check: Check) -> tuple[list[Path], list[str]]:
    """The drop-in files in the order in which they count, and why those of a directory are not among them."""
    files, problems = [], []
    for directory in directories:
        try:
            names = os.listdir(directory)
            for place in (directory.parent, directory):
                check(place, place.stat())
        except Denied as error:
            problems.append(f"{place}: {error}")
            continue
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as exc:
            if lacking := shortage(exc):
                raise lacking from exc
            problems.append(f"{directory}: {unreadable(directory, exc)}")
            continue
        # *.toml: files of editors, such as the lock .#a.toml, start with a dot
        files += [directory / name for name in sorted(names) if name.endswith(".toml") and not name.startswith(".")]
    return files, problems
