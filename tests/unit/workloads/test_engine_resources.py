"""Which nodes engines may run on, and what they take there."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from cluster.config import Config
from cluster.errors import PlacementError
from cluster.messages import NodeInfo
from workloads.engine_resources import engine_nodes, reserved_gpus

GIB = 2**30
PART = (Decimal("0.4"),)


def nodes(count: int, gpus: int = 0) -> tuple[NodeInfo, ...]:
    return tuple(NodeInfo(f"n{i}", f"10.0.0.{i + 1}", f"host{i}", 4, gpus, 4 * GIB) for i in range(count))


def config(**engine: Any) -> Config:
    return Config.model_validate({"engine": {"device": "cuda", **engine}})


def test_the_engine_runs_where_it_is_asked_for_if_it_may() -> None:
    bare = NodeInfo("bare", "10.0.0.9", "head", cpus=0, gpus=0, memory_bytes=GIB)
    two = nodes(2)
    assert engine_nodes(two, {}, "n1") == two[1:]
    assert engine_nodes((bare, *two), {}, "bare") == two[:1]
    with pytest.raises(PlacementError, match="CPU"):
        engine_nodes((bare,), {}, "bare")


def test_engines_run_on_the_nodes_that_their_selector_names() -> None:
    labelled = tuple(replace(node, labels={"role": role}) for node, role in zip(nodes(3), "abb", strict=True))
    assert engine_nodes(labelled, {"role": "b"}, "n0") == labelled[1:]
    with pytest.raises(PlacementError, match=r"matches engine\.selector role: c"):
        engine_nodes(labelled, {"role": "c"})


def test_engines_on_gpus_run_on_nodes_that_have_as_many() -> None:
    found = (*nodes(1), replace(nodes(2)[1], gpus=1))
    assert engine_nodes(found, {}, "n0", PART) == found[1:]
    assert engine_nodes(found, {}, "n0", (Decimal(1),)) == found[1:]
    with pytest.raises(
        PlacementError, match="has 2 GPUs for the engine; GPUs there: host0: 0, host1: 1"
    ) as no:
        engine_nodes(found, {}, "n0", (Decimal(1), Decimal(1)))
    assert "engine.device to cpu" in no.value.hint
    with pytest.raises(PlacementError, match=r"a CPU and 0\.4 GPU matches engine\.selector role: c"):
        engine_nodes(found, {"role": "c"}, "", PART)


def test_what_engines_take_of_gpus() -> None:
    assert reserved_gpus(Config(), nodes(1)) == {}
    assert reserved_gpus(config(), nodes(1, gpus=1)) == {"n0": (Decimal(1),)}
    spread = reserved_gpus(config(gpus=0.4, replicas=3), nodes(2, gpus=1))
    assert spread == {"n0": PART * 2, "n1": PART * 2}
    ranks = config(options={"tensor_parallel_size": 2})
    assert reserved_gpus(ranks, nodes(1, gpus=2)) == {"n0": (Decimal(1),) * 2}


def test_engines_that_do_not_fit_their_node_are_refused_in_numbers() -> None:
    with pytest.raises(
        PlacementError, match=r"3 engines that take 0\.4 GPU each .* host0, which has 1"
    ) as no:
        reserved_gpus(config(gpus="0.4", replicas=3), nodes(1, gpus=1))
    assert "engine.gpus" in no.value.hint
