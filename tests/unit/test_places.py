"""The places of `circleosd.places`."""

from __future__ import annotations

import contextlib

import pytest

from circleosd.errors import Limit
from circleosd.places import Places


def test_one_uid_has_but_a_part_and_all_have_no_more_than_there_are() -> None:
    places = Places("things", 4, 2, "table.things")
    with contextlib.ExitStack() as held:
        for uid in (1, 1, 2):
            held.enter_context(places.held(uid))
        with pytest.raises(Limit, match=r"^at most 2 things at once for uid 1; try again later$"):
            places.take(1)
        held.enter_context(places.held(None))
        for other in (2, None):
            with pytest.raises(Limit, match=r"^at most 4 things at once \(table.things\); try again later$"):
                places.take(other)
    with places.held(1), places.held(1):
        pass


def test_those_ahead_get_their_part_though_the_others_have_taken_all() -> None:
    places = Places("things", 2, 2, ahead={0})
    with places.held(1), places.held(1), places.held(0), places.held(0):
        with pytest.raises(Limit, match=r"^at most 2 things at once for uid 0;"):
            places.take(0)
        with pytest.raises(Limit, match=r"^at most 2 things at once;"):
            places.take(2)


def test_who_has_no_part_has_all() -> None:
    places = Places("things", 3, 1)
    with places.held(None), places.held(None), places.held(None), pytest.raises(Limit, match="at once; try"):
        places.take(None)


def test_a_place_is_free_again_after_a_failure() -> None:
    places = Places("things", 1, 1)
    with pytest.raises(ZeroDivisionError), places.held(1):
        raise ZeroDivisionError
    with places.held(2):
        pass


def test_who_leaves_one_of_two_places_has_the_other() -> None:
    places = Places("things", 3, 2)
    places.take(1)
    places.take(1)
    places.leave(1)
    places.take(1)
    with pytest.raises(Limit, match="for uid 1"):
        places.take(1)
    places.take(2)
    with pytest.raises(Limit, match="at most 3 things at once;"):
        places.take(3)
