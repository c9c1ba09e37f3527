"""What a chaos run does, read from YAML: the deployment, the load, the faults, the limits.

A scenario is one of the shipped ones by name, or a file. Times are seconds from the load's begin.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from cluster.config import Config
from cluster.config_mistakes import BadValue, raise_mistakes, schema_mistakes
from cluster.config_sources import Sources
from cluster.config_values import Count, Duration, Name
from cluster.errors import ConfigError

Process = Literal["controller", "router", "engine", "head"]
Window = Annotated[
    tuple[Duration, Duration], BeforeValidator(lambda v: (v, v) if isinstance(v, str | int | float) else v)
]
Limit = Annotated[float, Field(ge=0)]


_ACTIONS = {
    "process": ("kill", "stop", "continue", "failpoint"),
    "node": ("kill", "cut", "heal"),
    "head": ("kill", "restart"),
}
# Changes that an operator makes; the mesh must go on through them as through a fault.
CHANGES = ("scale", "drain", "undrain", "rebalance")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)


class Load(_Section):
    """Greedy streams of random tokens, each going on with a new request until `duration` is over."""

    streams: Count = 16
    prompt_tokens: Count = 32
    output_tokens: Count = 64
    """The longest answers; the shortest have half as many."""
    prompts: Count = 4
    """Different prompts of one stream; it begins anew after the last."""
    repeat: bool = True
    """Without it each stream sends its prompts once, however long `duration` is."""
    duration: Duration = 15.0
    request_timeout: Duration = 120.0
    seed: int = 0


class Node(_Section):
    """A Ray node beside the head, labelled with its zone."""

    zone: Name
    cpus: Count = 1
    namespace: bool = False
    """Whether it has a network namespace of its own, so that it can be cut off; that takes root."""


class Cluster(_Section):
    """A Ray cluster of several nodes on this machine, in place of the one that `serve` starts for itself.

    Engine and controller are on its head, which has no zone.
    """

    head_cpus: Count = 2
    persistent: bool = False
    """Whether the head's control plane keeps its tables on disk, so that it can be started again."""
    nodes: tuple[Node, ...] = ()

    @model_validator(mode="after")
    def _distinct(self) -> Cluster:
        zones = [node.zone for node in self.nodes]
        if len(set(zones)) < len(zones):
            raise BadValue("two nodes have one zone", "give each a zone of its own")
        return self


class Event(_Section):
    """One fault. `host` is any (chosen by the seed), other (not one of the earlier), same (the last one), or
    a host's id; `node` the same of the zones in which hosts are; `process` is one of the others. It comes `at` a
    time or in a window, or `after` the one before. An operator's change is an event too: `scale` of a `group` to
    `value` hosts, `drain` and `undrain` of a node, `rebalance`.
    """

    action: Literal[
        "kill",
        "stop",
        "continue",
        "failpoint",
        "cut",
        "heal",
        "restart",
        "scale",
        "drain",
        "undrain",
        "rebalance",
    ]
    group: Name | None = None
    host: Name | None = None
    node: Name | None = None
    process: Process | None = None
    at: Window | None = None
    after: Duration | None = None
    name: Literal["slow", "slow_floor_ms", "hoard_mib"] | None = None
    value: Limit | None = None

    @model_validator(mode="after")
    def _whole(self) -> Event:
        if self.action in CHANGES:
            return self._whole_change()
        if self.group is not None:
            raise BadValue("only scale has a group", "give host, node or process")
        if sum(target is not None for target in (self.host, self.node, self.process)) != 1:
            raise BadValue(
                "names no target, or two", "give host or node (any, other, same or one of them) or process"
            )
        if (
            self.action
            not in _ACTIONS["node" if self.node else "head" if self.process == "head" else "process"]
        ):
            raise BadValue(
                f"{self.action} can't be done to it",
                "nodes are killed, cut and healed, the head is killed and restarted",
            )
        self._timed()
        is_failpoint = self.action == "failpoint"
        if is_failpoint != (self.name is not None) or is_failpoint != (self.value is not None):
            raise BadValue("failpoint, name and value belong together", "for example name: slow, value: 10")
        if is_failpoint and self.host is None:
            raise BadValue("failpoints are in hosts only", "give host")
        return self

    def _timed(self) -> None:
        if (self.at is None) == (self.after is None):
            raise BadValue("has no time, or two", "give at (a time or [from, to]) or after")
        if self.at is not None and self.at[0] > self.at[1]:
            raise BadValue("its window ends before it begins", "write at: [from, to]")

    def _whole_change(self) -> Event:
        wanted = {"scale": "group", "drain": "node", "undrain": "node"}.get(self.action)
        given = [key for key in ("group", "node", "host", "process") if getattr(self, key) is not None]
        if given != ([wanted] if wanted else []):
            raise BadValue(
                f"{self.action} is of {f'a {wanted}' if wanted else 'the whole mesh'}", "give just that"
            )
        if (self.action == "scale") != (self.value is not None) or self.name is not None:
            raise BadValue("scale and value belong together", "for example group: local, value: 3")
        self._timed()
        return self


