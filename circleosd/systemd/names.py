"""Names of systemd and its units on the bus (org.freedesktop.systemd1(5)). Imports no D-Bus library."""

from __future__ import annotations

import re
from typing import Literal

SYSTEMD = "org.freedesktop.systemd1"
MANAGER = (SYSTEMD, "/org/freedesktop/systemd1", f"{SYSTEMD}.Manager")
UNITS = "/org/freedesktop/systemd1/unit"
UNIT = f"{SYSTEMD}.Unit"
PROPERTIES = "org.freedesktop.DBus.Properties"
FROM_SYSTEMD = f"type='signal',sender='{SYSTEMD}'"
UNIT_NAME = re.compile(  # systemd.unit(5); a template without an instance is not a unit
    r"[A-Za-z0-9:_.\\-]+(@[A-Za-z0-9:_.\\@-]+)?"
    r"\.(service|socket|target|device|mount|automount|swap|timer|path|slice|scope)"
)


def object_path(unit: str) -> str:
    """The object path of a unit: characters other than ASCII letters and digits become _ and their hexadecimal code."""
    return f"{UNITS}/" + re.sub(r"[^A-Za-z0-9]|^[0-9]", lambda found: f"_{ord(found[0]):02x}", unit)


def switch_unit(verb: Literal["enable", "disable"], unit: str) -> str:
    """The oneshot unit that does `verb` to `unit`; the name is escaped as by systemd-escape(1)."""
    instance = re.sub(r"^\.|[^A-Za-z0-9:_.]", lambda found: f"\\x{ord(found[0]):02x}", unit)
    return f"circleosd-{verb}@{instance}.service"
