"""What a controller promises, whatever its hosts and its store are made of.

Unit tests run it over hosts in memory, integration tests over Ray actors. A subclass gives the fixture `world`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

import pytest

from cluster.controller import Controller, Deployment
from cluster.deployment import complete
from cluster.errors import HostError
from cluster.holdings import by_host
from cluster.messages import HostReport, HostSpec
from cluster.repair_state import HostStatus
from cluster.table import PlacementTable

TIMEOUT_S = 60.0


class World(Protocol):
    """Hosts and a store that outlive a controller."""

    def controller(self) -> Controller:
        """A new controller over the same hosts and the same store, as after a crash. Nothing supervises it."""

    def deployment(self, name: str = "model") -> Deployment:
        """Something to run, on two hosts or more."""

    def hanging(self) -> Deployment:
        """The same, but its first host never becomes ready."""

    def kill(self, host_id: str) -> None:
        """End a host behind the controller's back."""

    def freeze(self, host_id: str) -> None:
        """Let a host live and answer nothing."""

    def thaw(self, host_id: str) -> None:
        """Let it answer again."""

    def let_pass(self, seconds: float) -> None:
        """Let time go on."""

    def living(self) -> set[str]:
        """Ids of the hosts that run."""

    def held(self, host_id: str) -> dict[int, tuple[int, ...]]:
        """Experts that a running host says it holds."""

    def spec(self, host_id: str) -> HostSpec:
        """Of one more host."""


def looked_until(world: World, controller: Controller, done: Callable[[], bool]) -> None:
    """Let the controller look after its hosts until something is so."""
    deadline = time.monotonic() + TIMEOUT_S
    while not done():
        assert time.monotonic() < deadline, controller.states()
        world.let_pass(0.1)
        controller.look()


def current(controller: Controller) -> PlacementTable:
    return PlacementTable.from_json(controller.table())


def state_of(controller: Controller, host_id: str) -> HostStatus:
    return next(state for state in controller.states() if state.host_id == host_id)


def published(controller: Controller) -> PlacementTable:
    return PlacementTable.from_json(controller.publish(TIMEOUT_S))


