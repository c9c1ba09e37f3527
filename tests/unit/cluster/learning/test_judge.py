"""The gate: better where it was to be, no worse elsewhere, and every reason told."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cluster.errors import LearningError
from cluster.learning.judge import GateSettings, Judged, imbalance, judge, rises, touched

SETTINGS = GateSettings()


def texts(change: float, *, noise: float = 0.01, count: int = 40, seed: int = 0) -> list[Judged]:
    """Whose bits change by so much, each with some noise."""
    dice = np.random.default_rng(seed)
    sizes = dice.integers(200, 4000, count)
    before = sizes * dice.uniform(0.8, 2.0, count)
    after = before * (1 + change + dice.normal(0, noise, count))
    return [Judged(int(s), float(b), float(a)) for s, b, a in zip(sizes, before, after, strict=True)]


def test_better_where_it_was_to_be_and_no_worse_elsewhere_passes() -> None:
    domains = {"law": texts(-0.05), "code": texts(0.0), "general": texts(-0.01)}
    found = judge("law", domains, SETTINGS, divergence=0.02, imbalance=1.1, touched=1.0)
    assert found.passed and found.reasons == ()
    assert found.metrics["rise.law"] == pytest.approx(-0.05, abs=0.01)
    assert found.metrics["rise.law.low"] < found.metrics["rise.law"] < found.metrics["rise.law.high"] < 0
    law = domains["law"]
    assert found.metrics["bits_per_byte.law.before"] == pytest.approx(
        sum(t.before for t in law) / sum(t.size for t in law)
    )


@pytest.mark.parametrize(
    ("domains", "more", "words"),
    [
        ({"law": texts(0.0)}, {}, "law: it is not better for sure"),
        ({"law": texts(-0.002, noise=0.1)}, {}, "law: it is not better for sure"),
        ({"law": texts(-0.05), "code": texts(0.03)}, {}, "code: +3"),
        ({"law": texts(-0.05), "code": texts(0.0, noise=0.1)}, {}, "where +1.00% is tolerable"),
        ({"law": texts(-0.05)}, {"divergence": 0.9}, "diverges from the version before by 0.9 nats"),
        ({"law": texts(-0.05)}, {"divergence": math.nan}, "diverges from the version before by nan"),
        ({"law": texts(-0.05)}, {"imbalance": 2.0}, "one expert gets 2.00 times"),
        ({"law": texts(-0.05)}, {"touched": 1.5}, "a step reads 1.50 times as many experts"),
        ({"law": [Judged(10, 9.0, math.nan)] * 8}, {}, "law: the bits per byte are nan"),
        ({"law": [Judged(10, 9.0, math.inf)] * 8}, {}, "law: the bits per byte are inf"),
    ],
)
def test_what_is_wrong_is_told(domains: dict[str, list[Judged]], more: dict[str, float], words: str) -> None:
    found = judge("law", domains, SETTINGS, **{"divergence": 0.02, "imbalance": 1.1, "touched": 1.0, **more})
    assert not found.passed and len(found.reasons) == 1 and words in found.reasons[0]


def test_too_few_texts_say_nothing() -> None:
    with pytest.raises(LearningError, match="no held-out texts of law"):
        judge("law", {"code": texts(0.0)}, SETTINGS, divergence=0.0, imbalance=1.0, touched=1.0)
    with pytest.raises(LearningError, match="7 held-out texts of code say too little, 8 are asked for"):
        judge(
            "law",
            {"law": texts(-0.1), "code": texts(0.0, count=7)},
            SETTINGS,
            divergence=0.0,
            imbalance=1.0,
            touched=1.0,
        )


def test_bounds_hold_as_often_as_they_say() -> None:
    bounds = [rises(texts(0.01, noise=0.05, seed=seed), SETTINGS) for seed in range(200)]
    above, below = (sum(b.high >= 0.01 for b in bounds), sum(b.low <= 0.01 for b in bounds))
    # 95 % each, with room for a bootstrap of 40 texts and chance.
    assert above >= 176 and below >= 176
    assert rises(texts(0.01), SETTINGS) == rises(texts(0.01), SETTINGS)


def test_imbalance_is_of_the_layer_in_which_one_expert_gains_most() -> None:
    before = [{0: [5, 5], 1: [2, 2]}, {0: [5, 5], 1: [1, 3]}]
    assert imbalance(before, [{0: [5, 5], 1: [2, 2]}, {0: [5, 5], 1: [0, 4]}]) == pytest.approx(6 / 5)
    assert imbalance(before, before) == 1.0 and imbalance([], []) == 1.0
    assert imbalance([{0: [0, 0]}], [{0: [1, 0]}]) == 1.0, "nothing was counted"


def test_a_step_reads_more_experts_where_choices_spread() -> None:
    one, all_four = [{0: [40, 0, 0, 0]}], [{0: [10, 10, 10, 10]}]
    assert touched(one, one, top_k=1) == 1.0 == touched([], [], top_k=2)
    assert touched(one, all_four, top_k=1) == pytest.approx(4 * (1 - 0.75**16))
    # Twice of eight by each of sixteen tokens: by the formula of the planner's cost model as well.
    even = [{0: [5] * 8, 1: [5] * 8}]
    assert touched(even, [{0: [5] * 8, 1: [0] * 4 + [10] * 4}], top_k=2) < 1
