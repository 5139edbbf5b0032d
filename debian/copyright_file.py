"""Print the package's copyright file: whose the parts are that it brings along, by their own metadata.

The argument is the directory that they are installed in.
"""

from __future__ import annotations

import sys
from email.message import Message
from importlib.metadata import distributions

HEAD = """\
CircleOSD is the work of the CircleOSD maintainers.

This package also contains the following third-party software below /usr/lib/circleosd, unchanged except that debugging
symbols are stripped. The license of each is in its NAME.dist-info directory; the LGPL is in
/usr/share/common-licenses/LGPL-2.1.

"""


def license_of(metadata: Message) -> str:
    """What a distribution says about its license, in a line (Core Metadata Specifications)."""
    classifiers = [text for text in metadata.get_all("Classifier", []) if text.startswith("License ::")]
    named = classifiers[-1].rpartition(" :: ")[2] if classifiers else ""
    return str(metadata.get("License-Expression") or named or metadata.get("License", "")).partition("\n")[0]


def main() -> None:
    print(HEAD, end="")
    found = {item.metadata["Name"]: item for item in distributions(path=[sys.argv[1]])}
    for name in sorted(found, key=str.lower):
        if name != "circleosd":
            metadata: Message = found[name].metadata  # type: ignore[assignment]  # it is one, and says less
            print(f"{name} {found[name].version}: {license_of(metadata)}")


if __name__ == "__main__":
    main()
