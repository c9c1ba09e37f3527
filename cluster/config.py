"""The configuration: one frozen model of everything an operator may set. Imports neither torch nor Ray.

Read with :func:`load_config`; `docs/configuration.md` describes every key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, SecretStr, ValidationError, ValidationInfo, field_validator

from cluster.config_admin import AdminConfig
from cluster.config_autoscale import AutoscaleConfig
from cluster.config_learning import LearningConfig, unknown_keys
from cluster.config_mistakes import BadValue, raise_mistakes, schema_mistakes
from cluster.config_placement import PlacementConfig
from cluster.config_sources import KeyPath, Mistake, Origin, Sources, dotted, find_file
from cluster.config_values import (
    SECTION,
    ApiKeys,
    AutoCount,
    AutoSize,
    Count,
    Duration,
    EngineOptions,
    GpuShare,
    GroupName,
    HostCount,
    Name,
    Port,
    RayAddress,
    Size,
    is_loopback,
    parse_size,
)
from cluster.config_versions import VersionsConfig


class _Section(BaseModel):
    model_config = SECTION


class ModelConfig(_Section):
    """Which checkpoint to serve, under which name, in which precision."""

    path: Name = "default"
    name: Name | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class EngineConfig(_Section):
    """The vLLM engine: everything but the routed experts. ``options`` go to vLLM as they are.

    ``gpus``: share of each GPU that an engine on ``cuda`` takes. ``selector``: labels of the nodes that engines run
    on, in Ray's notation.
    """

    replicas: Count = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus: GpuShare = Decimal(1)
    selector: dict[str, str] = {}
    threads: AutoCount = "auto"
    max_model_len: Count | None = None
    max_num_seqs: Count = 64
    max_num_batched_tokens: Count | None = None
    kv_cache: Size = parse_size("1GiB")
    enforce_eager: bool = False
    options: EngineOptions = {}

    @property
    def gpu_shares(self) -> tuple[Decimal, ...]:
        """What one engine takes of GPUs: a share of one for each of its ranks; nothing on a CPU."""
        if self.device != "cuda":
            return ()
        sizes = (self.options.get(key) for key in ("tensor_parallel_size", "pipeline_parallel_size"))
        return (self.gpus,) * prod(size for size in sizes if isinstance(size, int))


class HostGroup(_Section):
    """Expert hosts of one kind; ``selector`` limits the nodes they may run on, ``gpus`` is each one's share of a GPU.

    ``count: per_node`` is one on every node that matches, on those that join later too.
    """

    name: GroupName = "local"
    count: HostCount = 1
    device: Literal["cpu", "cuda"] = "cpu"
    gpus: GpuShare = Decimal(1)
    memory: AutoSize = "auto"
    memory_limit: Size | None = None
    threads: AutoCount = "auto"
    selector: dict[str, str] = {}
    kernel: Literal[
        "auto",
        "bf16-weights",
        "vllm-cpu",
        "grouped-mm",
        "module",
        "vllm-cuda",
        "vllm-cuda-fp8",
        "vllm-cuda-int8",
        "noop",
    ] = "auto"
    autoscale: AutoscaleConfig | None = None

    @property
    def gpu_share(self) -> Decimal:
        """What one host takes of a GPU; 0 on a CPU."""
        return self.gpus if self.device == "cuda" else Decimal(0)

    @property
    def fewest(self) -> int:
        """Hosts that there are at least while nothing is lost; 0 where that depends on the nodes."""
        if self.count == "per_node":
            return 0
        return self.autoscale.min if self.autoscale else self.count


class ServerConfig(_Section):
    """The HTTP endpoint and its admission."""

    host: Name = "127.0.0.1"
    port: Port = 8000
    api_keys: ApiKeys = ()
    max_queue: Count = 512
    request_timeout: Duration = 600.0

    @field_validator("api_keys")
    @classmethod
    def _guard_network(cls, keys: tuple[SecretStr, ...], info: ValidationInfo) -> tuple[SecretStr, ...]:
        host = info.data.get("host")
        if host is not None and not keys and not is_loopback(host):
            raise BadValue(
                f"the server would be reachable from other machines at {host} without an API key",
                "set server.api_keys, for example to [env:EXPERTMESH_API_KEY], or server.host to 127.0.0.1",
                path=("server", "host"),
            )
        return keys


class RayConfig(_Section):
    """Which Ray cluster to join, or ``local`` for one of this process's own.

    ``controller_selector``: labels of the nodes that the controller may run on. ``nodes``: who brings nodes for
    groups that grow.
    """

    address: RayAddress = "local"
    token_path: Name | None = None
    namespace: Name = "expertmesh"
    controller_selector: dict[str, str] = {}
    nodes: Literal["ray", "operator"] = "ray"


class DataPlaneConfig(_Section):
    """How activations travel between the engine and the hosts. Durations in seconds."""

    deadline: Duration = 30.0
    min_deadline: Duration = 0.01
    connect_timeout: Duration = 60.0
    tcp: Literal["auto", "always", "never"] = "auto"


class Config(_Section):
    """Everything an operator may set, from one YAML file, the environment and flags."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    hosts: tuple[HostGroup, ...] = (HostGroup(),)
    server: ServerConfig = ServerConfig()
    ray: RayConfig = RayConfig()
    data_plane: DataPlaneConfig = DataPlaneConfig()
    placement: PlacementConfig = PlacementConfig()
    versions: VersionsConfig = VersionsConfig()
    admin: AdminConfig = AdminConfig()
    learning: LearningConfig = LearningConfig()
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("engine")
    @classmethod
    def _share_of_a_gpu(cls, engine: EngineConfig) -> EngineConfig:
        ranks = len(engine.gpu_shares)
        if engine.gpus != 1 and not ranks:
            raise BadValue(
                f"{engine.gpus} of a GPU is for engines on cuda, engine.device is {engine.device}",
                "set engine.device to cuda, or leave engine.gpus out",
                path=("engine", "gpus"),
            )
        if engine.gpus != 1 and ranks > 1:
            raise BadValue(
                f"{engine.gpus} of a GPU each is not for an engine of {ranks} ranks: "
                "Ray gives a process whole GPUs or a part of one",
                "leave engine.gpus out, or tensor_parallel_size and pipeline_parallel_size in engine.options",
                path=("engine", "gpus"),
            )
        return engine

    @field_validator("hosts")
    @classmethod
    def _some_hosts(cls, groups: tuple[HostGroup, ...]) -> tuple[HostGroup, ...]:
        if not groups:
            raise BadValue("there is no host group", "remove the key for one host on this machine")
        for index, group in enumerate(groups):
            if group.gpus != 1 and not group.gpu_share:
                raise BadValue(
                    f"{group.gpus} of a GPU is for hosts on cuda, those of {group.name} are on {group.device}",
                    f"set hosts.{index}.device to cuda, or leave hosts.{index}.gpus out",
                    path=("hosts", index, "gpus"),
                )
            bounds = group.autoscale
            if bounds is not None and group.count == "per_node":
                raise BadValue(
                    "per_node hosts come and go with their nodes",
                    f"give a number, or leave hosts.{index}.autoscale out",
                    path=("hosts", index, "count"),
                )
            if bounds is not None and not bounds.min <= int(group.count) <= bounds.max:
                raise BadValue(
                    f"{group.count} hosts to begin with, where autoscale allows {bounds.min} to {bounds.max}",
                    f"set it between the two, or change hosts.{index}.autoscale",
                    path=("hosts", index, "count"),
                )
        return groups

    @field_validator("admin")
    @classmethod
    def _ports_apart(cls, admin: AdminConfig, info: ValidationInfo) -> AdminConfig:
        server = info.data.get("server")
        if server is not None and admin.port == server.port:
            raise BadValue(
                f"{admin.port} is server.port as well",
                "give the admin API a port of its own",
                path=("admin", "port"),
            )
        return admin

    @field_validator("admin")
    @classmethod
    def _heard_by_the_operator(cls, admin: AdminConfig, info: ValidationInfo) -> AdminConfig:
        ray = info.data.get("ray")
        if ray is not None and ray.nodes == "operator" and admin.port is None:
            raise BadValue(
                "ray.nodes is operator, which hears by the admin API what is wanted",
                "set admin.port, or leave ray.nodes at ray",
                path=("admin", "port"),
            )
        return admin

    @field_validator("learning")
    @classmethod
    def _keys_of_the_server(cls, learning: LearningConfig, info: ValidationInfo) -> LearningConfig:
        server, capture = info.data.get("server"), learning.capture
        if server is None:
            return learning
        if unknown := unknown_keys(capture, server.api_keys):
            raise BadValue(
                f"{unknown} of {len(capture.keys)} keys are none of server.api_keys, so that nobody can use them",
                "name keys that the server knows, in the same words",
                path=("learning", "capture", "keys"),
            )
        if capture.without_key and server.api_keys:
            raise BadValue(
                "with server.api_keys every request has a key",
                "name those whose owners agreed in learning.capture.keys",
                path=("learning", "capture", "without_key"),
            )
        return learning

    @field_validator("versions")
    @classmethod
    def _routers_of_one_kind(cls, versions: VersionsConfig, info: ValidationInfo) -> VersionsConfig:
        placement = info.data.get("placement")
        if placement is None or not versions.spare_experts:
            return versions
        for key, value, possible in (
            ("placement.no_replica", placement.no_replica, ("fail", "drop")),
            ("placement.capacity.policy", placement.capacity.policy, ("dropless",)),
        ):
            if value not in possible:
                raise BadValue(
                    f"routers that versions may enlarge don't go with {key}: {value}",
                    f"set it to 0, or {key} to {' or '.join(possible)}",
                    path=("versions", "spare_experts"),
                )
        return versions

    @field_validator("placement")
    @classmethod
    def _enough_hosts(cls, placement: PlacementConfig, info: ValidationInfo) -> PlacementConfig:
        groups = info.data.get("hosts", ())
        # How many nodes match is not known yet.
        count = 0 if any(g.count == "per_node" for g in groups) else sum(group.fewest for group in groups)
        below, copies = max(placement.rules.numbers(), key=lambda number: number[1])
        if count and copies > count:
            plain = isinstance(placement.replicas, int)
            scaled = any(group.autoscale and group.fewest < int(group.count) for group in groups)
            there_are = f"autoscaling may leave {count}" if scaled else f"there are {count}"
            more = "a host group's autoscale.min" if scaled else "a host group's count"
            path: KeyPath = ("placement", "replicas", *(() if plain else below))
            raise BadValue(
                f"{copies} copies of {'each' if plain else 'an'} expert need as many hosts, {there_are}",
                f"raise {more}, or lower {dotted(path)}",
                path=path,
            )
        return placement


