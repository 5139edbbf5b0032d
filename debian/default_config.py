"""Print the config.toml that is installed: every setting with its default, commented out."""

from __future__ import annotations

import json
from inspect import getdoc

from circleosd.config import Settings

HEAD = """\
# The settings of CircleOSD, explained in circleosd.toml(5), each with its default; remove the # to change one.
# The services read this when they start, which they do on demand: there is nothing to reload.
"""


def main() -> None:
    defaults = Settings()
    print(HEAD, end="")
    for table, settings in vars(defaults).items():
        print()
        for line in (getdoc(type(settings)) or "").splitlines():
            print(f"# {line}".rstrip())
        print(f"[{table}]")
        for name, value in vars(settings).items():
            print(f"#{name} = {json.dumps(value, ensure_ascii=False, default=dict)}")


if __name__ == "__main__":
    main()
