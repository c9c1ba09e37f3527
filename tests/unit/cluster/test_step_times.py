"""Steps beside their predictions: judged before they are learnt from, and what all of them take longer."""

from __future__ import annotations

from random import Random

import pytest

from cluster.messages import DispatchSample, HostCost, HostWork, MoeLayer, Traffic
from cluster.step_times import LayerTime, StepTimes
from cluster.traffic import TrafficStatistics

MEASURED = {"a": HostCost(1e-4, 1e-4, 1e-5)}


def test_a_step_is_judged_by_what_was_known_before_it() -> None:
    times = StepTimes()
    assert (times.error, times.layer_error, times.judged, times.factor) == (None, None, 0, 1.0)
    slow = [[LayerTime(1.0, 1.0), LayerTime(1.0, 3.0)]] * 8
    times.judge(slow)
    assert times.error == pytest.approx(0.5)
    times.learn(slow)
    assert times.factor == 2.0
    times.judge(slow * 9)
    assert (times.judged, times.error) == (80, 0.0)
    # Layers by the costs alone: their sum over a step is what the factor is of.
    assert times.layer_error == pytest.approx((0 + 2 / 3) / 2)


def test_few_steps_say_nothing_and_one_that_stood_still_no_more() -> None:
    times = StepTimes()
    times.learn([[LayerTime(1.0, 3.0)]] * 7)
    assert times.factor == 1.0
    times.learn([[LayerTime(1.0, 1.2)]] * 8 + [[LayerTime(1.0, 1000.0)]])
    assert times.factor == 1.2
    times.learn([])
    assert times.factor == 1.0


def traffic(number: int, random: Random, slower: float = 1.0) -> Traffic:
    """Steps of ten layers on one host; every third dispatch waits for a core, which takes four times as long."""
    samples = []
    for step in range(number):
        for _ in range(10):
            pairs = random.choice((2, 4, 8))
            seconds = slower * MEASURED["a"].seconds(pairs, 2) * (4 if random.random() < 1 / 3 else 1)
            samples.append(DispatchSample((HostWork("a", 1, pairs, 2, seconds),), seconds + 1e-5, step))
    return Traffic(len(samples), {}, tuple(samples))


def test_a_step_takes_longer_than_the_medians_of_its_layers() -> None:
    random = Random(0)
    statistics = TrafficStatistics([MoeLayer(0, 8, 1)])
    for _ in range(20):
        statistics.add(traffic(8, random), MEASURED)
    # Two thirds as measured and one third four times that: twice as long, of which medians see nothing.
    seen = statistics.costs(MEASURED)["a"].seconds(4, 2) / MEASURED["a"].seconds(4, 2)
    assert seen == pytest.approx(2.0, rel=0.15)
    assert statistics.prediction_error is not None and statistics.prediction_error < 0.25


def test_what_costs_learn_is_not_counted_twice() -> None:
    """A host becomes three times as slow: its cost follows, and the factor is not to follow too."""
    random = Random(0)
    statistics = TrafficStatistics([MoeLayer(0, 8, 1)])
    for slower in (1.0, 3.0):
        for _ in range(8):
            statistics.add(traffic(8, random, slower), MEASURED)
    seen = statistics.costs(MEASURED)["a"].seconds(4, 2) / MEASURED["a"].seconds(4, 2)
    assert seen == pytest.approx(6.0, rel=0.2)


def test_steps_with_a_host_that_began_anew_are_forgotten() -> None:
    random = Random(0)
    statistics = TrafficStatistics([MoeLayer(0, 8, 1)])
    for _ in range(8):
        statistics.add(traffic(8, random), MEASURED)
    faster = {"a": HostCost(1e-5, 1e-5, 1e-6)}
    statistics.add(Traffic(0, {}, ()), faster)
    assert statistics.costs(faster)["a"].seconds(4, 2) == pytest.approx(faster["a"].seconds(4, 2), abs=2e-5)


def test_steps_with_a_host_that_is_gone_say_nothing() -> None:
    random = Random(0)
    statistics = TrafficStatistics([MoeLayer(0, 8, 1)])
    for _ in range(8):
        statistics.add(traffic(8, random), MEASURED)
    other = {"b": MEASURED["a"]}
    statistics.add(Traffic(0, {}, ()), other)
    assert statistics.costs(other)["b"].per_row_s == pytest.approx(1e-5, rel=0.1)
