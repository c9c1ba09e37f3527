"""What is replayed more: domains that became worse, and all of them somewhat."""

from __future__ import annotations

import pytest

from cluster.learning.replay import Replay


def test_all_domains_are_alike_as_long_as_none_is_worse() -> None:
    replay = Replay(["law", "code", "general"], need=0.75)
    assert replay.weights == pytest.approx([1 / 3] * 3)
    replay.saw([("law", -0.2), ("code", 0.0)])
    assert replay.weights == pytest.approx([1 / 3] * 3), "what became better needs no more than its share"


def test_what_became_worse_is_replayed_more_and_the_rest_not_never() -> None:
    replay = Replay(["law", "code", "general"], need=0.75)
    replay.saw([("law", 0.3), ("code", 0.1), ("general", -0.5)])
    assert replay.weights == pytest.approx([0.25 / 3 + 0.75 * 0.75, 0.25 / 3 + 0.75 * 0.25, 0.25 / 3])
    assert Replay([], need=0.75).weights == []
    even = Replay(["law", "code"], need=0.0)
    even.saw([("law", 1.0)])
    assert even.weights == [0.5, 0.5]


def test_old_news_fades_and_a_state_is_taken_up_again() -> None:
    replay = Replay(["law", "code"], need=1.0)
    replay.saw([("law", 1.0), ("code", 1.0)])
    assert replay.weights == [0.5, 0.5]
    replay.saw([("law", -1.0)] * 40)
    assert replay.weights == [0.0, 1.0]
    again = Replay(["law", "code"], need=1.0)
    again.load(replay.state())
    replay.saw([("law", 30.0)])
    again.saw([("law", 30.0)])
    assert again.weights == replay.weights and again.weights != [0.0, 1.0]
