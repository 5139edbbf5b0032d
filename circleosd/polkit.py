"""The polkit rule that lets the registry manage the cataloged units, and nothing else: `circleosd polkit-rule`.

Run by root (units/circleosd-polkit.service) when the catalog changes. Only files that nobody but root can have written
count. On NixOS, the rule is part of the configuration, and so is the catalog for which it is generated.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from circleosd.errors import BadRequest, CircleError, Denied, NotFound
from circleosd.paths import Check, only
from circleosd.registry import catalog
from circleosd.registry.catalog import ALL_VERBS, Catalog, Entry
from circleosd.systemd import journal
from circleosd.systemd.names import UNIT_NAME, switch_unit
from circleosd.systemd.units import RULE_MAKER

USER = "circleosd-registry"
SWITCH_USER = "circleosd-switch"  # of the units that enable or disable one unit each
CATALOG = Path("/etc/circleosd/services.d")
RULES = Path("/etc/polkit-1/rules.d/49-circleosd.rules")  # before the distribution's 50-default.rules
SWITCHING = ("org.freedesktop.systemd1.manage-unit-files", "org.freedesktop.systemd1.reload-daemon")
LABEL = "security.selinux"  # selinux(8), in xattr(7)
ROUNDS = 20  # how often a catalog that keeps changing is read again

# For manage-units, polkit is told the unit and the verb, which is the job's type. It is not told which unit files
# manage-unit-files is about (systemd 252), so the registry never gets that: instead it may start a unit that enables
# just one unit file (systemd.names.switch_unit), and the user of that unit has the right. In systemd's policy, this
# right includes manage-units, whatever the rule says (org.freedesktop.policykit.imply): that user could do what root
# can, and only the commands of the unit limit it. The failure of such a unit is reported to the caller: the registry
# may reset it, so that nobody looks for a problem of the host.
_TEMPLATE = """\
// Made from the catalog by `circleosd polkit-rule`; changes made here are lost.
polkit.addRule(function (action, subject) {
    if (subject.user === %(switch)s) {
        return %(switching)s.indexOf(action.id) >= 0 ? polkit.Result.YES : polkit.Result.NO;
    }
    if (subject.user !== %(user)s) {
        return polkit.Result.NOT_HANDLED;
    }
    // Whatever is not listed here is refused, also where another rule would allow it.
    if (action.id !== "org.freedesktop.systemd1.manage-units") {
        return polkit.Result.NO;
    }
    var unit = String(action.lookup("unit"));
    var verb = String(action.lookup("verb"));
    // From systemd 257 on, a transient unit is asked for by unit and verb too, and would run any command as root under
    // the name of a listed unit that has no file. Only the message differs: it must be the one of an ordinary job.
    var resets = verb === "reset-failed" && /^circleosd-(enable|disable)@/.test(unit);
    var wish = resets ? "reset the \\"failed\\" state of" : verb;
    if (action.lookup("polkit.message") !== "Authentication is required to " + wish + " '$(unit)'.") {
        return polkit.Result.NO;
    }
    var listed = %(listed)s;
    var cataloged = listed.indexOf((resets ? "start" : verb) + " " + unit) >= 0;
    var worker = new RegExp(%(worker)s);
    if (cataloged || (worker.test(unit) && %(verbs)s.indexOf(verb) >= 0)) {
        return polkit.Result.YES;
    }
    return polkit.Result.NO;
});
"""


def rule(entries: Iterable[Entry]) -> str:
    """The JavaScript of the rule (polkit(8)): `USER` may do to the units of `entries` what these allow, and no more.

    It also allows what is needed to enable them (`switch_unit`), to run the plugins' workers and to regenerate this
    rule. The text depends only on the entries, not on their order. Raises `BadRequest` for an invalid unit name.
    """
    listed = {f"start {RULE_MAKER}"}
    for entry in entries:
        if not UNIT_NAME.fullmatch(entry.unit):
            raise BadRequest(f"{entry.unit[:64]!r} is not the name of a unit")
        for verb in ALL_VERBS if entry.verbs is None else entry.verbs:
            if verb == "enable" or verb == "disable":
                listed.add(f"start {switch_unit(verb, entry.unit)}")
            else:
                listed.add(f"{verb} {entry.unit}")
    return _TEMPLATE % {
        "user": json.dumps(USER),
        "switch": json.dumps(SWITCH_USER),
        "switching": json.dumps(SWITCHING),
        "listed": json.dumps(sorted(listed), indent=8)[:-1] + "    ]",
        "worker": json.dumps(rf"^{catalog.WORKER_UNITS}{catalog.WORKER}\.(service|socket)$"),
        "verbs": json.dumps(catalog.WORKER_VERBS),
    }


def trusted(directory: Path, owner: int, *, draft: bool = False) -> Catalog:
    """The part of the catalog in `directory` that only the user `owner` can have written.

    A `draft` may be anywhere, such as in /tmp: who can replace its directory does not matter.
    """
    accept = only(owner)

    def check(path: str | os.PathLike[str], found: os.stat_result) -> None:
        if not (draft and path == directory.parent):
            accept(path, found)

    def text(path: Path, check: Check) -> str:
        # The checked file is the one that is read; the target of a link could not be trusted.
        if path.is_symlink():
            raise Denied("it is a symbolic link; put the file itself there")
        return catalog.text_of(path, check, os.O_NOFOLLOW)

    for place in (directory,) if draft else (directory.parent, directory):
        if place.is_symlink():
            problem = f"{place}: it is a symbolic link; put the directory itself there"
            return Catalog(catalog.read([]).entries, (problem,))
    return catalog.read([directory], text, check)


def write(text: str, target: Path) -> None:
    """Atomically replace `target` by a file with `text` that everybody can read. Raises `OSError`, naming it."""
    try:
        if target.read_text(encoding="utf-8") == text and stat.S_IMODE(target.stat().st_mode) == 0o644:
            return
    except (FileNotFoundError, UnicodeDecodeError):
        pass
    try:
        _replace(text, target)
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, str(target)) from exc


def _replace(text: str, target: Path) -> None:
    # polkitd only reads files that end in .rules
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(descriptor, 0o644)
            with contextlib.suppress(OSError):  # there are no labels here, or only others may give them
                # SELinux labels what a service creates in /etc as something that polkitd may not read.
                os.setxattr(descriptor, LABEL, os.getxattr(target.parent, LABEL))
            os.fsync(descriptor)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def generate(directory: Path = CATALOG, target: Path = RULES, *, owner: int = 0) -> tuple[str, ...]:
    """Update the rule in `target` from the catalog; return which files of the catalog could not be used, and why.

    Raises `OSError` if the rule cannot be written.
    """
    for _ in range(ROUNDS):
        before = _fingerprint(directory)
        found = trusted(directory, owner)
        write(rule(found.entries.values()), target)
        if _fingerprint(directory) == before:
            break
    return found.problems


def _fingerprint(directory: Path) -> list[tuple[str, int, int]]:
    """A value that changes when anything in `directory` changes."""
    with contextlib.suppress(FileNotFoundError):
        found = [(path.name, path.lstat()) for path in (directory, *sorted(directory.iterdir()))]
        return [(name, status.st_ino, status.st_ctime_ns) for name, status in found]
    return []


def of_draft(directory: Path) -> tuple[str, tuple[str, ...]]:
    """The rule for a catalog of the caller's own, and which files of it could not be used, and why.

    Raises `NotFound` if there is no such directory, `BadRequest` if the caller may not read it.
    """
    try:
        os.listdir(directory)
        found = trusted(directory, os.geteuid(), draft=True)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"no directory {directory}") from None
    except OSError as exc:
        raise BadRequest(f"cannot read {directory}: {exc.strerror}") from exc
    return rule(found.entries.values()), found.problems


def main() -> NoReturn:
    """Generate the rule and exit: 0, or 1 if a part of the catalog is refused or the rule cannot be written."""
    problems: tuple[str, ...] = ()
    try:
        problems = generate()
    except OSError as exc:
        problems = (f"cannot update the polkit rule: {exc.filename}: {exc.strerror}",)
    except CircleError as error:
        problems = (f"cannot update the polkit rule: {error}",)
    for problem in problems:
        journal.complain(problem)
    # A path unit does not start its service again for changes while it is running: exit right after the last check.
    os._exit(1 if problems else 0)
