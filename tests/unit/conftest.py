"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from circleosd.database import Database
from circleosd.registry.service import MIGRATIONS
from tests.unit.dispatching import Registry


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """A registry of a few services."""
    database = Database(tmp_path / "r.db", MIGRATIONS)
    yield Registry(database)
    database.close()
