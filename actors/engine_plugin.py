"""vLLM's plug-in: routed experts leave the engine.

vLLM calls `register` in each of its processes before it builds the model. From then on

    RoutedExperts  ->  MeshRoutedExperts: no weights; its apply is the op `expertmesh::experts`
    load format "expertmesh"  ->  MeshModelLoader: reads every tensor but the routed experts'
    torch.ops.expertmesh.experts  ->  the process's Dispatcher; on a GPU CudaExperts, and that for what is elsewhere

An engine that was not started with expertmesh's settings keeps vLLM's own layer, so stock vLLM runs
unchanged in the same environment. Seen to work with vLLM 0.32 on CPUs and 0.26 on GPUs; attention, gate, top-k, shared
experts and scaling stay vLLM's.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import structlog
import torch
from safetensors import safe_open
from torch import nn
from vllm.config import ModelConfig, VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import direct_register_custom_op

from actors import growing_router, openmp, saved_code, scored_router
from actors.buffers import Layout
from actors.capacity import CapacityLimit
from actors.cuda_experts import NEAR_DEADLINE_S, CudaExperts
from actors.cuda_memory import gpus_here
from actors.dense_weights import more_rows, routers_of, tensors, to_load
from actors.dispatch import Dispatcher
from actors.outages import Outages
from actors.reroute import install, keep_off
from actors.rescue import Outage
from actors.route import route_from_table
from actors.row_versions import RowVersions
from cluster.checkpoint import Checkpoint
from cluster.errors import CheckpointError
from cluster.gate import Gate
from cluster.messages import EngineSettings
from cluster.table import PlacementTable
from cluster.traffic import TRAFFIC

log = structlog.get_logger()

LOAD_FORMAT = "expertmesh"
ENABLED: dict[str, Any] = {"expertmesh": True}
"""vLLM's `additional_config` for a mesh engine. vLLM hashes it into the key of its compilation cache, so
nothing that differs from start to start may stand in it; that travels in the environment."""
SETTINGS_VARIABLE = "EXPERTMESH_ENGINE_SETTINGS"
# One engine process has one dispatcher. A custom op gets tensors and numbers only, so it must find
# the dispatcher here.
_dispatcher: Dispatcher | None = None
# What the op calls: the dispatcher itself, or the bound on its rows. Chosen once, since it is called per layer.
_compute: Callable[..., None] | None = None
# Of an engine on a GPU.
_cuda: CudaExperts | None = None
_node_id = ""
capacity_limit: CapacityLimit | None = None
"""Of an engine whose experts take a bounded number of rows; its scheduler ends each step for it."""
# And its scheduler, which runs in the same process, finds here which requests a step could not compute.
outages = Outages()
# Set by the scheduler, which runs in the same process: see `MeshScheduler.go_on_with`.
go_on_with: Callable[[Mapping[str, str]], None] | None = None
_row_versions: RowVersions | None = None
# Tensors that are not the checkpoint's, with the files that they came from.
_dense: dict[str, str] = {}
# Of each layer's router, where versions may change how many experts there are.
_rows: dict[int, growing_router.Rows] = {}
_PR_SET_PDEATHSIG = 1
# How long a step waits for a host's word on the memory that it lends.
_PATIENCE_S = 0.25
_library = torch.library.Library("expertmesh", "FRAGMENT")


def register() -> None:
    """Install the layer, the loader and the op. vLLM may call this more than once in a process."""
    openmp.remove_registration()
    from vllm.model_executor.custom_op import op_registry_oot

    if "RoutedExperts" in op_registry_oot:
        return
    RoutedExperts.register_oot(MeshRoutedExperts, name="RoutedExperts")
    register_model_loader(LOAD_FORMAT)(MeshModelLoader)
    direct_register_custom_op("experts", _experts, fake_impl=_experts_shape, target_lib=_library)


def enabled(config: VllmConfig) -> bool:
    """Whether this engine was started for the mesh; a stock engine was not."""
    additional = config.additional_config
    return isinstance(additional, dict) and bool(additional.get("expertmesh"))


def environment(settings: EngineSettings, key: bytes) -> dict[str, str]:
    """Environment variables that bring the settings and the data plane's key into the engine's processes."""
    return {SETTINGS_VARIABLE: json.dumps({**asdict(settings), "key": key.hex()})}


def _read_environment() -> tuple[EngineSettings, bytes]:
    raw = json.loads(os.environ[SETTINGS_VARIABLE])
    key = bytes.fromhex(raw.pop("key"))
    return EngineSettings.read(raw), key


def _experts(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """Rows [T, H], float32 weights [T, K] and int32 ids [T, K] of one layer → weighted sums [T, H].

    With the capacity's policy `reroute` the weights are [T, K + E]; see `actors.scored_router`.
    """
    if _compute is None:
        return torch.zeros_like(x)  # a rehearsal: see `EngineSettings.table`
    out = torch.empty_like(x)
    if len(x):
        try:
            _compute(layer, x, weights, ids, out)
        except Exception as error:
            # Raised here it would end the engine, and with it every request.
            log.exception("dispatch failed", layer=layer, rows=len(x))
            out.zero_()
            outages.note(Outage(layer, tuple(range(len(x))), str(error), degraded=False))
    return out


def _experts_on_gpu(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """The same for a GPU's stream: what is launched depends on nothing but the number of rows."""
    if _cuda is None:
        return torch.zeros_like(x)
    return _cuda(
        layer, x.contiguous(), weights.to(torch.float32).contiguous(), ids.to(torch.int32).contiguous()
    )


