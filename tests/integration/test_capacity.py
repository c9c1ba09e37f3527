"""Each policy of the capacity on a running engine: what it may change, and that it says so."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.capacity import capacity
from tests.integration.capacity_worker import BLOCK, CAPACITY, LARGEST, TOKENS
from tests.integration.vllm_forks import VllmForks
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seen(forks: VllmForks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What stock vLLM answers, and the mesh with each policy."""
    checkpoint = make_tiny("mixtral", tmp_path_factory.mktemp("tiny") / "mixtral")
    found = {}
    for policy in ("stock", "dropless", "drop", "reroute", "defer"):
        done = forks.run("tests.integration.capacity_worker", str(checkpoint), policy)
        results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        assert results, done.stdout[-2000:] + done.stderr[-4000:]
        found[policy] = json.loads(results[0].removeprefix("RESULT "))
    return found


def counted(stats: dict[str, Any]) -> set[str]:
    return {name for name, value in stats.items() if name.startswith(("capacity_", "overflow_")) and value}


def unmarked_are_right(seen: dict[str, Any], policy: str) -> None:
    """An answer equals the plain one, or says that it does not; one that was made alone does, afterwards too."""
    answered = seen[policy]
    assert all(len(tokens) == TOKENS for tokens in answered["tokens"])
    for tokens, mark, expected in zip(
        answered["tokens"], answered["marks"], seen["stock"]["tokens"], strict=True
    ):
        assert mark or tokens == expected
    assert any(mark.startswith("capacity: an expert of layer ") for mark in answered["marks"] if mark)
    assert (answered["alone"]["tokens"], answered["alone"]["marks"]) == (seen["stock"]["tokens"][1:2], [None])


def most(rows: int, coefficient: float) -> int:
    return capacity(CAPACITY, coefficient, rows=rows, top_k=2, experts=8, largest=LARGEST)


def test_dropless_is_the_plain_mesh(seen: dict[str, Any]) -> None:
    answered = seen["dropless"]
    assert answered["direct"] and answered["scheduler"] == "MeshScheduler"
    assert answered["tokens"] == seen["stock"]["tokens"]
    assert not any(answered["marks"]) and not counted(answered["stats"])


def test_dropped_rows_are_counted_and_marked(seen: dict[str, Any]) -> None:
    answered = seen["drop"]
    assert not answered["direct"] and answered["scheduler"] == "CapacityScheduler"
    unmarked_are_right(seen, "drop")
    assert counted(answered["stats"]) == {
        "capacity_pairs",
        "overflow_pairs",
        "overflow_dropped_rows",
        "capacity_coefficient",
    }
    assert all(busy <= most(rows, CAPACITY.coefficient_max) for rows, busy in answered["busiest"])


def test_nobody_goes_on_from_what_a_marked_request_computed(seen: dict[str, Any]) -> None:
    """Its first block is there again, from one that was computed in full; those of its answer are not."""
    answered = seen["drop"]
    assert answered["marks"][0]
    assert (
        answered["again"]["tokens"][0] == seen["stock"]["tokens"][0][:1] and not answered["again"]["marks"][0]
    )
    assert answered["on"]["cached"] == [BLOCK]


def test_rerouted_rows_stay_within_the_capacity_and_are_marked(seen: dict[str, Any]) -> None:
    answered = seen["reroute"]
    unmarked_are_right(seen, "reroute")
    stats = answered["stats"]
    assert stats["overflow_rerouted_rows"] > 0 and stats["overflow_deferred_steps"] == 0
    assert all(busy <= most(rows, CAPACITY.coefficient_max) for rows, busy in answered["busiest"])
    # They were over it, or the bound would show nothing.
    assert any(busy >= most(rows, 0.0) > CAPACITY.min_rows for rows, busy in answered["busiest"])


def test_deferring_changes_no_token(seen: dict[str, Any]) -> None:
    answered = seen["defer"]
    assert answered["tokens"] == seen["stock"]["tokens"] and not any(answered["marks"])
    stats = answered["stats"]
    assert stats["overflow_deferred_steps"] > 0 and stats["overflow_pairs"] > 0
    assert stats["overflow_dropped_rows"] == stats["overflow_rerouted_rows"] == 0
    assert max(rows for rows, _ in answered["busiest"]) == LARGEST


def test_next_choices_are_those_of_vllm_s_own_routers(seen: dict[str, Any]) -> None:
    assert set(seen["stock"]["gates"]) == {"mixtral", "olmoe", "deepseek_v2", "deepseek_v3"}
    for gate in seen["stock"]["gates"].values():
        assert gate["other"] == 0
        assert gate["error"] < 1e-5
