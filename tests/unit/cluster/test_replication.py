from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config_placement import ReplicaRules
from cluster.errors import ConfigError
from cluster.messages import MoeLayer
from cluster.replication import copies_per_expert, read_counts

LAYERS = (MoeLayer(1, 4, 10), MoeLayer(2, 4, 10), MoeLayer(5, 8, 10))
COUNTS = {1: [0, 5, 7, 5], 2: [1, 1, 1, 1], 5: [0, 0, 0, 0, 0, 1, 2, 3]}


def rules(**values: Any) -> ReplicaRules:
    return ReplicaRules.model_validate(values)


def hottest(share: float, replicas: int, counts: str = "counts.json") -> dict[str, object]:
    return {"share": share, "replicas": replicas, "counts": counts}


def test_a_number_is_for_every_expert() -> None:
    assert copies_per_expert(LAYERS, rules(default=2), {}) == {1: (2,) * 4, 2: (2,) * 4, 5: (2,) * 8}


def test_the_largest_number_of_any_rule_holds() -> None:
    asked = rules(default=2, layers={1: 3, 5: 1}, hottest=hottest(0.5, 3))
    assert copies_per_expert(LAYERS, asked, COUNTS) == {
        1: (3, 3, 3, 3),
        2: (3, 3, 2, 2),
        5: (3, 2, 2, 2, 2, 3, 3, 3),
    }


@pytest.mark.parametrize(("share", "experts"), [(0.01, 1), (0.125, 1), (0.126, 2), (1, 8)])
def test_a_share_is_rounded_up_to_whole_experts(share: float, experts: int) -> None:
    copies = copies_per_expert(LAYERS, rules(hottest=hottest(share, 2)), COUNTS)[5]
    assert sum(copy == 2 for copy in copies) == experts


def test_a_layer_without_experts_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="the model has no layer 0, 3-4 of experts") as caught:
        copies_per_expert(LAYERS, rules(layers={4: 2, 0: 2, 3: 2}), {})
    assert caught.value.hint == "its layers of experts: 1-2, 5"


@pytest.mark.parametrize(
    ("counts", "problem"),
    [
        ({**COUNTS, 3: [1]}, r"counts\.json: the model has no layer 3 of experts"),
        ({1: COUNTS[1]}, r"counts\.json has no layer 2, 5"),
        ({**COUNTS, 2: [1, 2]}, "counts 2 experts in layer 2, which has 4"),
    ],
)
def test_counts_of_another_model_are_refused(counts: dict[int, list[int]], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        copies_per_expert(LAYERS, rules(hottest=hottest(0.5, 2)), counts)


def test_counts_are_read_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    file.write_text('{"1": [0, 3], "12": []}')
    assert read_counts(rules(hottest=hottest(1, 2, str(file)))) == {1: [0, 3], 12: []}
    assert read_counts(rules(default=2)) == {}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "cannot be read: No such file"),
        ("{", "Invalid JSON"),
        ("[1]", r"counts\.json: Input should be an object"),
        ('{"a": [1]}', "a: Input should be a valid integer"),
        ('{"1": [1, -1]}', r"1\.1: Input should be greater than or equal to 0"),
        ('{"1": 3}', "1: Input should be a valid array"),
        (b"\xff", "Invalid JSON"),
    ],
)
def test_a_file_that_is_no_counts_is_named(tmp_path: Path, text: str | bytes | None, problem: str) -> None:
    file = tmp_path / "counts.json"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=problem) as caught:
        read_counts(rules(hottest=hottest(1, 2, str(file))))
    assert caught.value.message.startswith("placement.replicas.hottest.counts: ")
