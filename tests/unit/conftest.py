"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from circleosd.auth import store
from circleosd.database import Database
from circleosd.registry import service
from tests.unit.dispatching import Accounts, Registry


@pytest.fixture
def accounts(tmp_path: Path) -> Iterator[Accounts]:
    """auth-service without users."""
    database = Database(tmp_path / "a.db", store.MIGRATIONS)
    yield Accounts(database)
    database.close()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """A registry of a few services."""
    database = Database(tmp_path / "r.db", service.MIGRATIONS)
    yield Registry(database)
    database.close()
