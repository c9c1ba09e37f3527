"""What crosses a process boundary: small frozen dataclasses, all in one place. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from cluster.live_versions import Variants


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """One node of the Ray cluster as the inventory sees it."""

    node_id: str
    ip: str
    hostname: str
    cpus: float
    gpus: float
    memory_bytes: int
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """One mixture-of-experts layer of a checkpoint."""

    index: int
    """Position in the decoder stack, as in ``model.layers.<index>``."""
    num_experts: int
    expert_parameters: int
    """Number of scalar parameters of one expert; times the item size gives its bytes."""


@dataclass(frozen=True, slots=True)
class HostSlot:
    """One expert host to be: a device share on a node."""

    host_id: str
    group: str
    device: str
    node_id: str
    memory_bytes: int
    threads: int
    gpus: Decimal = Decimal(0)
    """Its share of a GPU; 0 on a CPU."""


@dataclass(frozen=True, slots=True)
class HostCost:
    """Seconds that a host takes for its share of one layer: fixed + per_expert · experts touched + per_row · rows.

    Decode is bound by the experts touched, whose weights are read; prefill by the rows, which are multiplied and
    carried. A row counts once for each of its experts.
    """

    fixed_s: float = 0.0
    per_expert_s: float = 0.0
    per_row_s: float = 1e-6

    def __post_init__(self) -> None:
        if (
            min(self.fixed_s, self.per_expert_s, self.per_row_s) < 0
            or not self.per_expert_s + self.per_row_s > 0
        ):
            raise ValueError(f"a host can't compute in no time: {self}")

    def seconds(self, rows: float, experts: float) -> float:
        """Predicted time of one dispatch."""
        return self.fixed_s + self.per_expert_s * experts + self.per_row_s * rows


@dataclass(frozen=True, slots=True)
class HostAddress:
    """Where a running expert host listens."""

    host_id: str
    node_id: str
    unix: str
    """Name in Linux's abstract socket namespace, without the leading NUL."""
    tcp: str
    """``ip:port``; empty where the host serves its own node only."""
    pid: int


@dataclass(frozen=True, slots=True)
class HostReport:
    """What a host says of itself after loading, and in ``status``."""

    address: HostAddress
    experts_loaded: int
    weight_bytes: int
    rss_bytes: int
    load_seconds: float
    kernel: str
    connections: int
    """Engines connected now."""
    dispatches: int
    rows: int
    compute_seconds: float
    copied_from: tuple[str, ...] = ()
    """Hosts that it copied experts from; empty if it read them from the model's folder and the store of versions."""
    cost: HostCost | None = None
    """Measured at its start, or as it was at an earlier one on such a machine."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a host on a node without the model's folder may copy experts from."""

    ready: tuple[HostAddress, ...]
    loading: tuple[str, ...]
    """Ids of hosts that may be ready soon; not those that look for a source themselves."""


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """A store of versions, see `cluster.versions`."""

    url: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """The file system's own, such as ``endpoint_url``."""


@dataclass(frozen=True, slots=True)
class AdminSettings:
    """The admin API that a controller serves."""

    host: str
    port: int
    model_path: str
    """Folder of the base checkpoint, which versions are published against."""
    key_digests: tuple[str, ...] = ()
    """See `actors.api_access`; empty where no key is asked for."""


@dataclass(frozen=True, slots=True)
class Outline:
    """What a host must know of a checkpoint before it copies experts of it."""

    config: str
    """Text of config.json."""
    layers: tuple[MoeLayer, ...]
    dtypes: Mapping[int, frozenset[str]]
    """Layer index → dtypes of its experts on disk, which decide about the kernel."""


@dataclass(frozen=True, slots=True)
class CapacitySettings:
    """How many rows an expert takes in a step, and what becomes of the others; see `cluster.capacity`."""

    policy: str = "dropless"
    """dropless, reroute, defer or drop."""
    factor: float = 1.25
    min_rows: int = 4
    coefficient: float = 1.0
    """What it starts with."""
    coefficient_min: float = 0.0
    coefficient_max: float = 8.0
    target: float = 0.01
    """Share of the pairs of row and expert that may overflow."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What the router deployment hands to its engine process, as JSON in the environment."""

    table: str
    """The placement table's JSON; empty to rehearse: compile and warm up without hosts, experts give zeros."""
    model: str
    """Digest of the checkpoint, compared in the data plane's handshake."""
    moe_layers: tuple[int, ...]
    node_id: str
    hidden: int
    top_k: int
    dtype: str
    max_rows: int
    deadline_s: float
    connect_timeout_s: float
    min_deadline_s: float = 0.01
    """Shortest time after which a late host's rows are sent to another replica."""
    no_replica: str = "fail"
    """What becomes of rows whose expert has no living replica: fail, reroute or drop."""
    capacity: CapacitySettings = CapacitySettings()
    store: StoreAddress | None = None
    """Of the model's versions."""
    spare_experts: int = 0
    """Experts by which a version may enlarge a layer."""

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> EngineSettings:
        """From what `dataclasses.asdict` gave."""
        store = StoreAddress(**raw["store"]) if raw.get("store") else None
        return cls(**{**raw, "capacity": CapacitySettings(**raw["capacity"]), "store": store})


