"""Print the config.toml that is installed: every setting with its default, commented out."""

from __future__ import annotations

import json
from inspect import getdoc

from circleosd.config import Settings

HEAD = """\
# The settings of CircleOSD, explained in circleosd.toml(5), each with its default; remove the # to change one.
# A service reads this when it starts, on demand; one that runs goes on with what it read. To have all read it now:
#   systemctl try-restart circleosd-auth circleosd-registry circleosd-plugins
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
