"""When a scenario's events come and whom they befall: decided by the seed, before the load begins."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cluster.errors import ConfigError
from workloads.bench.chaos_scenario import CHANGES, Scenario


@dataclass(frozen=True, slots=True)
class Planned:
    """An event with its time in seconds from the load's begin, and the target that the seed chose."""

    at_s: float
    action: str
    host: str | None
    process: str | None
    name: str | None
    value: float | None
    node: str | None = None
    group: str | None = None

    @property
    def changes(self) -> bool:
        """Whether it is an operator's change."""
        return self.action in CHANGES

    @property
    def hurts(self) -> bool:
        """Whether it is a fault, not the end of one."""
        return self.action not in ("continue", "heal", "restart") and not (
            self.name == "slow" and self.value == 1
        )

    @property
    def kills(self) -> bool:
        """Whether its target is a process that will not live on."""
        return self.action == "kill" or self.name == "hoard_mib"

    @property
    def target(self) -> str:
        """Whom it befalls, for people."""
        if self.changes:
            return f"node {self.node}" if self.node else self.group or "the placement"
        return self.host or self.process or f"node {self.node}"


def plan(
    scenario: Scenario, hosts: Collection[str], seed: int, zones: Collection[str] = ()
) -> tuple[Planned, ...]:
    """The same for the same seed. `zones` are those in which hosts are now: the loss of another hurts nobody.

    ConfigError if the scenario wants a host or a node that isn't there.
    """
    dice = random.Random(f"{scenario.name}:{seed}")
    # In turn with the seeds: one that is hurt again and again is in a crash loop, and its repair is slowed down.
    turn = random.Random(scenario.name).randrange(1000) + seed
    planned: list[Planned] = []
    hit: dict[str, list[str]] = {"host": [], "node": []}
    for event in scenario.events:
        if event.at is not None:
            at_s = dice.uniform(*event.at)
        else:
            assert event.after is not None
            at_s = planned[-1].at_s + event.after
        host = _choose("host", event.host, sorted(hosts), hit, dice, turn) if event.host else None
        node = None
        if event.node:
            able = set(scenario.zones(event.action, event.node)) & set(zones)
            node = _choose("node", event.node, sorted(able), hit, dice, turn)
        planned.append(
            Planned(at_s, event.action, host, event.process, event.name, event.value, node, event.group)
        )
    return tuple(sorted(planned, key=lambda event: event.at_s))


def _choose(
    kind: str,
    wanted: str,
    choices: Sequence[str],
    hit: Mapping[str, list[str]],
    dice: random.Random,
    turn: int,
) -> str:
    if wanted == "same":
        return hit[kind][-1]
    able = {"any": list(choices), "other": [name for name in choices if name not in hit[kind]]}.get(
        wanted, [name for name in choices if name == wanted]
    )
    if not able:
        have = f"the deployment has {', '.join(choices)}" if choices else "none of them has a host"
        raise ConfigError(f"no {kind} {wanted!r} to choose", have)
    chosen = dice.choice(able) if hit[kind] else able[turn % len(able)]
    hit[kind].append(chosen)
    return chosen
