"""Print the config.toml that is installed: every setting with its default, commented out."""

from __future__ import annotations

import json
from inspect import getdoc

from circleosd.config import Settings
from circleosd.paths import SERVICES

HEAD = f"""\
# The settings of CircleOSD with their defaults; see circleosd.toml(5). Remove the # to change one.
# Services read this file when they start, which they do on demand. To apply changes to all running services:
#   systemctl try-restart {" ".join(f"circleosd-{part}" for part in SERVICES.values())}
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
