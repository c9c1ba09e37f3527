"""Failpoints: off unless allowed, slow by a factor, and gone without a trace."""

from __future__ import annotations

import pytest

from actors.failpoints import VARIABLE, Failpoints
from cluster.errors import HostError

ON = {VARIABLE: "1"}


class Clock:
    """Time that passes only by work and sleep."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Layer:
    """Its compute takes 2 ms."""

    def __init__(self, clock: Clock) -> None:
        self.calls: list[tuple[object, ...]] = []

        def compute(*operands: object) -> None:
            self.calls.append(operands)
            clock.sleep(0.002)

        self.compute = compute


def took(clock: Clock, layer: Layer) -> float:
    before = clock.now
    layer.compute(1, 2)
    assert layer.calls[-1] == (1, 2)
    return clock.now - before


def test_slow_multiplies_and_one_turns_it_off() -> None:
    clock = Clock()
    layer = Layer(clock)
    own = layer.compute
    points = Failpoints(ON, clock, clock.sleep)
    points.set([layer], "slow", 10)
    assert took(clock, layer) == pytest.approx(0.020)
    points.set([layer], "slow", 3)  # of its own time, not of the slowed one
    assert took(clock, layer) == pytest.approx(0.006)
    points.set([layer], "slow", 1)
    assert layer.compute is own
    assert took(clock, layer) == pytest.approx(0.002)


def test_a_floor_for_computes_too_short_to_be_seen() -> None:
    clock = Clock()
    layer = Layer(clock)
    points = Failpoints(ON, clock, clock.sleep)
    points.set([layer], "slow_floor_ms", 50)
    assert took(clock, layer) == pytest.approx(0.002)  # nothing is slow yet
    points.set([layer], "slow", 10)
    assert took(clock, layer) == pytest.approx(0.050)
    points.set([layer], "slow", 1)
    points.set([layer], "slow", 2)
    assert took(clock, layer) == pytest.approx(0.004)


@pytest.mark.parametrize("environ", [{}, {VARIABLE: "0"}, {VARIABLE: ""}])
def test_off_unless_the_environment_allows_it(environ: dict[str, str]) -> None:
    clock = Clock()
    layer = Layer(clock)
    own = layer.compute
    with pytest.raises(HostError, match="failpoints are off") as error:
        Failpoints(environ).set([layer], "slow", 10)
    assert VARIABLE in error.value.hint and layer.compute is own


@pytest.mark.parametrize(("name", "value"), [("fast", 2.0), ("slow", 0.5), ("slow_floor_ms", -1.0)])
def test_what_makes_no_sense_is_refused(name: str, value: float) -> None:
    with pytest.raises(HostError, match=name):
        Failpoints(ON).set([], name, value)


def test_hoarded_memory_grows_at_a_pace_and_is_given_back() -> None:
    clock = Clock()
    points = Failpoints(ON, clock, clock.sleep)
    before = clock()
    points.set([], "hoard_mib", 64)
    assert clock() - before == pytest.approx(64 / 512)
    points.set([], "hoard_mib", 0)
    assert clock() - before == pytest.approx(64 / 512)
