"""Where the tools that build plugins are found: those of the project's environment first, as `make plugins` has it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

SEARCH: Final = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
ENVIRONMENT: Final = {**os.environ, "PATH": SEARCH}
