"""Every action × every kind of caller, in the embedded mode, compared with the table in docs/access.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from circlectl import reference
from circleosd.api import actions
from tests import PROJECT
from tests.access import Walk, table
from tests.door import Asked, answer
from tests.integration.conftest import NewHost


@pytest.mark.usefixtures("other_users")
def test_every_action_allows_whom_the_table_says_and_nobody_else(new_host: NewHost) -> None:
    host = new_host({})
    host.open_to_everybody()

    def ask(requests: Sequence[Asked]) -> list[dict[str, Any]]:
        return [answer(str(host.runtime), asked) for asked in requests]

    assert Walk(ask).disagreements() == []


def test_the_table_is_made_from_the_contracts_as_they_are() -> None:
    written = (PROJECT / "docs/access.md").read_text(encoding="utf-8")
    assert written == reference.access(), "run: python -m circlectl.reference > docs/access.md"
    assert set(table()) == set(actions.BY_VERB)


def test_a_stranger_and_a_session_not_in_force_may_do_nothing_but_say_who_they_are() -> None:
    rows = table()
    assert {row["invalid session"] for row in rows.values()} == {"–"}
    open_to_all = {"user:login", "user:logout", "user:whoami", "user:verify"}
    assert {verb for verb, row in rows.items() if row["stranger"] != "–"} == open_to_all
