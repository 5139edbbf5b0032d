"""Print the config.toml that is installed: every setting with its default, commented out."""

from __future__ import annotations

import json
from dataclasses import fields
from inspect import getdoc

from circleosd.config import Settings

HEAD = """\
# The settings of CircleOSD, explained in circleosd.toml(5), each with its default; remove the # to change one.
# The services read this when they start, which they do on demand: there is nothing to reload.
"""


def main() -> None:
    defaults = Settings()
    print(HEAD, end="")
    for table in fields(defaults):
        settings = getattr(defaults, table.name)
        print()
        for line in (getdoc(type(settings)) or "").splitlines():
            print(f"# {line}".rstrip())
        print(f"[{table.name}]")
        for item in fields(settings):
            value = getattr(settings, item.name)
            print(f"#{item.name} = {json.dumps(value, ensure_ascii=False)}" if value is not None else f"#{item.name} =")


if __name__ == "__main__":
    main()