class ControllerContract:
    def test_without_a_deployment_there_is_no_table(self, world: World) -> None:
        controller = world.controller()
        assert controller.deployment() is None
        assert controller.progress() == []
        assert controller.reports() == {}
        for call in (controller.table, lambda: controller.publish(TIMEOUT_S)):
            with pytest.raises(HostError, match="nothing is deployed"):
                call()

    def test_publish_fills_the_addresses_and_counts_the_epoch(self, world: World) -> None:
        controller, deployment = world.controller(), world.deployment()
        ids = {spec.host_id for spec in deployment.hosts}
        controller.deploy(deployment)
        assert PlacementTable.from_json(controller.table()).running == ()

        table = published(controller)
        assert table.epoch == PlacementTable.from_json(deployment.table).epoch + 1
        assert {address.host_id for address in table.running} == ids == world.living()
        listening = {spec.host_id: spec.unix for spec in deployment.hosts}
        assert {address.host_id: address.unix for address in table.running} == listening
        assert PlacementTable.from_json(controller.table()) == table
        assert {state.host_id for state in controller.progress() if state.ready} == ids

    def test_publishing_again_changes_nothing_while_the_hosts_stay(self, world: World) -> None:
        controller = world.controller()
        controller.deploy(world.deployment())
        assert published(controller) == published(controller)

    def test_a_second_deployment_is_refused_and_leaves_the_first(self, world: World) -> None:
        controller = world.controller()
        controller.deploy(world.deployment("first"))
        table = published(controller)
        with pytest.raises(HostError, match="first is deployed") as refused:
            controller.deploy(world.deployment("second"))
        assert "expertmesh down" in refused.value.hint
        assert controller.deployment().served_name == "first"  # type: ignore[union-attr]
        assert published(controller) == table

    def test_the_same_deployment_again_changes_nothing(self, world: World) -> None:
        """Ray repeats a call whose answer was lost, with the controller or on its way."""
        controller, deployment = world.controller(), world.deployment()
        controller.deploy(deployment)
        controller.deploy(deployment)
        table = published(controller)
        controller.deploy(deployment)
        restarted = world.controller()
        restarted.deploy(deployment)
        for asked in (controller, restarted):
            assert published(asked) == table
        assert len(world.living()) == len(deployment.hosts)

    def test_a_host_that_is_late_is_named_and_the_deployment_stays(self, world: World) -> None:
        controller, deployment = world.controller(), world.hanging()
        controller.deploy(deployment)
        with pytest.raises(HostError, match=rf"{deployment.hosts[0].host_id} .*not ready within"):
            controller.publish(0.2)
        assert controller.deployment() == deployment

    def test_stop_is_served_at_once_and_ends_a_publish_that_waits(self, world: World) -> None:
        controller = world.controller()
        controller.deploy(world.hanging())
        errors: list[Exception] = []

        def publish() -> None:
            try:
                controller.publish(10 * TIMEOUT_S)
            except Exception as error:
                errors.append(error)

        waiting = threading.Thread(target=publish, daemon=True)
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        started = time.monotonic()
        controller.stop()
        assert time.monotonic() - started < TIMEOUT_S / 6
        waiting.join(TIMEOUT_S)
        assert not waiting.is_alive()
        (error,) = errors
        assert isinstance(error, HostError) and "ended while" in error.message
        assert controller.deployment() is None
        assert world.living() == set()

        controller.deploy(world.deployment("next"))
        assert published(controller).running

    def test_a_new_controller_finds_the_running_hosts(self, world: World) -> None:
        first = world.controller()
        first.deploy(world.deployment())
        table = published(first)

        second = world.controller()
        assert second.deployment() == first.deployment()
        # The same addresses, process ids among them: nothing was started again.
        assert published(second) == table

    def test_a_new_controller_starts_the_missing_hosts_again(self, world: World) -> None:
        first, deployment = world.controller(), world.deployment()
        first.deploy(deployment)
        before = published(first)
        lost = deployment.hosts[0].host_id
        world.kill(lost)

        after = published(world.controller())
        # Without the lost one, and with it again.
        assert after.epoch == before.epoch + 2
        assert after.hosts[lost] != before.hosts[lost]
        kept = {host_id for host_id in before.hosts if host_id != lost}
        assert {host_id: after.hosts[host_id] for host_id in kept} == {
            host_id: before.hosts[host_id] for host_id in kept
        }
        assert world.living() == set(before.hosts)

    def test_a_killed_host_leaves_the_table_and_comes_back_in_a_later_one(self, world: World) -> None:
        controller, deployment = world.controller(), world.deployment()
        controller.deploy(deployment)
        before = published(controller)
        lost = deployment.hosts[0].host_id
        world.kill(lost)

        looked_until(world, controller, lambda: controller.next_table(before.epoch, 0) != "")
        without = current(controller)
        assert without.epoch == before.epoch + 1
        assert without.hosts == {**before.hosts, lost: None}
        assert state_of(controller, lost).reason

        looked_until(world, controller, lambda: current(controller).epoch > without.epoch)
        after = current(controller)
        assert after.epoch == before.epoch + 2
        assert after.hosts[lost] not in (None, before.hosts[lost])
        assert {**after.hosts, lost: None} == without.hosts
        assert world.living() == set(before.hosts)
        state = state_of(controller, lost)
        assert (state.state, state.launches, state.crashes) == ("ready", 2, 1)
        assert published(controller) == after

    def test_a_host_that_dies_again_and_again_is_paused_and_the_next_controller_knows(
        self, world: World
    ) -> None:
        controller, deployment = world.controller(), world.deployment()
        controller.deploy(deployment)
        published(controller)
        lost = deployment.hosts[0].host_id
        for _ in range(2):
            looked_until(world, controller, lambda: lost in world.living())
            world.kill(lost)
            launches = state_of(controller, lost).launches
            looked_until(world, controller, lambda: state_of(controller, lost).state != "ready")
        looked_until(world, controller, lambda: state_of(controller, lost).state == "backing off")
        state, epoch = state_of(controller, lost), current(controller).epoch
        assert (state.crashes, state.launches) == (2, launches)
        assert state.next_try_s is not None and 0 < state.next_try_s <= 1
        assert state.reason
        assert controller.reports()[lost] == state.reason

        controller = world.controller()
        known = state_of(controller, lost)
        assert (known.crashes, known.launches) == (2, launches)
        assert known.reason == state.reason
        assert lost not in world.living()
        looked_until(world, controller, lambda: state_of(controller, lost).state == "ready")
        assert current(controller).epoch == epoch + 1
        assert current(controller).running and world.living() == set(current(controller).hosts)

    def test_a_host_that_does_not_answer_is_not_dead_and_delays_nobody(self, world: World) -> None:
        controller, deployment = world.controller(), world.deployment()
        controller.deploy(deployment)
        before = published(controller)
        frozen, lost = (spec.host_id for spec in deployment.hosts[:2])
        world.freeze(frozen)
        try:
            world.kill(lost)
            looked_until(world, controller, lambda: state_of(controller, lost).launches == 2)
            looked_until(world, controller, lambda: state_of(controller, lost).state == "ready")
            assert state_of(controller, frozen).state == "ready"
            assert current(controller).hosts[frozen] == before.hosts[frozen]
        finally:
            world.thaw(frozen)
        controller.look()
        assert state_of(controller, frozen).launches == 1

    def test_the_next_table_is_waited_for(self, world: World) -> None:
        controller = world.controller()
        assert controller.next_table(0, 0.05) == ""
        controller.deploy(world.deployment())
        told: list[str] = []
        waiting = threading.Thread(target=lambda: told.append(controller.next_table(0, TIMEOUT_S)))
        waiting.start()
        table = published(controller)
        waiting.join(TIMEOUT_S)
        assert told == [table.to_json()] == [controller.next_table(0, 0)]
        assert controller.next_table(table.epoch, 0.05) == ""

    def test_reports_say_which_host_is_dead(self, world: World) -> None:
        controller, deployment = world.controller(), world.deployment()
        controller.deploy(deployment)
        table = published(controller)
        dead, *others = (spec.host_id for spec in deployment.hosts)
        world.kill(dead)

        reports = controller.reports()
        assert isinstance(reports[dead], str) and reports[dead]
        for host_id in others:
            report = reports[host_id]
            assert isinstance(report, HostReport)
            assert report.address == table.hosts[host_id]

    def test_stop_ends_the_hosts_and_forgets_the_deployment(self, world: World) -> None:
        controller = world.controller()
        controller.deploy(world.deployment())
        published(controller)
        controller.stop()
        assert world.living() == set()
        assert controller.deployment() is None
        assert world.controller().deployment() is None
        assert world.living() == set()

        controller.deploy(world.deployment("next"))
        assert published(controller).running


