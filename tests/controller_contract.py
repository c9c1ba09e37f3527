"""What a controller promises, whatever its hosts and its store are made of.

Unit tests run it over hosts in memory, integration tests over Ray actors. A subclass gives the fixture `world`.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

import pytest

from cluster.controller import Controller, Deployment
from cluster.errors import HostError
from cluster.messages import HostReport
from cluster.table import PlacementTable

TIMEOUT_S = 60.0


class World(Protocol):
    """Hosts and a store that outlive a controller."""

    def controller(self) -> Controller:
        """A new controller over the same hosts and the same store, as after a crash."""

    def deployment(self, name: str = "model") -> Deployment:
        """Something to run, on two hosts or more."""

    def hanging(self) -> Deployment:
        """The same, but its first host never becomes ready."""

    def kill(self, host_id: str) -> None:
        """End a host behind the controller's back, for good."""

    def living(self) -> set[str]:
        """Ids of the hosts that run."""


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
        assert after.epoch == before.epoch + 1
        assert after.hosts[lost] != before.hosts[lost]
        kept = {host_id for host_id in before.hosts if host_id != lost}
        assert {host_id: after.hosts[host_id] for host_id in kept} == {
            host_id: before.hosts[host_id] for host_id in kept
        }
        assert world.living() == set(before.hosts)

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
