"""The planner: what always holds of a plan, how near it is to the optimum, what it refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import PlacementError
from cluster.fleet import FleetHost, HostCost, LayerLoad, Pin, PlanSettings, layer_load
from cluster.planner import FleetPlan, plan
from workloads.bench.placement_exact import least_placement

TRIES = 400


def host(number: int, slots: int, speed: float = 1.0, **fields: str) -> FleetHost:
    return FleetHost(f"host-{number}", slots, HostCost(per_row_s=1 / speed), **fields)


def load(layer: int, counts: Sequence[Sequence[float]] | Sequence[float], rows: float = 100.0) -> LayerLoad:
    return layer_load(layer, 1, np.atleast_2d(np.array(counts, np.float64)), rows)


def ids(planned: FleetPlan) -> dict[int, list[list[str]]]:
    return {
        layer.layer: [[planned.hosts[h] for h in held] for held in layer.holders] for layer in planned.layers
    }


def by_host(planned: FleetPlan) -> list[int]:
    held = [0] * len(planned.hosts)
    for layer in planned.layers:
        for hosts in layer.holders:
            for h in hosts:
                held[h] += 1
    return held


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[FleetHost], list[LayerLoad], PlanSettings]:
    nodes = draw(st.integers(1, 4))
    number = draw(st.integers(nodes, 6))
    experts, layers = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    replicas = draw(st.integers(1, min(nodes, 2)))
    hosts = [
        FleetHost(
            f"host-{n}",
            draw(st.integers(1, experts * layers)),
            HostCost(per_row_s=1 / draw(st.sampled_from((1.0, 4.0)))),
            node=f"node-{n % nodes}",
        )
        for n in range(number)
    ]
    loads = [
        load(layer, [[draw(st.integers(0, 30)) for _ in range(experts)] for _ in range(2)])
        for layer in range(layers)
    ]
    spread = draw(st.sampled_from(("host", "node")))
    limit = draw(st.none() | st.integers(0, 10))
    wish = PlanSettings(
        redundancy=draw(st.none() | st.sampled_from((1.0, 1.5))),
        min_replicas=replicas,
        spread=spread,
        max_moves=limit,
        tries=100,
    )
    return hosts, loads, wish


@given(cases())
@settings(max_examples=60, deadline=None)
def test_what_holds_of_every_plan(case: tuple[list[FleetHost], list[LayerLoad], PlanSettings]) -> None:
    hosts, loads, wish = case
    try:
        first = plan(hosts, loads, None, wish)
    except PlacementError:
        return
    check(first, hosts, wish)
    assert plan(hosts, loads, None, wish) == first
    # The same hosts, other traffic; then one host fewer.
    shifted = [load(item.layer, item.rows[:, ::-1].copy()) for item in loads]
    again = plan(hosts, shifted, ids(first), wish)
    check(again, hosts, wish, ids(first))
    assert again.seconds <= again.seconds_before * (1 + 1e-6)
    if wish.max_moves is not None:
        assert again.moved <= wish.max_moves
    try:
        smaller = plan(hosts[1:], loads, ids(first), wish)
    except PlacementError:
        return
    check(smaller, hosts[1:], wish, ids(first))


def check(
    planned: FleetPlan,
    hosts: Sequence[FleetHost],
    wish: PlanSettings,
    before: Mapping[int, list[list[str]]] | None = None,
) -> None:
    assert planned.hosts == tuple(host.host_id for host in hosts)
    for held, host in zip(by_host(planned), hosts, strict=True):
        assert held <= host.memory_bytes
    for layer in planned.layers:
        for expert, held in enumerate(layer.holders):
            assert len(set(held)) == len(held) >= wish.min_replicas
            places = {hosts[h].node if wish.spread == "node" else h for h in held}
            assert len(places) >= wish.min_replicas
            old = set(before[layer.layer][expert]) if before is not None else set()
            assert {planned.hosts[h] for e, h in layer.loads if e == expert} == {
                planned.hosts[h] for h in held
            } - old


@pytest.mark.parametrize("seed", range(6))
def test_unequal_fleets_come_close_to_the_exact_optimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    speeds, slots = [1.0, 1.0, 4.0, 16.0], [4, 3, 2, 3]
    rows = rng.zipf(1.6, 8).clip(1, 60).astype(np.float64)
    found = least_placement(rows, speeds, slots)
    assert found.optimal
    exact = found.seconds
    hosts = [host(n, room, speed) for n, (room, speed) in enumerate(zip(slots, speeds, strict=True))]
    planned = plan(hosts, [load(0, rows, rows.sum())], None, PlanSettings(tries=3000))
    assert exact * (1 - 1e-3) <= planned.seconds <= 1.1 * exact


def test_hot_experts_get_the_copies_and_the_fast_hosts() -> None:
    hosts = [host(0, 4, 16.0), *(host(n, 2, 1.0) for n in (1, 2))]
    planned = plan(hosts, [load(0, [50, 50, 50, 50, 1, 1, 1, 1])], None, PlanSettings(tries=TRIES))
    assert all(0 in held for held in planned.layers[0].holders[:4])


def test_a_shift_moves_what_is_worth_it_and_no_more_than_allowed() -> None:
    hosts = [host(n, 5) for n in range(4)]
    rng = np.random.default_rng(5)
    old, new = rng.zipf(1.5, (2, 16)).clip(1, 50).astype(np.float64)
    first = plan(hosts, [load(0, old)], None, PlanSettings(tries=2000))
    free = plan(hosts, [load(0, new)], ids(first), PlanSettings(tries=2000))
    limited = plan(hosts, [load(0, new)], ids(first), PlanSettings(tries=2000, max_moves=2))
    none = plan(hosts, [load(0, new)], ids(first), PlanSettings(tries=2000, max_moves=0))
    assert free.moved > 2 >= limited.moved and none.moved == 0
    assert free.seconds < limited.seconds < none.seconds
    # The same traffic as before is no reason to move anything.
    assert plan(hosts, [load(0, old)], ids(first), PlanSettings(tries=2000, gain_per_move=0.001)).moved == 0


def test_a_copy_more_is_worth_a_move() -> None:
    hosts = [host(n, 3) for n in range(2)]
    now = {0: [["host-0"], ["host-0"], ["host-1"], ["host-1"]]}
    wish = PlanSettings(max_moves=1, tries=TRIES)
    planned = plan(hosts, [load(0, [60, 10, 5, 5])], now, wish)
    # Nobody gives anything up: the hottest expert is also where there was room.
    assert planned.layers[0].loads == ((0, 1),) and planned.layers[0].drops == ()
    assert planned.seconds < 0.6 * planned.seconds_before


def test_experts_of_one_layer_may_need_unequal_numbers_of_copies() -> None:
    hosts = [host(n, 6, node="ab"[n % 2]) for n in range(4)]
    least = {0: (3, 1, 2, 1)}
    wish = PlanSettings(redundancy=7 / 4, least=least, spread="node", apart=2, tries=TRIES)
    planned = plan(hosts, [load(0, [1, 1, 1, 1])], None, wish)
    held = planned.layers[0].holders
    assert [len(hosts_of) for hosts_of in held] == [3, 1, 2, 1]
    assert {h % 2 for h in held[0]} == {h % 2 for h in held[2]} == {0, 1}


def test_a_host_without_memory_is_emptied() -> None:
    hosts = [host(n, 8) for n in range(3)]
    first = plan(hosts, [load(0, [3, 2, 1, 1])], None, PlanSettings(min_replicas=2, tries=TRIES))
    drained = [FleetHost("host-0", 0), *hosts[1:]]
    after = plan(drained, [load(0, [3, 2, 1, 1])], ids(first), PlanSettings(min_replicas=2, tries=TRIES))
    assert by_host(after)[0] == 0 and all(len(held) == 2 for held in after.layers[0].holders)


def test_pins_tie_experts_to_a_device_class() -> None:
    hosts = [host(0, 4, device="cuda"), host(1, 8), host(2, 8, labels={"tier": "gold"})]  # type: ignore[arg-type]
    pins = (Pin({0: (5, 6)}, device="cuda"), Pin({0: (7,)}, selector={"tier": "in(gold, silver)"}))
    planned = plan(hosts, [load(0, [9] * 8)], None, PlanSettings(pins=pins, tries=TRIES))
    holders = planned.layers[0].holders
    assert holders[5] == holders[6] == (0,) and holders[7] == (2,)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_what_can_be_placed_is_placed(data: st.DataObject) -> None:
    """Pins and room for which there is a placement by construction, however hard it is to find."""
    number, experts = data.draw(st.integers(2, 5)), data.draw(st.integers(2, 8))
    home = [data.draw(st.integers(0, number - 1)) for _ in range(experts)]
    hosts = [
        FleetHost(f"host-{n}", max(1, home.count(n)), HostCost(per_row_s=1 / (1 + n)), labels={"n": str(n)})
        for n in range(number)
    ]
    pins = []
    for expert, n in enumerate(home):
        others = data.draw(st.sets(st.integers(0, number - 1)))
        wish = ", ".join(sorted({str(n), *map(str, others)}))
        pins.append(Pin({0: (expert,)}, selector={"n": f"in({wish})"}))
    rows = [data.draw(st.integers(1, 20)) for _ in range(experts)]
    planned = plan(hosts, [load(0, rows)], None, PlanSettings(pins=tuple(pins), tries=50))
    for expert, held in enumerate(planned.layers[0].holders):
        assert held and all(pins[expert].admits(hosts[h]) for h in held)


@pytest.mark.parametrize(
    ("hosts", "wish", "words"),
    [
        ([], PlanSettings(), ["no expert hosts"]),
        ([host(0, 3), host(1, 2)], PlanSettings(), ["8", "group local", "short"]),
        (
            [host(0, 8, node="a"), host(1, 8, node="a")],
            PlanSettings(min_replicas=2, spread="node"),
            ["2 nodes, there are 1", "group local: 1 node"],
        ),
        (
            [host(0, 8), host(1, 8)],
            PlanSettings(pins=(Pin({0: (1,)}, device="cuda"),)),
            ["pin 0 (device cuda)", "there are 0", "0 of 2 hosts"],
        ),
        (
            [host(0, 1, device="cuda"), host(1, 8)],
            PlanSettings(pins=(Pin({0: (1, 2, 3)}, device="cuda"),)),
            ["pin 0 (device cuda)", "short", "group local"],
        ),
        ([host(0, 8)], PlanSettings(pins=(Pin({0: (8,)}, device="cpu"),)), ["expert 8 of layer 0"]),
    ],
)
def test_what_cannot_be_is_refused_in_numbers(
    hosts: list[FleetHost], wish: PlanSettings, words: list[str]
) -> None:
    with pytest.raises(PlacementError) as error:
        plan(hosts, [load(0, [1] * 8)], None, wish)
    for word in words:
        assert word in str(error.value)