class ChangeContract:
    """What a controller promises of changes of the placement; apart, since hosts must really hold experts."""

    def test_experts_are_loaded_first_then_the_table_is_flipped_then_the_old_ones_go(
        self, world: World
    ) -> None:
        controller, table = serving(world)
        giver, taker = list(table.hosts)[:2]
        following = moved(table, giver, taker)
        controller.changes.follow(following, "a test")
        looked_until(world, controller, lambda: current(controller).experts == following)
        after = current(controller)
        assert after == replace(table, epoch=table.epoch + 1, experts=following)
        # No engine was heard for long enough: nobody asks for the old ones any more.
        held = by_host(following)
        looked_until(world, controller, lambda: world.held(giver) == held.get(giver, {}))
        assert world.held(taker) == held[taker]
        assert world.living() == set(table.hosts)

    def test_old_experts_stay_while_an_engine_uses_the_old_table(self, world: World) -> None:
        controller, table = serving(world)
        giver, taker = list(table.hosts)[:2]
        before = world.held(giver)
        following = moved(table, giver, taker)
        assert controller.next_table(table.epoch, 0, "engine") == ""
        controller.changes.follow(following, "a test")
        looked_until(world, controller, lambda: current(controller).experts == following)
        controller.next_table(table.epoch, 0, "engine")
        for _ in range(3):
            controller.look()
        assert world.held(giver) == before
        controller.next_table(table.epoch + 1, 0, "engine")
        looked_until(world, controller, lambda: world.held(giver) == by_host(following).get(giver, {}))

    def test_one_change_at_a_time(self, world: World) -> None:
        controller, table = serving(world)
        giver, taker = list(table.hosts)[:2]
        controller.changes.follow(moved(table, giver, taker), "the first")
        with pytest.raises(HostError, match=r"being changed already .the first."):
            controller.changes.follow(moved(table, taker, giver), "the second")

    def test_a_host_joins_and_holds_nothing_and_another_leaves_when_it_is_empty(self, world: World) -> None:
        controller, table = serving(world)
        first = next(iter(table.hosts))
        spec = replace(world.spec("late-0"), experts={})
        controller.changes.join(spec)
        with pytest.raises(HostError, match="a host late-0 already"):
            controller.changes.join(spec)
        looked_until(world, controller, lambda: current(controller).hosts.get("late-0") is not None)
        assert current(controller).experts == table.experts
        assert world.living() == {*table.hosts, "late-0"}

        controller.changes.leave([first])
        for _ in range(3):
            controller.look()
        assert first in current(controller).hosts, "it still holds experts"
        controller.changes.follow(
            {
                layer: tuple(tuple(replaced(hosts, first, "late-0")) for hosts in rows)
                for layer, rows in table.experts.items()
            },
            "a test",
        )
        looked_until(world, controller, lambda: first not in current(controller).hosts)
        looked_until(world, controller, lambda: first not in world.living())
        assert first not in {state.host_id for state in controller.states()}
        assert world.living() == {*table.hosts, "late-0"} - {first}
        assert complete(current(controller))

    def test_a_new_controller_goes_on_with_the_change(self, world: World) -> None:
        controller, table = serving(world)
        giver, taker = list(table.hosts)[:2]
        following = moved(table, giver, taker)
        controller.changes.follow(following, "a test")
        controller = world.controller()
        looked_until(world, controller, lambda: current(controller).experts == following)
        controller = world.controller()
        looked_until(world, controller, lambda: world.held(giver) == by_host(following).get(giver, {}))
        assert current(controller).epoch == table.epoch + 1

    def test_a_host_that_dies_is_launched_with_what_the_current_table_gives_it(self, world: World) -> None:
        controller, table = serving(world)
        giver, taker = list(table.hosts)[:2]
        following = moved(table, giver, taker)
        controller.changes.follow(following, "a test")
        looked_until(world, controller, lambda: current(controller).experts == following)
        world.kill(taker)
        looked_until(world, controller, lambda: state_of(controller, taker).launches == 2)
        looked_until(world, controller, lambda: state_of(controller, taker).state == "ready")
        assert world.held(taker) == by_host(following)[taker]


def serving(world: World) -> tuple[Controller, PlacementTable]:
    controller = world.controller()
    controller.deploy(world.deployment())
    table = published(controller)
    controller.look()
    return controller, table


def replaced(hosts: tuple[str, ...], old: str, new: str) -> Iterator[str]:
    return (new if host == old else host for host in hosts)


def moved(table: PlacementTable, giver: str, taker: str) -> dict[int, tuple[tuple[str, ...], ...]]:
    """The table's placement with the first expert that `giver` alone holds of each layer at `taker`."""
    changed = {}
    for layer, rows in table.experts.items():
        number = next(n for n, hosts in enumerate(rows) if hosts == (giver,))
        changed[layer] = (*rows[:number], (taker,), *rows[number + 1 :])
    return changed