class Checks(_Section):
    """Limits over all runs of the scenario; what is left out is measured and not judged."""

    errors: Limit | None = 0
    """Answers that failed other than by a 503."""
    refused: Limit | None = 0
    """Answers that failed by a 503."""
    short_answers: Limit | None = 0
    """Streams that ended like good ones with too few tokens."""
    changed_tokens: Limit | None = 0
    split_tables: Limit | None = 0
    """Times that the epoch of the controller's or an engine's table went back, or two of one epoch differed."""
    added_gap_p99_ms: Limit | None = None
    longest_first_token_ms: Limit | None = None
    itl_p99_ratio: Limit | None = None
    """p99 of the gaps from the first fault on, over that of the fault-free run."""
    first_refusal_ms: Limit | None = None
    redundancy_restored_s: Limit | None = None
    next_answer_s: Limit | None = None
    """From the server being ready again to the first good answer."""
    engine_restarts: Limit | None = 0
    not_whole: Limit | None = 0
    """Runs after which the mesh was not whole within `recovery`."""
    leaked_processes: Limit | None = 0
    leaked_shared_memory: Limit | None = 0
    """Entries of /dev/shm."""
    leaked_networks: Limit | None = 0
    """Network namespaces and links."""
    window: Duration | None = None
    """Gaps count that overlap the time from a fault to so long after the last one (default: to the end)."""


class Scenario(_Section):
    """One kind of fault."""

    name: Name
    description: Name
    deployment: dict[str, Any] = {}
    """Merged into the configuration."""
    cluster: Cluster | None = None
    load: Load = Load()
    events: tuple[Event, ...]
    checks: Checks = Checks()
    recovery: Duration = 180.0
    """How long the mesh may take to be whole again before the next run."""

    @model_validator(mode="after")
    def _ordered(self) -> Scenario:
        if not self.events:
            raise BadValue("there are no events", "give at least one")
        seen: set[str] = set()
        for number, event in enumerate(self.events):
            if number == 0 and event.at is None:
                raise BadValue("events.0 comes after nothing", "give it a time with at")
            for kind, target in (("host", event.host), ("node", event.node)):
                if target in ("other", "same") and kind not in seen:
                    raise BadValue(f"events.{number} has {kind} {target}, and there is no earlier one")
                seen |= {kind} if target else set()
        return self

    @model_validator(mode="after")
    def _possible(self) -> Scenario:
        cluster = self.cluster or Cluster()
        for number, event in enumerate(self.events):
            if event.process == "head" and not cluster.persistent:
                raise BadValue(
                    f"events.{number} is about the head, which has nothing to start from again",
                    "give cluster: {persistent: true}",
                )
            if event.node and not self.zones(event.action, event.node):
                raise BadValue(
                    f"events.{number}: no such node to {event.action}",
                    "list it under cluster.nodes, with namespace: true if it is to be cut off",
                )
        return self

    def zones(self, action: str, node: str) -> tuple[str, ...]:
        """Of the nodes that a `node` of an event may mean, those to which its action can be done."""
        return tuple(
            known.zone
            for known in (self.cluster or Cluster()).nodes
            if node in ("any", "other", "same", known.zone)
            and (known.namespace or action not in ("cut", "heal"))
        )

    @property
    def wants_namespaces(self) -> bool:
        """Whether it can be run only where network namespaces can be made."""
        return any(node.namespace for node in (self.cluster or Cluster()).nodes)


def shipped() -> dict[str, Path]:
    """The scenarios that come with the program, by name."""
    folder = Path(str(resources.files("workloads.bench") / "scenarios"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_scenario(name: str) -> Scenario:
    """The shipped scenario of that name, or the one in that file; ConfigError with every mistake in it."""
    known = shipped()
    if name in known:
        return _read(known[name], name)
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return _read(path, path.stem)
    near = get_close_matches(name, known, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"there is no scenario {name!r}", f"{guess}shipped: {', '.join(known)}; or give a YAML file's path"
    )


def deploy(scenario: Scenario, base: Config, **own: Mapping[str, Any]) -> Config:
    """`base` with the scenario's deployment merged in, and the harness's `own` sections on top of that.

    ConfigError that names the scenario's keys that are wrong.
    """
    tree: dict[str, Any] = base.model_dump(mode="json", exclude_none=True)
    # Keys would be dumped as stars; the server is the harness's own, on this machine.
    tree["server"].pop("api_keys")
    sources = Sources(tree=scenario.deployment)
    try:
        return Config.model_validate(_merged(_merged(tree, scenario.deployment), own))
    except ValidationError as error:
        mistakes = schema_mistakes(Config, error, sources)
    raise ConfigError(
        f"scenario {scenario.name}, deployment: " + "; ".join(_words(m.key, m.problem) for m in mistakes),
        mistakes[0].way_out,
    )


def _words(key: str, problem: str) -> str:
    return f"{key}: {problem}" if key else problem


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        old = both.get(key)
        both[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return both


def _read(path: Path, name: str) -> Scenario:
    sources = Sources()
    try:
        sources.add_file(path)
    except ConfigError as error:
        message = error.message.replace("the configuration file", "the scenario")
        raise ConfigError(message, error.hint.partition(" with --config")[0]) from error
    if sources.mistakes:
        raise_mistakes(sources.mistakes)
    try:
        return Scenario.model_validate({"name": name, **sources.tree})
    except ValidationError as error:
        mistakes = schema_mistakes(Scenario, error, sources)
    first, more = mistakes[0], len(mistakes) - 1
    others = f" (and {more} more)" if more else ""
    raise ConfigError(f"{first}{others}", _way_out(first.way_out))


def _way_out(hint: str) -> str:
    # The reference that the configuration's mistakes end with describes other keys.
    vague = hint.startswith("docs/") or hint == "the default is null"
    return "compare with a shipped one, `expertmesh chaos list`" if vague else hint
