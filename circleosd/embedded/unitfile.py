"""Unit files as systemd reads them (systemd.syntax(7)), as far as the embedded mode needs. Pure functions of text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from circleosd.errors import BadRequest

_SECONDS = {
    "us": 1e-6, "usec": 1e-6, "ms": 1e-3, "msec": 1e-3, "": 1, "s": 1, "sec": 1, "second": 1, "seconds": 1,
    "m": 60, "min": 60, "minute": 60, "minutes": 60, "h": 3600, "hr": 3600, "hour": 3600, "hours": 3600,
    "d": 86400, "day": 86400, "days": 86400,
}  # fmt: skip


@dataclass(frozen=True)
class UnitFile:
    """A parsed unit file: section → key → values in order."""

    sections: Mapping[str, Mapping[str, list[str]]] = field(default_factory=dict)

    def all(self, section: str, key: str) -> list[str]:
        """Every value of a key; an empty assignment has dropped those before it."""
        return self.sections.get(section, {}).get(key, [])

    def get(self, section: str, key: str, default: str = "") -> str:
        """The last value of a key."""
        values = self.all(section, key)
        return values[-1] if values else default

    def words(self, section: str, key: str) -> list[str]:
        """The values of a list key, cut at white space with quotes respected."""
        return [word for value in self.all(section, key) for word in shlex.split(value)]

    def seconds(self, section: str, key: str, default: float) -> float:
        """A time span in seconds."""
        value = self.get(section, key)
        return time_span(value) if value else default


def parse(text: str) -> UnitFile:
    """Parse a unit file. Raises `BadRequest` with the number of the line that is wrong."""
    sections: dict[str, dict[str, list[str]]] = {}
    section: dict[str, list[str]] | None = None
    pending = ""
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if line.startswith(("#", ";")):
            continue
        line = f"{pending} {line}".strip() if pending else line
        if line.endswith("\\"):
            pending = line[:-1].rstrip()
            continue
        pending = ""
        if not line:
            continue
        if line.startswith("[") and line.endswith("]"):
            section = sections.setdefault(line[1:-1], {})
            continue
        key, equals, value = line.partition("=")
        if not equals or section is None:
            raise BadRequest(f"line {number} is neither a section nor an assignment")
        if value.strip():
            section.setdefault(key.strip(), []).append(value.strip())
        else:
            section[key.strip()] = []
    return UnitFile(sections)


def time_span(text: str) -> float:
    """A time span such as `5min 20s` in seconds (systemd.time(7)). `infinity` is inf. Raises `BadRequest`."""
    if text == "infinity":
        return float("inf")
    parts = re.findall(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)", text)
    if not parts or "".join(re.findall(r"\s*[0-9]*\.?[0-9]+\s*[a-z]*", text)) != text:
        raise BadRequest(f"{text!r} is not a time span")
    try:
        return sum(float(number) * _SECONDS[unit] for number, unit in parts)
    except KeyError as exc:
        raise BadRequest(f"{text!r} is not a time span: no unit {exc}") from exc


def specifiers(unit: str) -> dict[str, str]:
    """What the specifiers of a unit's own name stand for (systemd.unit(5)): %n, %N, %p, %i, %I."""
    stem = unit.rpartition(".")[0]
    prefix, _, instance = stem.partition("@")
    return {"n": unit, "N": stem, "p": prefix, "i": instance, "I": instance.replace("-", "/"), "%": "%"}


def expand(text: str, values: Mapping[str, str]) -> str:
    """Replace specifiers. Raises `BadRequest` for one that has no value here."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise BadRequest(f"the specifier %{match[1]} is not supported in the embedded mode")
        return values[match[1]]

    return re.sub(r"%(.)", value, text)


def template_of(unit: str) -> str | None:
    """The template that an instance is made from: a@b.service → a@.service; None for other units."""
    stem, _, kind = unit.rpartition(".")
    prefix, at, instance = stem.partition("@")
    return f"{prefix}@.{kind}" if at and instance else None


def command(value: str, environment: Mapping[str, str]) -> list[str]:
    """The words of an ExecStart= line (systemd.service(5)), variables replaced. Raises `BadRequest`."""
    line = value.lstrip("-:+!")
    if line.startswith("@"):
        raise BadRequest("ExecStart=@ is not supported in the embedded mode")
    try:
        words = shlex.split(line)
    except ValueError as exc:
        raise BadRequest(f"cannot read ExecStart={value}: {exc}") from exc
    expanded = []
    for word in words:
        if whole := re.fullmatch(r"\$(\w+)", word):
            expanded += shlex.split(environment.get(whole[1], ""))
        else:
            expanded.append(re.sub(r"\$\{(\w+)\}", lambda match: environment.get(match[1], ""), word))
    if not expanded:
        raise BadRequest("ExecStart= is empty")
    return expanded
