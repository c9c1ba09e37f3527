"""From a configuration and a checkpoint to what the hosts and the router are told to be.

Pure functions, but that a configuration may name a file of routing counts.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.cache_folder import cache_folder
from cluster.checkpoint import Checkpoint
from cluster.compute_environment import compute_environment
from cluster.config import Config
from cluster.deployment import Deployment, holding
from cluster.errors import CheckpointError, PlacementError
from cluster.frame import ITEM_BYTES
from cluster.inventory import slots
from cluster.live_versions import LiveVersions
from cluster.messages import (
    AdminSettings,
    CaptureSettings,
    EngineSettings,
    HostSlot,
    HostSpec,
    NodeInfo,
    RouterSpec,
    StoreAddress,
)
from cluster.placement import Plan, plan
from cluster.rehome import Limits
from cluster.replication import read_counts
from cluster.table import PlacementTable
from workloads.engine_resources import (
    engine_needs,
    engine_nodes,
    gpu_arguments,
    reserved_gpus,
    reserved_memory,
)
from workloads.models.unsupported import UNSUPPORTED
from workloads.version_store import store_address, version_settings

# Rows in one message. Prefill steps longer than this go in several rounds; it bounds the shared memory.
_MAX_ROWS = 2048


@dataclass(frozen=True)
class Blueprint:
    """Everything that `serve` starts, decided before anything is started."""

    checkpoint: Checkpoint
    dtype: str
    served_name: str
    engine_nodes: tuple[NodeInfo, ...]
    """Those that engines may run on."""
    slots: tuple[HostSlot, ...]
    plan: Plan
    deployment: Deployment


def blueprint(
    config: Config,
    checkpoint: Checkpoint,
    dtype: str,
    served_name: str,
    nodes: Sequence[NodeInfo],
    here: str = "",
    versions: LiveVersions | None = None,
) -> Blueprint:
    """Place the experts and describe every host; `here` is the id of the node that asks, `versions` what serves of
    the model's, without which there are none.

    Raises CheckpointError, ConfigError or PlacementError.
    """
    check_supported(checkpoint)
    counts = read_counts(config.placement.rules)
    engines = engine_nodes(nodes, config.engine.selector, here, config.engine.gpu_shares)
    reserved = reserved_memory(config, checkpoint, dtype, engines)
    gpus = reserved_gpus(config, engines)
    try:
        chosen = slots(config.hosts, nodes, reserved_memory=reserved, reserved_gpus=gpus)
        placed = plan(
            checkpoint.moe_layers,
            chosen,
            config.placement,
            item_bytes=ITEM_BYTES[dtype],
            counts=counts,
            nodes=nodes,
        )
    except PlacementError as error:
        if not any(reserved.values()):
            raise
        raise PlacementError(
            f"{error.message}\n  {engine_needs(config, checkpoint, dtype)}",
            f"{error.hint}; a smaller engine.kv_cache leaves more to the hosts",
        ) from None
    table = PlacementTable.from_plan(placed, checkpoint.digest, 0, versions)
    selectors = {group.name: group.selector for group in config.hosts}
    # Two servers of one machine must not meet in the abstract socket namespace.
    run = secrets.token_hex(4)
    deployment = Deployment(
        served_name,
        holding(
            host_specs(config, checkpoint, dtype, chosen, placed, nodes, run),
            table.experts,
            table.versions,
            {layer.index: layer.num_experts for layer in checkpoint.moe_layers},
        ),
        table.to_json(),
        Limits({slot.host_id: selectors[slot.group] for slot in chosen}, reserved, gpus),
        run=run,
        layers=checkpoint.moe_layers,
        item_bytes=ITEM_BYTES[dtype],
        copies=placed.copies,
        groups=config.hosts,
        placement=config.placement,
        store=store_address(config, checkpoint) if versions is not None else None,
        version_settings=version_settings(config),
        admin=admin_settings(config, checkpoint) if versions is not None else None,
        nodes=config.ray.nodes,
    )
    return Blueprint(checkpoint, dtype, served_name, engines, chosen, placed, deployment)


def admin_settings(config: Config, checkpoint: Checkpoint) -> AdminSettings | None:
    """The admin API that the controller is to serve; None for none."""
    from actors.api_access import key_digest

    admin = config.admin
    if admin.port is None:
        return None
    digests = tuple(key_digest(key.get_secret_value()) for key in admin.keys)
    return AdminSettings(admin.host, admin.port, str(checkpoint.path), digests)


def check_supported(checkpoint: Checkpoint) -> None:
    """CheckpointError for an architecture that is known not to work."""
    reason = UNSUPPORTED.get(checkpoint.model_type)
    if reason:
        raise CheckpointError(
            f"{checkpoint.path.name} is a {checkpoint.model_type} model, which is not supported: {reason}",
            "serve a Mixtral, OLMoE, Qwen-MoE, DeepSeek, GLM-4-MoE or Granite-MoE checkpoint",
        )


def host_specs(
    config: Config,
    checkpoint: Checkpoint,
    dtype: str,
    chosen: Sequence[HostSlot],
    placed: Plan,
    nodes: Sequence[NodeInfo],
    run: str,
) -> tuple[HostSpec, ...]:
    """One specification per host that has experts."""
    ip = {node.node_id: node.ip for node in nodes}
    kernel = {group.name: group.kernel for group in config.hosts}
    limit = {group.name: group.memory_limit for group in config.hosts}
    tcp = config.data_plane.tcp == "always" or (
        config.data_plane.tcp == "auto" and len({node.node_id for node in nodes}) > 1
    )
    return tuple(
        HostSpec(
            host_id=slot.host_id,
            node_id=slot.node_id,
            model_path=str(checkpoint.path),
            model=checkpoint.digest,
            manifest=checkpoint.digest,
            dtype=dtype,
            device=slot.device,
            kernel=kernel[slot.group],
            threads=slot.threads,
            experts=placed.assignments[slot.host_id],
            unix=f"expertmesh-{run}-{slot.host_id}",
            tcp_ip=ip[slot.node_id] if tcp else "",
            tcp_port=0,
            memory_limit_bytes=limit[slot.group] or 0,
            group=slot.group,
            gpus=slot.gpus,
            store=store_address(config, checkpoint),
        )
        for slot in chosen
        if placed.assignments.get(slot.host_id)
    )


def router_spec(config: Config, print_: Blueprint) -> RouterSpec:
    """What the router replicas are told to be; they ask the controller for the table when they start."""
    spec = router_spec_for(config, print_.checkpoint, print_.dtype, print_.served_name)
    return replace(spec, spread=len(print_.engine_nodes) > 1)


def capture_settings(config: Config, checkpoint: Checkpoint) -> CaptureSettings | None:
    """What routers keep of requests; None if that is nothing."""
    from actors.api_access import key_digest

    capture = config.learning.capture
    if not capture.on:
        return None
    return CaptureSettings(
        StoreAddress(config.learning.url(checkpoint.digest), dict(config.learning.options)),
        tuple(key_digest(key.get_secret_value()) for key in capture.keys),
        capture.without_key,
        capture.share,
        capture.consent or "",
        capture.domain,
        capture.shard_records,
        capture.shard_age,
        config.learning.retention,
    )


def router_spec_for(config: Config, checkpoint: Checkpoint, dtype: str, name: str) -> RouterSpec:
    """The same before anything is placed: what a rehearsal needs."""
    from actors.api_access import key_digest

    engine = config.engine
    max_rows = min(engine.max_num_batched_tokens or _MAX_ROWS, _MAX_ROWS)
    settings = EngineSettings(
        table="",
        model=checkpoint.digest,
        moe_layers=tuple(layer.index for layer in checkpoint.moe_layers),
        node_id="",
        hidden=checkpoint.hidden_size,
        top_k=checkpoint.top_k,
        dtype=dtype,
        max_rows=max_rows,
        deadline_s=config.data_plane.deadline,
        min_deadline_s=config.data_plane.min_deadline,
        no_replica=config.placement.no_replica,
        capacity=config.placement.capacity.settings(),
        connect_timeout_s=config.data_plane.connect_timeout,
        store=store_address(config, checkpoint),
        spare_experts=config.versions.spare_experts,
    )
    arguments = {
        "dtype": dtype,
        "max_num_seqs": engine.max_num_seqs,
        "kv_cache_memory_bytes": int(engine.kv_cache),
        "enforce_eager": engine.enforce_eager,
        "distributed_executor_backend": "uni",
        **(gpu_arguments(engine.gpus) if engine.device == "cuda" else attention_arguments(checkpoint, dtype)),
    }
    if engine.max_model_len is not None:
        arguments["max_model_len"] = engine.max_model_len
    if engine.max_num_batched_tokens is not None:
        arguments["max_num_batched_tokens"] = engine.max_num_batched_tokens
    return RouterSpec(
        model_path=str(checkpoint.path),
        served_name=name,
        settings=settings,
        engine={**arguments, **engine.options},
        frontend={},
        api_key_digests=tuple(key_digest(key.get_secret_value()) for key in config.server.api_keys),
        max_requests=config.server.max_queue,
        request_timeout_s=config.server.request_timeout,
        ready_timeout_s=30.0,
        http_host=config.server.host,
        http_port=config.server.port,
        capture=capture_settings(config, checkpoint),
        holdout=str(Path(config.versions.holdout).expanduser().absolute()) if config.versions.holdout else "",
    )


def attention_arguments(checkpoint: Checkpoint, dtype: str) -> dict[str, str]:
    """vLLM's choice of attention, where its own would fail: on CPUs with AMX it packs the weights of latent
    attention (DeepSeek), which it can do for 16-bit weights only."""
    latent = bool(checkpoint.text_config.get("kv_lora_rank"))
    return {"attention_backend": "CPU_MLA"} if latent and dtype == "float32" else {}


def choose_dtype(config: Config, checkpoint: Checkpoint, recommended: str | None) -> str:
    """The dtype to serve in: the configured one, else what the model's maker recommends, else the disk's."""
    if config.model.dtype != "auto":
        return config.model.dtype
    dtype = recommended or checkpoint.dtype
    if dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{checkpoint.path} holds its experts as {dtype}, which hosts can't compute in",
            "set model.dtype to float32, bfloat16 or float16",
        )
    return dtype


def served_name(config: Config, path: Path) -> str:
    """The name that API calls use: the configured one, else the folder's."""
    return config.model.name or path.name


def engine_threads(config: Config) -> int:
    """Threads of the engine process: as configured, else every core that this process may use."""
    return config.engine.threads if config.engine.threads != "auto" else len(os.sched_getaffinity(0))


def engine_environment(config: Config) -> dict[str, str]:
    """Environment of the engine's processes: the same for rehearsal and serving, or each would compile."""

    return {
        **compute_environment(engine_threads(config)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": {"debug": "DEBUG", "info": "INFO"}.get(config.log_level, "WARNING"),
        # Where it keeps what it compiled ahead of time; see `actors.saved_code`.
        "VLLM_USE_AOT_COMPILE": "1",
        "VLLM_CACHE_ROOT": str(cache_folder() / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache_folder() / "inductor"),
        # As vLLM sets it for an engine's process, which reads it when it starts. A rehearsal is one process, in which
        # that would be too late: it would compile other code than is served.
        "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        # OpenAI's own limit of n; vLLM's is 16384, with which one request keeps an engine busy for minutes.
        "VLLM_MAX_N_SEQUENCES": "128",
    }
