"""What plugins say in the log."""

from __future__ import annotations

import logging

import pytest

from circleosd.plugins.workers import MOST_SAID, SAID_WITHIN, Voice


def test_a_plugin_says_as_much_as_a_service_may_and_then_it_is_said_once_that_the_rest_is_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    loud, other = Voice("loud"), Voice("other")
    for number in range(MOST_SAID + 100):
        loud.say(1, str(number), 5.0 + SAID_WITHIN * number / 2 / MOST_SAID)
    said = caplog.messages.copy()
    assert said[:MOST_SAID] == [f"plugin loud: {number}" for number in range(MOST_SAID)]
    assert said[MOST_SAID:] == ["plugin loud: logged more than 10000 messages within 30 s; the rest is dropped"]
    other.say(0, "not loud", 20.0)
    loud.say(3, "again", 5.0 + SAID_WITHIN)
    assert caplog.messages[len(said) :] == ["plugin other: not loud", "plugin loud: again"]