def _experts_shape(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.empty_like(x)


class MeshRoutedExperts(RoutedExperts):
    """vLLM's routed experts without weights: `apply` sends the rows to the expert hosts."""

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> FusedMoEMethodBase:
        self.remote = enabled(get_current_vllm_config())
        if not self.remote:
            return super()._get_quant_method(prefix, quant_config, moe_config)
        if self.apply_router_weight_on_input:
            raise CheckpointError(
                f"{prefix} multiplies the router's weight into the experts' input",
                "expertmesh applies it to their output; this architecture is not supported yet",
            )
        return RemoteExpertsMethod(moe_config, extract_layer_index(prefix))

    def load_weights(self, weights: Any) -> Iterable[str]:
        if not self.remote:
            return iter(super().load_weights(weights))
        for _ in weights:
            pass  # a checkpoint loaded in another format may still offer the experts' tensors
        return iter(())

    def get_expert_weights(self) -> Any:
        return () if self.remote else super().get_expert_weights()


class RemoteExpertsMethod(FusedMoEMethodBase):
    """The quantisation method of a layer whose experts live elsewhere."""

    def __init__(self, moe: Any, layer: int) -> None:
        super().__init__(moe)
        self._layer = layer
        # With tensor parallelism the runner sums over ranks: one rank brings the result, the rest zeros.
        self._sends = get_tensor_model_parallel_rank() == 0

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """None: the experts' weights never enter this process."""

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        return None

    def maybe_make_prepare_finalize(self, *args: Any, **kwargs: Any) -> None:
        """Asked for by vLLM 0.26; there is nothing to prepare."""

    def apply(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        if not self._sends:
            return torch.zeros_like(x)
        if x.is_cuda:
            # vLLM's own op around it is opaque to the compiler, and what is launched here can be captured.
            return _experts_on_gpu(x, topk_weights, topk_ids, self._layer)
        return torch.ops.expertmesh.experts(
            x.contiguous(),
            topk_weights.to(torch.float32).contiguous(),
            topk_ids.to(torch.int32).contiguous(),
            self._layer,
        )


class MeshModelLoader(DefaultModelLoader):
    """Reads a checkpoint's safetensors without its routed experts, then connects to the hosts."""

    def __init__(self, load_config: Any) -> None:
        # vLLM's own reader is asked for safetensors; only which tensors are read differs.
        super().__init__(load_config)

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        checkpoint = Checkpoint.open(Path(model_config.model))
        by_file: dict[Path, list[str]] = {}
        for name, entry in checkpoint.tensors.items():
            if not checkpoint.is_expert_tensor(name):
                by_file.setdefault(checkpoint.path / entry.file, []).append(name)
        for file, names in by_file.items():
            with safe_open(file, framework="pt") as tensors:
                for name in names:
                    yield name, tensors.get_tensor(name)

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing to do: the folder is local."""

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        if not enabled(vllm_config):
            raise CheckpointError(
                f"load format {LOAD_FORMAT!r} is expertmesh's own", "use `expertmesh serve`"
            )
        settings, key = _read_environment()
        _end_with_parent()
        if vllm_config.device_config.device_type == "cpu":
            saved_code.make_loadable()
        model = super().load_model(vllm_config, model_config, prefix)
        _check_coverage(model, settings)
        gates = scored_router.install(model) if settings.capacity.policy == "reroute" else {}
        masks = install(model) if settings.no_replica == "reroute" else {}
        if settings.spare_experts:
            _rows.update(growing_router.install(model, settings.spare_experts))
        if settings.table:
            _connect(settings, key, masks)
            largest = vllm_config.scheduler_config.max_num_batched_tokens
            _bound(settings, largest, gates)
            if vllm_config.device_config.device_type == "cuda":
                _map(settings, key, largest)
        return model


def _end_with_parent() -> None:
    """Have the kernel end this process when the router's does: killed, that one can't tell it to."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _check_coverage(model: nn.Module, settings: EngineSettings) -> None:
    """Refuse a model with an MoE layer that vLLM did not build from `RoutedExperts`: it would stay empty."""
    remote: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, MoERunner):
            continue
        if not isinstance(module.routed_experts, MeshRoutedExperts):
            raise CheckpointError(
                f"{type(model).__name__}: {name} brings its own expert layer, "
                f"{type(module.routed_experts).__name__}",
                "expertmesh can't take these experts out of the engine; this architecture is not supported",
            )
        remote.add(extract_layer_index(name))
    missing = sorted(set(settings.moe_layers) - remote)
    if missing:
        raise CheckpointError(
            f"{type(model).__name__}: vLLM built no replaceable experts for layers {missing}",
            "this architecture is not supported",
        )


def _connect(settings: EngineSettings, key: bytes, masks: dict[int, torch.Tensor]) -> None:
    global _dispatcher
    table = PlacementTable.from_json(settings.table)
    _dispatcher = Dispatcher(
        route_from_table(table),
        Layout(settings.max_rows, settings.hidden, settings.top_k, settings.dtype),
        node_id=settings.node_id,
        model=settings.model,
        key=key,
        deadline_s=settings.deadline_s,
        min_deadline_s=settings.min_deadline_s,
        # A row whose expert is lost while the router has chosen it already can only be computed without.
        drop=settings.no_replica != "fail",
        on_outage=outages.note,
        keep_off=partial(keep_off, masks) if masks else None,
        spare_experts=settings.spare_experts,
    )
    _dispatcher.peers.connect(settings.connect_timeout_s)
    _use_versions()


def _use_versions() -> None:
    """Compute each row with its version's experts, where there are such."""
    global _row_versions
    assert _dispatcher is not None
    if _row_versions is None:
        _row_versions = RowVersions(outages.runs, _not_loaded)
    route = _dispatcher.peers.route
    _row_versions.set_versions(route.versions, route.sizes)
    _dispatcher.versions = None if _row_versions.plain else _row_versions


def _not_loaded(rows: tuple[int, ...]) -> None:
    outages.note(Outage(0, rows, "the request's version is not loaded any more", degraded=False))


def _bound(settings: EngineSettings, largest: int, gates: dict[int, Gate]) -> None:
    """Choose what the op calls; `largest` is the most rows that a step may have."""
    global _compute, capacity_limit
    assert _dispatcher is not None
    _compute, capacity_limit = _dispatcher, None
    if settings.capacity.policy != "dropless":
        _compute = capacity_limit = CapacityLimit(
            _dispatcher, settings.capacity, largest=largest, gates=gates, outages=outages
        )


def _map(settings: EngineSettings, key: bytes, largest: int) -> None:
    """Take the experts of the hosts on this process's GPU; the dispatcher is for all others."""
    global _cuda, _node_id
    assert _dispatcher is not None
    if settings.capacity.policy != "dropless" or settings.no_replica != "fail" or settings.spare_experts:
        raise CheckpointError(
            "an engine on a GPU knows neither capacities, nor routers that change, nor what to do without a replica",
            "leave placement.capacity, placement.no_replica and versions.spare_experts as they are by default",
        )
    route = _dispatcher.peers.route
    _node_id = settings.node_id
    _cuda = CudaExperts(
        Layout(largest, settings.hidden, settings.top_k, settings.dtype),
        route.sizes,
        device=torch.device("cuda", torch.cuda.current_device()),
        model=settings.model,
        key=key,
        # The dispatcher's own deadlines come first: this is for a thread that died.
        deadline_s=4 * settings.deadline_s,
        near_deadline_s=NEAR_DEADLINE_S if gpus_here() > 1 else None,
    )
    _cuda.use(route, settings.node_id, settings.connect_timeout_s)
    _cuda.settle()
    _dispatcher.counts_routing = False
    _cuda.dispatch_to(_compute_elsewhere)


def _compute_elsewhere(
    layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, out: torch.Tensor
) -> None:
    """In the exchange's thread: what the op does on a CPU."""
    assert _compute is not None
    try:
        _compute(layer, x, weights, ids, out)
    except Exception as error:
        out.zero_()
        outages.note(Outage(layer, tuple(range(len(x))), str(error), degraded=False))
        raise


class WorkerExtension:
    """Methods that the router deployment calls in the worker between two steps (`collective_rpc`)."""

    def expertmesh_set_table(self, table: str) -> int:
        """Route by another placement table, and compute with its versions, from the next step on.

        The number of experts that are to be taken over by `expertmesh_settle`: none but on a GPU.
        """
        assert _dispatcher is not None
        began = perf_counter_ns()
        route = route_from_table(PlacementTable.from_json(table))
        if _cuda is not None:
            if any(route.versions.variants.values()):
                raise CheckpointError(
                    "an engine on a GPU computes with the base checkpoint's experts only",
                    "serve versions with engines on CPUs (engine.device: cpu)",
                )
            # Its thread dispatches for steps that are under way.
            torch.cuda.synchronize()
        _dispatcher.peers.set_route(route)
        _use_versions()
        if _cuda is not None:
            _cuda.use(route, _node_id, _PATIENCE_S)
        stats = _dispatcher.stats
        stats.slowest_table_ns = max(stats.slowest_table_ns, perf_counter_ns() - began)
        return 0 if _cuda is None else _cuda.left

    def expertmesh_settle(self, seconds: float) -> int:
        """On a GPU: take over experts of the table's hosts for about so long; how many are left for another call.

        Until an expert's turn comes its memory is that of the host that lent it before, dead or alive.
        """
        return 0 if _cuda is None else _cuda.settle(seconds)

    def expertmesh_use_dense(self, files: dict[str, str], retired: dict[int, list[int]]) -> float:
        """Have the tensors in these files, and the checkpoint's for all others, and routers that are kept off retired
        experts (by layer), from the next step on; seconds.

        What was computed with others must not be used any more.
        """
        global _dense
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        checkpoint = Checkpoint.open(Path(runner.model_config.model))
        began = perf_counter_ns()
        names = to_load(checkpoint, _dense, files)
        if names:
            runner.reload_weights(weights_iterator=tensors(checkpoint, names, files))
        growing_router.use(
            _rows, more_rows(checkpoint, routers_of(checkpoint, files)) if _rows else {}, retired
        )
        _dense = files
        return (perf_counter_ns() - began) / 1e9

    def expertmesh_go_on_with(self, continued: dict[str, str]) -> None:
        """Have running requests go on with other versions; between two steps, with an empty cache."""
        assert go_on_with is not None
        go_on_with(continued)

    def expertmesh_attach(self) -> None:
        """Tell the process which rows of a step are whose; once, before the first request."""
        outages.attach(self.model_runner)  # type: ignore[attr-defined]
        if _dispatcher is not None:
            _dispatcher.take_traffic()  # of the warm-up, which is nobody's

    def expertmesh_traffic(self) -> str:
        """What was counted since the last call, JSON of a Traffic."""
        assert _dispatcher is not None
        traffic = _dispatcher.take_traffic()
        if _cuda is not None:
            traffic = replace(traffic, chosen=_cuda.take_counts())
            _cuda.look()
        return TRAFFIC.dump_json(traffic).decode()

    def expertmesh_reachable(self) -> dict[str, float]:
        """Round-trip seconds per expert host that is asked; raises if an expert has no living replica."""
        assert _dispatcher is not None
        return _dispatcher.peers.reachable()

    def expertmesh_parameter_names(self) -> list[str]:
        """Names of the parameters that this process holds: none of a routed expert."""
        return [name for name, _ in self.model_runner.model.named_parameters()]  # type: ignore[attr-defined]

    def expertmesh_stats(self) -> dict[str, Any]:
        """Counters since start, the process's resident bytes, and under `hosts` how each host stands."""
        import psutil

        assert _dispatcher is not None
        # First: it may change the counters.
        standing, stats = _dispatcher.peers.standing(), _dispatcher.stats
        return {
            "dispatches": stats.dispatches,
            "rows": stats.rows,
            "seconds": stats.nanoseconds / 1e9,
            "slowest_seconds": stats.slowest_ns / 1e9,
            "slowest_table_seconds": stats.slowest_table_ns / 1e9,
            "lost": stats.lost,
            "late": stats.late,
            "hedges": stats.hedges,
            "failovers": stats.failovers,
            "let_back": stats.let_back,
            "ejected": stats.ejected,
            "unanswered_rows": stats.unanswered_rows,
            "degraded_rows": stats.degraded_rows,
            "capacity_coefficient": stats.capacity_coefficient,
            "capacity_pairs": stats.capacity_pairs,
            "overflow_pairs": stats.overflow_pairs,
            "overflow_rerouted_rows": stats.overflow_rerouted_rows,
            "overflow_dropped_rows": stats.overflow_dropped_rows,
            "overflow_deferred_steps": stats.overflow_deferred_steps,
            "last_detect_monotonic_ns": stats.last_detect_ns,
            "last_reroute_monotonic_ns": stats.last_reroute_ns,
            "epoch": _dispatcher.peers.route.epoch,
            "table": _dispatcher.peers.route.digest,
            "mapped": {} if _cuda is None else _cuda.mapped,
            "asked": {} if _cuda is None else _cuda.asked,
            "rss_bytes": psutil.Process().memory_info().rss,
            "pid": os.getpid(),
            "hosts": standing,
        }
