"""Unit files as systemd reads them (systemd.syntax(7)), as far as the embedded mode needs. Pure functions of text.

A value that would be read differently from systemd is refused (`BadRequest`).
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Collection, Mapping

from circleosd.errors import BadRequest

_SECONDS = {
    "us": 1e-6, "usec": 1e-6, "ms": 1e-3, "msec": 1e-3, "": 1, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600,
}  # fmt: skip


class UnitFile:
    """The assignments of a unit file. `specifiers`: their values, by the text after the percent sign."""

    def __init__(self, text: str, specifiers: Mapping[str, str]) -> None:
        self._specifiers = specifiers
        self._assigned: dict[tuple[str, str], list[str]] = {}
        section = line = ""
        for number, raw in enumerate(text.split("\n"), 1):
            if raw.lstrip().startswith(("#", ";")):
                continue
            line += raw
            if (len(line) - len(line.rstrip("\\"))) % 2:  # an even number of backslashes are escaped ones
                line = line[:-1] + " "
                continue
            line = line.strip()
            key, equals, value = (part.strip() for part in line.partition("="))
            if line.startswith("[") and line.endswith("]"):
                section = line[1:-1]
            elif section and key and equals:  # an empty value discards the earlier ones
                self._assigned[section, key] = [*self._all(section, key), value] if value else []
            elif line:
                raise BadRequest(f"line {number} is neither a section nor an assignment")
            line = ""

    def _all(self, section: str, key: str) -> list[str]:
        return self._assigned.get((section, key), [])

    def _expand(self, text: str) -> str:
        try:
            # The runtime directory may have a name other than circleosd here.
            return re.sub(r"%(t/circleosd\b|.?)", lambda match: self._specifiers[match[1]], text)
        except KeyError as exc:
            raise BadRequest(f"the embedded mode does not support the specifier %{exc.args[0]}") from None

    def get(self, section: str, key: str, default: str = "", *, of: Collection[str] = ()) -> str:
        """The last value of a key, which must be one of `of` if given."""
        value = self._expand([default, *self._all(section, key)][-1])
        if of and value not in of:
            raise BadRequest(f"the embedded mode does not support {key}={value}, only {', '.join(of)}")
        return value

    def words(self, section: str, key: str) -> list[str]:
        """All values of a list key, split at white space, respecting quotes."""
        return [self._expand(word) for word in _split(key, " ".join(self._all(section, key)))]

    def ends(self, key: str) -> list[str]:
        """The exit statuses and the names of signals in a list of ends of the process, such as SuccessExitStatus=."""
        found = self.words("Service", key)
        if wrong := next((end for end in found if not re.fullmatch(r"[0-9]+|SIG[A-Z0-9]+", end)), None):
            raise BadRequest(f"the embedded mode supports only numbers and SIG… in {key}=, not {wrong}")
        return found

    def seconds(self, section: str, key: str, default: str) -> float:
        """A time span such as `5min 20s` in seconds (systemd.time(7)); `infinity` is inf."""
        text = self.get(section, key, default)
        try:
            parts = re.findall(r"([0-9]*\.?[0-9]+|.)\s*([a-z]*)\s*", text)
            return math.inf if text == "infinity" else sum(float(number) * _SECONDS[unit] for number, unit in parts)
        except (KeyError, ValueError) as exc:
            raise BadRequest(f"{key}={text} is not a time span: {exc}") from exc

    def tolerates(self) -> bool:
        """Whether a failure of ExecStart= is ignored: it starts with -."""
        return "-" in re.split(r"[^-+!]", self.get("Service", "ExecStart"), maxsplit=1)[0]

    def command(self, environment: Mapping[str, str]) -> list[str]:
        """The words of ExecStart= (systemd.service(5)), with variables replaced."""
        words = self.words("Service", "ExecStart")
        program = words[0].lstrip("-+!") if len(self._all("Service", "ExecStart")) == 1 else ""
        if not program or program[0] in "@:|" or ";" in words:
            raise BadRequest("the embedded mode supports one ExecStart=, without the prefixes @, : and |")
        argv = [program]
        for word in words[1:]:
            if whole := re.fullmatch(r"\$(\w+)", word):
                argv += _split(whole[1], environment.get(whole[1], ""))
            else:
                argv.append(re.sub(r"\$(?:\{(\w+)\}|\$)", lambda m: environment.get(m[1], "") if m[1] else "$", word))
        return argv


def _split(name: str, text: str) -> list[str]:
    """The words of the value of `name`, split at white space, respecting quotes."""
    try:
        if "\\" in text:
            raise ValueError("the embedded mode does not support backslashes")
        return shlex.split(text)
    except ValueError as exc:
        raise BadRequest(f"cannot read {name}={text}: {exc}") from exc
