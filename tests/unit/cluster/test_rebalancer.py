"""When another placement follows, over a controller with hosts in memory: joins, drains, shifts, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.config import HostGroup
from cluster.config_placement import PlacementConfig
from cluster.controller import Controller, Deployment
from cluster.errors import PlacementError
from cluster.fleet_view import fleet, layer_loads, plan_settings, proposal
from cluster.holdings import by_host
from cluster.messages import DispatchSample, HostCost, HostWork, MoeLayer, NodeInfo, Traffic
from cluster.rebalancer import Rebalancer
from cluster.table import PlacementTable
from tests.unit.cluster.test_controller import EXPERTS, SILENCE_S, MemoryWorld

MIB = 2**20
LAYERS = tuple(MoeLayer(layer, 6, MIB // 4) for layer in EXPERTS)
ONE_COPY = 6 * len(LAYERS) * MIB
NODES = tuple(
    NodeInfo(name, f"10.0.0.{n}", name, 4, 0, 64 * MIB, {"zone": name})
    for n, name in enumerate(("one", "two"))
)


class World(MemoryWorld):
    """Two nodes; group a has its two hosts on the first, group b one on the second."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes = NODES
        self.placement = PlacementConfig()
        self.groups = (HostGroup(name="a"), HostGroup(name="b"))

    def deployment(self, name: str = "model") -> Deployment:
        plain = super().deployment(name)
        hosts = tuple(
            replace(spec, group=spec.host_id[0], node_id="one" if spec.host_id[0] == "a" else "two")
            for spec in plain.hosts
        )
        return replace(
            plain,
            hosts=hosts,
            run="run",
            layers=LAYERS,
            copies={layer.index: (1,) * 6 for layer in LAYERS},
            groups=self.groups,
            placement=self.placement,
        )

    def served(self) -> tuple[Controller, Rebalancer]:
        controller = self.controller()
        controller.deploy(self.deployment())
        controller.publish(10)
        controller.look()
        return controller, Rebalancer(controller, clock=lambda: self.now)

    def go_on(self, controller: Controller, rebalancer: Rebalancer, seconds: float = 3 * SILENCE_S) -> None:
        end = self.now + seconds
        while self.now < end:
            self.let_pass(0.5)
            controller.look()
            rebalancer.take_in()
            rebalancer.look()


@pytest.fixture
def world() -> World:
    return World()


def table_of(controller: Controller) -> PlacementTable:
    return PlacementTable.from_json(controller.table())


def all_held(world: World, controller: Controller) -> bool:
    """Whether every host holds just what the table says, and every expert is somewhere."""
    table = table_of(controller)
    held = by_host(table.experts)
    return all(world.held(host) == held.get(host, {}) for host in table.hosts) and all(
        rows for layer in table.experts.values() for rows in layer
    )


def traffic(hot: dict[int, int]) -> Traffic:
    """A thousand tokens; `hot`: expert → how often it is chosen in each layer, the others once."""
    chosen = tuple(hot.get(expert, 1) for expert in range(6))
    return Traffic(1000, {layer: chosen for layer in EXPERTS}, ())


def test_nothing_moves_while_nothing_was_counted(world: World) -> None:
    controller, rebalancer = world.served()
    before = controller.table()
    world.go_on(controller, rebalancer, 200)
    assert controller.table() == before


def test_a_shift_is_followed_when_it_is_found_twice(world: World) -> None:
    controller, rebalancer = world.served()
    before = table_of(controller)
    # Experts 0 and 3 are both on the first host.
    for _ in range(8):
        rebalancer.count(traffic({0: 4000, 3: 4000}))
    rebalancer.look()
    found = rebalancer.last
    assert found is not None and found.worthwhile and found.gain > 0.2
    assert controller.table() == before.to_json(), "one burst is no shift"
    world.go_on(controller, rebalancer, 120)
    after = table_of(controller)
    assert after.experts != before.experts
    for rows in after.experts.values():
        assert set(rows[0]).isdisjoint(rows[3])
    assert all_held(world, controller)
    settled = controller.table()
    world.go_on(controller, rebalancer, 120)
    assert controller.table() == settled, "it moves to and fro"


