"""Whether this machine can run a scenario."""

from __future__ import annotations

from cluster.errors import ConfigError
from workloads.bench import chaos_network
from workloads.bench.chaos_scenario import Scenario


def why_not(scenario: Scenario) -> str | None:
    """Why it can't be run here; None if it can."""
    return chaos_network.why_not() if scenario.wants_namespaces else None


def possible(scenario: Scenario) -> None:
    """ConfigError if it can't be run here."""
    if (reason := why_not(scenario)) is not None:
        raise ConfigError(f"scenario {scenario.name} can't be run here: {reason}", chaos_network.WAY_OUT)
