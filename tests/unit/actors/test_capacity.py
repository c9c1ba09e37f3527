"""What an engine with a capacity asks its hosts for, over real sockets."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from actors.capacity import CapacityLimit
from actors.dispatch import Dispatcher
from actors.outages import Outages
from actors.scored_router import ScoredRouter, gate_of
from cluster.errors import CheckpointError
from cluster.gate import Gate
from cluster.messages import CapacitySettings
from tests.unit.actors.host_mesh import EXPERTS, LAYER, TOP_K, batch

SPLIT = [(0, 1, 2), (3, 4, 5)]
ROWS = 24
TIGHT = CapacitySettings("drop", factor=0.75, min_rows=1, coefficient=0.0)
"""6 of 24 × 2 / 6 = 8 rows."""
MOST = 6


def outages_of(rows: int) -> Outages:
    """As if a step of three requests ran, with so many rows."""
    ends = np.array([0, 1, rows // 2, rows])
    outages = Outages()
    batch_of = SimpleNamespace(num_reqs=3, req_ids=["a", "b", "c"])
    outages.attach(SimpleNamespace(input_batch=batch_of, query_start_loc=SimpleNamespace(np=ends)))
    return outages


def limit(
    dispatcher: Dispatcher,
    settings: CapacitySettings,
    *,
    rows: int = ROWS,
    gate: Gate | None = None,
    largest: int = 48,
) -> tuple[CapacityLimit, Outages]:
    outages = outages_of(rows) if rows else Outages()
    gates = {LAYER: gate} if gate else {}
    return CapacityLimit(dispatcher, settings, largest=largest, gates=gates, outages=outages), outages


def expected_sums(x: torch.Tensor, weights: np.ndarray, ids: np.ndarray) -> torch.Tensor:
    """Expert e multiplies by e + 1."""
    factor = np.where(ids >= 0, weights * (ids + 1), 0).sum(1, keepdims=True)
    return x * torch.from_numpy(factor.astype(np.float32))


class Spy:
    """A dispatcher that keeps what it was asked for."""

    def __init__(self, inner: Dispatcher) -> None:
        self.peers, self.stats, self.routing, self._inner = inner.peers, inner.stats, inner.routing, inner
        self.ids = self.weights = np.zeros((0, TOP_K))

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self._inner if name == "counts_routing" else self, name, value)

    def __call__(self, layer: int, *tensors: torch.Tensor) -> None:
        _, weights, ids, _ = tensors
        self.ids, self.weights = ids.numpy().copy(), weights.numpy().copy()
        self._inner(layer, *tensors)


@pytest.fixture
def spy(make_mesh, transport: str) -> Spy:
    return Spy(make_mesh(SPLIT, "float32", transport).dispatcher())


def crowded(logits: bool = False) -> tuple[torch.Tensor, ...]:
    """Rows of which many want expert 0; with `logits`, weights as a gate would have them, and its logits behind."""
    x = batch(ROWS)[0]
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(ROWS, EXPERTS, generator=generator) - 0.7 * torch.arange(EXPERTS)
    top, ids = scores.topk(TOP_K)
    weights = top.softmax(1)
    return x, torch.cat((weights, scores), 1) if logits else weights, ids.int()


def test_dropped_pairs_are_made_up_for_counted_and_marked(spy: Spy) -> None:
    x, weights, ids = crowded()
    bound, outages = limit(spy, TIGHT)  # type: ignore[arg-type]
    given = ids.clone(), weights.clone()
    out = torch.empty_like(x)
    bound(LAYER, x, weights, ids, out)
    assert (ids == given[0]).all() and (weights == given[1]).all(), "an op may not change what it is given"
    counts = np.bincount(ids.numpy().ravel(), minlength=EXPERTS)
    asked = np.bincount(spy.ids[spy.ids >= 0], minlength=EXPERTS)
    assert counts.max() > MOST
    assert asked.tolist() == np.minimum(counts, MOST).tolist()
    assert spy.routing.take()[LAYER] == tuple(counts), (
        "placements follow what was wanted, not what was left of it"
    )
    torch.testing.assert_close(out, expected_sums(x, spy.weights, spy.ids))
    lost = (spy.ids < 0).any(1)
    assert (bound.stats.capacity_pairs, bound.stats.overflow_pairs) == (48, (spy.ids < 0).sum())
    assert (bound.stats.overflow_dropped_rows, bound.stats.overflow_rerouted_rows) == (lost.sum(), 0)
    marked = outages.take()
    assert not marked.failed
    assert set(marked.degraded) == {
        name for name, rows in {"a": lost[:1], "b": lost[1:12], "c": lost[12:]}.items() if rows.any()
    }
    assert all(f"an expert of layer {LAYER} takes 6 rows" in why for why in marked.degraded.values())


def test_replicas_that_divide_an_expert_s_rows_leave_dropped_pairs_out(make_mesh, transport: str) -> None:
    spy = Spy(make_mesh([tuple(range(EXPERTS))] * 2, "float32", transport).dispatcher())
    x, weights, ids = crowded()
    bound, _ = limit(spy, replace(TIGHT, factor=0.9))  # type: ignore[arg-type]
    out = torch.empty_like(x)
    for _ in range(3):
        bound(LAYER, x, weights, ids, out)
        assert (spy.ids < 0).any()
        torch.testing.assert_close(out, expected_sums(x, spy.weights, spy.ids))


def test_rerouted_pairs_go_to_experts_with_room_at_their_own_weights(spy: Spy) -> None:
    x, wide, ids = crowded(logits=True)
    bound, outages = limit(spy, replace(TIGHT, policy="reroute", factor=1.25), gate=Gate())  # type: ignore[arg-type]
    out = torch.empty_like(x)
    bound(LAYER, x, wide, ids, out)
    assert np.bincount(ids.numpy().ravel(), minlength=EXPERTS).max() > 10
    assert np.bincount(spy.ids.ravel(), minlength=EXPERTS).max() == 10
    changed = (spy.ids != ids.numpy()).any(1)
    weights = wide[:, TOP_K:].softmax(1).gather(1, torch.from_numpy(spy.ids).long())
    torch.testing.assert_close(torch.from_numpy(spy.weights), weights / weights.sum(1, keepdim=True))
    torch.testing.assert_close(out, expected_sums(x, spy.weights, spy.ids))
    assert bound.stats.overflow_rerouted_rows == changed.sum() and bound.stats.overflow_dropped_rows == 0
    assert outages.take().degraded


def test_without_room_anywhere_the_rest_is_dropped(spy: Spy) -> None:
    x, wide, ids = crowded(logits=True)
    bound, outages = limit(spy, replace(TIGHT, policy="reroute", factor=0.5), gate=Gate())  # type: ignore[arg-type]
    bound(LAYER, x, wide, ids, torch.empty_like(x))
    assert np.bincount(spy.ids[spy.ids >= 0], minlength=EXPERTS).tolist() == [4] * EXPERTS
    assert bound.stats.overflow_dropped_rows == (spy.ids < 0).any(1).sum() > 0
    lost = (spy.ids < 0).all(1)
    np.testing.assert_allclose(spy.weights.sum(1)[~lost], 1, rtol=1e-5)
    assert any("left out" in reason for reason in outages.take().degraded.values())


def test_experts_without_a_living_host_are_no_next_choice(make_mesh) -> None:
    mesh = make_mesh([(0, 1, 2, 3, 4), (5,)])
    spy = Spy(mesh.dispatcher())
    mesh.servers[1].close()
    spy.peers.lost("h1", ConnectionError("gone"))
    x, wide, ids = crowded(logits=True)
    ids.clamp_(max=4)  # nobody asks for what is gone
    bound, outages = limit(spy, replace(TIGHT, policy="reroute", factor=1.0), gate=Gate())  # type: ignore[arg-type]
    bound(LAYER, x, wide, ids, torch.empty_like(x))
    assert (spy.ids != ids.numpy()).any() and not (spy.ids == 5).any()
    assert not outages.take().failed


def test_deferring_changes_nothing_and_tells_the_scheduler(spy: Spy) -> None:
    x, weights, ids = crowded()
    bound, outages = limit(spy, replace(TIGHT, policy="defer"))  # type: ignore[arg-type]
    out = torch.empty_like(x)
    bound(LAYER, x, weights, ids, out)
    torch.testing.assert_close(out, expected_sums(x, weights.numpy(), ids.numpy()))
    over = np.maximum(np.bincount(ids.numpy().ravel(), minlength=EXPERTS) - MOST, 0).sum()
    assert not outages.take().degraded
    assert bound.end_step() == over / ids.numel()
    assert bound.end_step() == 0.0, "each step is told once"


def test_warm_up_and_padding_are_neither_counted_nor_changed(spy: Spy) -> None:
    x, wide, ids = crowded(logits=True)
    for rows, policy in ((0, "reroute"), (0, "drop"), (4, "drop")):
        gate = Gate() if policy == "reroute" else None
        weights = wide if gate else wide[:, :TOP_K].contiguous()
        bound, outages = limit(spy, replace(TIGHT, policy=policy, min_rows=4), rows=rows, gate=gate)  # type: ignore[arg-type]
        bound.stats.capacity_pairs = 0
        bound(LAYER, x, weights, ids, torch.empty_like(x))
        assert (spy.ids == ids.numpy()).all() and (spy.weights == wide[:, :TOP_K].numpy()).all()
        assert (bound.stats.capacity_pairs, bound.stats.overflow_pairs) == (rows * TOP_K, 0)
        assert bound.end_step() == 0.0 and not outages.take().degraded


def test_the_coefficient_follows_the_overflow_between_steps(spy: Spy) -> None:
    x, weights, ids = crowded()
    bound, _ = limit(spy, replace(TIGHT, policy="defer", coefficient_max=5.0))  # type: ignore[arg-type]
    assert bound.stats.capacity_coefficient == 0
    seen = []
    for _ in range(80):
        for _layer in range(2):
            bound(LAYER, x, weights, ids, torch.empty_like(x))
        before = bound.stats.capacity_coefficient
        share = bound.end_step()
        assert bound.stats.capacity_coefficient == pytest.approx(
            min(max(before + 0.5 * 0.5 * (share - 0.01), 0), 5)
        )
        seen.append(share)
    assert seen == sorted(seen, reverse=True) and seen[-1] < seen[0] / 2


class Router:
    """Of vLLM's routers as much as is asked."""

    def __init__(self, **attributes: object) -> None:
        self.renormalize = True
        self.__dict__.update(attributes)

    def select_experts(
        self, *, router_logits: torch.Tensor, **others: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert others == {"hidden_states": 1}
        top, ids = router_logits.topk(TOP_K)
        return top.softmax(1), ids


def test_a_router_s_logits_come_behind_its_weights() -> None:
    logits = torch.randn(5, EXPERTS, generator=torch.Generator().manual_seed(1)).bfloat16()
    router = ScoredRouter(Router(top_k=TOP_K))
    wide, ids = router.select_experts(router_logits=logits, hidden_states=1)
    assert (wide[:, TOP_K:] == logits.float()).all() and wide.dtype == torch.float32
    assert (wide[:, :TOP_K].bfloat16() == logits.topk(TOP_K)[0].softmax(1)).all()
    assert (ids == logits.topk(TOP_K)[1]).all() and router.top_k == TOP_K


def test_how_a_router_chooses_is_read_off_it() -> None:
    assert gate_of("l", Router()).groups == 1
    bias = torch.arange(4.0)
    grouped = Router(
        scoring_func="sigmoid",
        renormalize=False,
        use_grouped_topk=True,
        num_expert_group=4,
        topk_group=2,
        e_score_correction_bias=bias,
    )
    gate = gate_of("l", grouped)
    assert (gate.scoring, gate.renormalize, gate.groups, gate.top_groups) == ("sigmoid", False, 4, 2)
    assert gate.bias is not None and gate.bias.tolist() == [0, 1, 2, 3]
    assert gate_of("l", Router(use_grouped_topk=False, num_expert_group=4)).groups == 1


@pytest.mark.parametrize(
    "attributes",
    [{"scoring_func": "sqrtsoftplus"}, {"custom_routing_function": len}, {"_hash_indices_table": 1}],
)
def test_a_router_with_a_way_of_its_own_is_refused(attributes: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"layers\.3 chooses experts in a way of its own") as error:
        gate_of("layers.3", Router(**attributes))
    assert "placement.capacity.policy" in error.value.hint
