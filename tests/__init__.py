"""Tests of CircleOSD, and what they share."""

from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).parents[1]