def test_by_hand_only_where_the_operator_says_so(world: World) -> None:
    world.placement = PlacementConfig.model_validate({"rebalance": {"mode": "manual"}})
    controller, rebalancer = world.served()
    before = controller.table()
    for _ in range(8):
        rebalancer.count(traffic({0: 4000, 3: 4000}))
    world.go_on(controller, rebalancer, 200)
    assert controller.table() == before
    found = rebalancer.rebalance()
    assert found.worthwhile and found.loads == sum(1 for _ in found.moves)
    assert sum(move.gain_s for move in found.moves) > 0
    world.go_on(controller, rebalancer)
    assert table_of(controller).experts == found.experts


def test_hosts_that_join_get_their_share(world: World) -> None:
    controller, rebalancer = world.served()
    rebalancer.look()
    assert rebalancer.scale("b", 4) == (["b-1", "b-2", "b-3"], [])
    world.go_on(controller, rebalancer)
    held = by_host(table_of(controller).experts)
    assert {host: [len(experts) for experts in layers.values()] for host, layers in held.items()} == {
        host: [1, 1] for host in ("a-0", "a-1", "b-0", "b-1", "b-2", "b-3")
    }
    assert all_held(world, controller)


def test_a_successor_fills_and_empties_what_its_predecessor_did_not_come_to(world: World) -> None:
    world.placement = PlacementConfig.model_validate({"rebalance": {"mode": "manual"}})
    controller, rebalancer = world.served()
    rebalancer.scale("a", 1)
    rebalancer.scale("b", 2)
    controller.close()
    successor = world.controller()
    successor.look()
    world.go_on(successor, Rebalancer(successor, clock=lambda: world.now))
    assert by_host(table_of(successor).experts).keys() == {"a-0", "b-0", "b-1"} == world.living()
    assert all_held(world, successor)
    settled = successor.table()
    world.go_on(successor, Rebalancer(successor, clock=lambda: world.now), 200)
    assert successor.table() == settled, "one more successor finds nothing to do"


def test_a_group_that_shrinks_is_emptied_first(world: World) -> None:
    controller, rebalancer = world.served()
    rebalancer.look()
    assert rebalancer.scale("a", 1) == ([], ["a-1"])
    world.go_on(controller, rebalancer)
    assert set(table_of(controller).hosts) == {"a-0", "b-0"} == world.living()
    assert all_held(world, controller)


def test_a_drained_node_is_empty_and_stays_so(world: World) -> None:
    controller, rebalancer = world.served()
    rebalancer.look()
    assert rebalancer.drain("one") == ["a-0", "a-1"]
    world.go_on(controller, rebalancer)
    assert set(table_of(controller).hosts) == {"b-0"} == world.living()
    assert all_held(world, controller)
    # The group's next host goes to the other node.
    assert rebalancer.scale("a", 1) == (["a-0"], [])
    assert controller.deployment().spec("a-0").node_id == "two"  # type: ignore[union-attr]
    rebalancer.undrain("one")
    rebalancer.scale("a", 2)
    assert controller.deployment().spec("a-1").node_id == "one"  # type: ignore[union-attr]


def test_what_cannot_be_is_refused_in_numbers_before_anything_changes(world: World) -> None:
    world.groups = (HostGroup(name="a", memory=ONE_COPY), HostGroup(name="b", memory=MIB))
    controller, rebalancer = world.served()
    before = controller.deployment()
    with pytest.raises(PlacementError, match=r"node one can't be drained: .* 11.00 MiB short") as refused:
        rebalancer.drain("one")
    assert "group b: 1.00 MiB" in refused.value.message
    with pytest.raises(PlacementError, match="no host group c"):
        rebalancer.scale("c", 2)
    with pytest.raises(PlacementError, match="no node three") as refused:
        rebalancer.drain("three")
    assert "10.0.0.0" in refused.value.hint
    with pytest.raises(PlacementError, match="group a can't be scaled to 0"):
        rebalancer.scale("a", 0)
    with pytest.raises(PlacementError, match="host group a: 10 of 11 hosts fit"):
        rebalancer.scale("a", 20)
    assert controller.deployment() == before