@dataclass(frozen=True, slots=True)
class HostSpec:
    """What an expert host is told to be. A restarted host gets the same one again."""

    host_id: str
    node_id: str
    model_path: str
    model: str
    """Digest of the checkpoint."""
    manifest: str
    dtype: str
    device: str
    kernel: str
    threads: int
    experts: Mapping[int, tuple[int, ...]]
    """Layer index → numbers of the experts to hold, see `cluster.live_versions`."""
    unix: str
    """Name to listen on in the abstract socket namespace."""
    tcp_ip: str
    """Address to listen on for engines of other nodes; empty for none."""
    tcp_port: int
    memory_limit_bytes: int = 0
    """Most that the process may take; 0 for no limit."""
    group: str = ""
    """Name of its host group."""
    gpus: Decimal = Decimal(0)
    """Its share of a GPU; 0 on a CPU."""
    variants: Variants = field(default_factory=dict)
    """What those numbers are that are not the base checkpoint's."""
    store: StoreAddress | None = None
    """Where their blobs are."""


@dataclass(frozen=True, slots=True)
class HostHolds:
    """What a host that is ready says of its experts."""

    holds: str
    """Digest of them, see `cluster.holdings`."""
    weight_bytes: int = 0
    adopting: str = ""
    """Digest of those that it is changing to; "" if it is not."""
    failed: int = 0
    """Number of the change that it could not make, if that was the last one that it was asked for."""
    error: str = ""
    """Why it could not."""


@dataclass(frozen=True, slots=True)
class HostProgress:
    """How far a host is with loading."""

    host_id: str
    layers_loaded: int
    layers: int
    ready: bool
    error: str
    holds: HostHolds | None = None
    """Its experts, once it is ready."""


@dataclass(frozen=True, slots=True)
class CaptureSettings:
    """What a router keeps of requests, to be learnt from."""

    stream: StoreAddress
    """Where shards are written."""
    digests: tuple[str, ...]
    """Of the API keys that agreed."""
    without_key: bool
    """Whether requests without a key are kept as well."""
    share: float
    """Of requests that are kept, 0 to 1."""
    consent: str
    """On what ground, in the operator's words."""
    domain: str
    shard_records: int
    shard_age_s: float
    """After which a shard is written that is not full yet."""
    retention_s: float
    """After which shards go."""


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """What a router replica is told to be."""

    model_path: str
    served_name: str
    settings: EngineSettings
    engine: Mapping[str, Any]
    """vLLM engine arguments beyond those that the plug-in needs."""
    frontend: Mapping[str, Any]
    """vLLM API-server arguments, such as the chat template."""
    api_key_digests: tuple[str, ...]
    max_requests: int
    """Requests let in at the same time, running and waiting."""
    request_timeout_s: float
    ready_timeout_s: float
    http_host: str
    http_port: int
    spread: bool = False
    """Whether replicas run on several nodes, and reach each other between them."""
    holdout: str = ""
    """File of texts that versions on trial are compared by; "" for none."""
    capture: CaptureSettings | None = None
    """None keeps nothing."""


@dataclass(frozen=True, slots=True)
class HostWork:
    """One host's part of one dispatch."""

    host_id: str
    rows: int
    pairs: int
    """Of row and expert."""
    experts: int
    """Distinct ones."""
    compute_s: float
    """As the host says."""


@dataclass(frozen=True, slots=True)
class DispatchSample:
    """One layer's dispatch in a step out of many, timed."""

    parts: tuple[HostWork, ...]
    seconds: float
    """From its begin to its end, in the engine."""
    step: int = 0
    """Equal for the dispatches of one step of the engine, and for no others of one message."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What an engine counted since it was last asked."""

    dispatches: int
    chosen: Mapping[int, tuple[int, ...]]
    """Layer index → per expert how often it was chosen."""
    samples: tuple[DispatchSample, ...]
    engine: str = ""
    """Who counted."""
    waiting: float | None = None
    """Requests that wait in it now; None if it does not say."""
    running: float | None = None