def leaves(section: BaseModel, above: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every single value with its key path, in the schema's order; an empty mapping counts as a value."""
    for name in type(section).model_fields:
        yield from _leaves(getattr(section, name), (*above, name))


def _leaves(value: object, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, BaseModel):
        yield from leaves(value, path)
    elif isinstance(value, dict) and value:
        for key, item in value.items():
            # The sources' keys are texts, a layer's number too.
            yield (*path, str(key)), item
    elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and where each of its values came from."""

    config: Config
    origins: Mapping[str, Origin]
    """By dotted key, for every single value (a list of plain values counts as one)."""
    file: Path | None
    """The file that was read, if any."""


def load_config(
    path: Path | None,
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    flag_names: Mapping[str, str] | None = None,
) -> LoadedConfig:
    """Merge flags over environment over file over defaults.

    ``path`` is ``--config``'s; without it the file that EXPERTMESH_CONFIG names is read, else
    ./expertmesh.yaml if it exists.
    ``flags`` has dotted keys (``server.port``); ``None`` means not given. ``flag_names`` gives a flag's name
    where it isn't the key's last part (``{"hosts.0.count": "--hosts"}``).

    Raises ConfigError with every mistake of all sources.
    """
    sources = Sources()
    file = find_file(path, environ)
    if file is not None:
        sources.add_file(file)
    sources.add_environment(environ)
    sources.add_flags(flags, flag_names or {})
    # `server:` with all its keys commented out is no mistake.
    tree = {key: value for key, value in sources.tree.items() if value is not None}
    mistakes = [*sources.mistakes, *_duplicate_groups(tree, sources)]
    try:
        config = Config.model_validate(tree, context={"environ": environ})
    except ValidationError as error:
        raise_mistakes([*schema_mistakes(Config, error, sources), *mistakes])
    if mistakes:
        raise_mistakes(mistakes)
    origins = {dotted(leaf): sources.value_origin(leaf) for leaf, _ in leaves(config)}
    return LoadedConfig(config, origins, file)


def _duplicate_groups(tree: Mapping[str, Any], sources: Sources) -> list[Mistake]:
    """Groups with an earlier one's name; from raw values, to be reported beside mistakes inside groups."""
    groups = tree.get("hosts")
    default = HostGroup.model_fields["name"].default
    first: dict[object, int] = {}
    mistakes = []
    for index, group in enumerate(groups if isinstance(groups, list) else ()):
        if not isinstance(group, dict):
            continue
        name = str(group.get("name", default))
        path: KeyPath = ("hosts", index, "name")
        if name in first:
            problem = f"hosts.{first[name]} has this name too"
            origin = sources.origin(path)
            mistakes.append(
                Mistake(origin, dotted(path), repr(name), problem, "give each group its own name")
            )
        first.setdefault(name, index)
    return mistakes