def test_a_node_that_joins_is_taken_in(world: World) -> None:
    world.groups = (HostGroup(name="a"), HostGroup(name="b", count="per_node"))
    controller, rebalancer = world.served()
    for _ in range(8):
        rebalancer.count(traffic({0: 4000, 3: 4000}))
    # Group b has a host on the second node already; the first one is new to it.
    world.go_on(controller, rebalancer)
    assert controller.deployment().spec("b-1").node_id == "one"  # type: ignore[union-attr]
    world.nodes = (*world.nodes, NodeInfo("three", "10.0.0.3", "three", 4, 0, 64 * MIB))
    world.go_on(controller, rebalancer)
    assert controller.deployment().spec("b-2").node_id == "three"  # type: ignore[union-attr]
    assert {"b-1", "b-2"} & by_host(table_of(controller).experts).keys()
    assert all_held(world, controller)


def test_costs_are_corrected_by_what_is_seen_and_predictions_are_judged(world: World) -> None:
    controller, rebalancer = world.served()
    snapshot = controller.changes.snapshot()
    assert snapshot is not None and snapshot.costs
    # Half as fast as measured, and a tenth of a millisecond on the way.
    cost = snapshot.costs["a-0"]
    samples = tuple(
        DispatchSample(
            (HostWork("a-0", 1, pairs, 2, 2 * cost.seconds(pairs, 2)),),
            2 * cost.seconds(pairs, 2) + 1e-4,
            step,
        )
        for step in range(8)
        for pairs in (2, 4, 8, 16) * 2
    )
    for _ in range(8):
        rebalancer.count(Traffic(64, {}, samples))
    statistics = rebalancer.statistics()
    seen = statistics.costs(snapshot.costs)["a-0"]
    assert seen.seconds(8, 2) == pytest.approx(2 * cost.seconds(8, 2) + 1e-4, rel=0.1)
    assert statistics.prediction_error is not None and statistics.prediction_error < 0.15
    assert (statistics.predictions, statistics.layer_error) == (
        7 * 8,
        pytest.approx(statistics.prediction_error, abs=0.1),
    )
    # A host that began anew elsewhere is as it was measured there, until something is seen of it.
    elsewhere = {**snapshot.costs, "a-0": HostCost(0.0, 1e-3, 1e-4)}
    rebalancer_statistics = rebalancer.statistics()
    rebalancer_statistics.add(Traffic(1, {}, ()), elsewhere)
    anew = rebalancer_statistics.costs(elsewhere)["a-0"]
    assert anew.seconds(8, 2) == pytest.approx(elsewhere["a-0"].seconds(8, 2) + 1e-4, rel=0.1)


def test_a_pinned_expert_goes_to_where_it_may_be(world: World) -> None:
    controller, rebalancer = world.served()
    holders = table_of(controller).experts
    layer, expert = next(
        (layer, expert)
        for layer, rows in holders.items()
        for expert, held in enumerate(rows)
        if "b-0" not in held
    )
    deployment = controller.deployment()
    assert deployment is not None
    wish = PlacementConfig.model_validate(
        {"pins": [{"layers": [layer], "experts": [expert], "selector": {"zone": "two"}}]}
    )
    hosts = fleet(controller.changes.snapshot(), {})  # type: ignore[arg-type]
    pinned = replace(deployment, placement=wish)
    found = proposal(
        pinned,
        hosts,
        layer_loads(pinned, rebalancer.statistics()),
        plan_settings(pinned, hosts),
        must=False,
        explain=True,
    )
    assert found.worthwhile and found.verdict == "pinned experts are elsewhere"
    assert found.experts[layer][expert] == ("b-0",)
    assert any((move.layer, move.expert, move.to) == (layer, expert, "b-0") for move in found.moves)
