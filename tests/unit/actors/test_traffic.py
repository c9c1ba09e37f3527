"""What an engine tells of its traffic: choices counted, one step in eight timed."""

from __future__ import annotations

import torch

from tests.unit.actors.host_mesh import EXPERTS, LAYER, batch

SPLIT = [(0, 1, 2), (3, 4, 5)]


def test_one_step_in_eight_is_timed_and_every_choice_counted(make_mesh, transport: str) -> None:
    dispatcher = make_mesh(SPLIT, "float32", transport).dispatcher()
    x, weights, ids, _ = batch(12)
    out = torch.empty_like(x)
    for _ in range(20):
        dispatcher(LAYER, x, weights, ids, out)
    traffic = dispatcher.take_traffic()
    assert traffic.dispatches == 20
    chosen = torch.bincount(ids.flatten(), minlength=EXPERTS) * 20
    assert traffic.chosen == {LAYER: tuple(chosen.tolist())}
    assert [sample.step for sample in traffic.samples] == [8, 16]
    for sample in traffic.samples:
        assert {part.host_id for part in sample.parts} == {"h0", "h1"}
        assert sum(part.pairs for part in sample.parts) == ids.numel() and sample.seconds > 0
    again = dispatcher.take_traffic()
    assert (again.dispatches, again.samples, sum(again.chosen[LAYER])) == (0, (), 0)
