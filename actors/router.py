"""The router deployment: one vLLM engine behind Ray Serve, with vLLM's own OpenAI application.

    1. vLLM is imported while the hosts still load; then the controller is asked for the placement table
    2. the engine core starts as a process of its own, loads the dense weights, connects to the hosts
    3. vLLM's FastAPI application, with /ready added and the metrics of the mesh beside vLLM's, is served on
       the replica's own socket (`actors.http_server`)
    4. Serve restarts the replica if `check_health` says that the engine is gone

No OpenAI type or route is written here: they are vLLM's.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from fastapi import FastAPI

from actors import openmp
from actors.canary_watch import CanaryWatch
from actors.capture import Recorder
from actors.daemon_thread import in_daemon_thread
from actors.dense_files import DenseFiles
from actors.neighbours import NATS, HandedOn, Neighbours, engine_name, others
from actors.own_requests import PROBE
from actors.pinning import Pins, pinned_to
from actors.replay import Replay
from actors.router_metrics import MeshMetrics, RoutingMetrics, VersionMetrics
from actors.router_metrics import queue as engine_queue
from actors.router_routes import finish
from actors.saved_code import processor_digest
from actors.version_swap import VersionSwap
from cluster.auth import data_plane_key
from cluster.canary import Observed
from cluster.live_versions import others_for, same_but_choice
from cluster.messages import CaptureSettings, RouterSpec, Traffic
from cluster.table import PlacementTable
from cluster.traffic import TRAFFIC, Routing

log = structlog.get_logger()

_STATS_PERIOD_S = 5.0
# How long one call waits for the next table, and the pause after a call that failed.
_TABLE_WAIT_S, _TABLE_RETRY_S = 30.0, 0.5
_DRAIN_POLL_S = 0.05
# How long an engine on a GPU takes experts over between two steps.
_SETTLE_S = 0.02
_SETTLE_PAUSE_S = 0.005

NextTable = Callable[[int, float, str, list[str]], str]


class Router:
    """One replica of the router deployment. Serve makes it in an actor; tests call it directly."""

    def __init__(
        self,
        spec: RouterSpec,
        fetch_table: Callable[[], str],
        node_id: str,
        next_table: NextTable | None = None,
        report: Callable[[Traffic], Routing | None] | None = None,
        experts: Callable[[], str] | None = None,
        observe: Callable[[Observed], None] | None = None,
        inner: tuple[str, int] = ("127.0.0.1", 0),
    ) -> None:
        """`fetch_table` waits for the first table; `next_table` for one after an epoch, at most so many seconds, and is
        told this replica's name and the manifests of running requests; `report` is told of the traffic, every few
        seconds, and says how even it is; `experts` gives the JSON of all that is known of the experts; `observe` is
        told what is seen of a version on trial; at `inner`, host and port, other replicas reach this one.
        """
        self.spec = spec
        self._report, self.experts, self._observe = report, experts, observe
        self._fetch_table, self._next_table = fetch_table, next_table
        self._node_id = node_id
        self.engine: Any = None
        self.metrics, self.routing_metrics = MeshMetrics(), RoutingMetrics()
        self.version_metrics = VersionMetrics()
        self.recorder: Recorder | None = None
        """Of requests that are kept to be learnt from."""
        self._name = engine_name(os.urandom(8).hex(), *inner)
        self.pins, self.neighbours = Pins(self._name), Neighbours(data_plane_key)
        self.watch = CanaryWatch(self.pins)
        self._dense = DenseFiles(spec.settings.store)
        self._swap = VersionSwap(self.pins, self._dense, lambda: self.engine)
        self._epoch = -1
        self._table: PlacementTable | None = None
        # The engine is being told of a table that requests are chosen by already.
        self._behind: asyncio.Task[None] | None = None
        self._background: list[asyncio.Task[None]] = []

    async def start(self) -> FastAPI:
        """Start the engine and return the application that serves it."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import FrontendArgs
        from vllm.usage.usage_lib import UsageContext

        from actors.engine_plugin import environment
        from actors.mesh_llm import MeshLLM

        loop = asyncio.get_running_loop()
        engine_args = AsyncEngineArgs(**engine_arguments(self.spec))
        config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        table = await loop.run_in_executor(None, self._fetch_table)
        first = PlacementTable.from_json(table)
        self._epoch, self._table = first.epoch, first
        await loop.run_in_executor(None, self._dense.fetch, first.versions)
        settings = replace(self.spec.settings, table=table, node_id=self._node_id)
        os.environ.update(environment(settings, data_plane_key()))
        openmp.preload(os.environ)
        # Starting blocks for as long as the engine loads; Serve's probes must be answered meanwhile.
        self.engine = await loop.run_in_executor(
            None,
            lambda: MeshLLM.from_vllm_config(
                config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                enable_log_requests=False,
                disable_log_stats=False,
            ),
        )
        self.engine.pin(self.pins, self.watch)
        fingerprint = {"fingerprint_mode": "custom", "fingerprint_value": self.pins.placeholder}
        frontend = FrontendArgs(**{**fingerprint, **self.spec.frontend})
        args = argparse.Namespace(**(vars(frontend) | vars(engine_args)))
        self.engine.degraded = {}
        await self.engine.collective_rpc("expertmesh_attach")
        await self._swap.to(first.versions)
        if self.spec.capture is not None:
            self.recorder = self._recorder(self.spec.capture)
        tasks = await self.engine.get_supported_tasks()
        app = build_app(args, tasks, self.engine.model_config)
        await init_app_state(self.engine, app.state, args, tasks)
        finish(app, self)
        # An engine that loads but can't compute a token must fail here, not call itself running.
        await self.ready()
        self._background.append(asyncio.create_task(self._watch_stats()))
        self._background.append(asyncio.create_task(self._watch_traffic()))
        if self.spec.holdout:
            self._background.append(asyncio.create_task(self._replay(Path(self.spec.holdout)).run()))
        if self._next_table is not None:
            self._background.append(asyncio.create_task(self._watch_table(self._next_table)))
        return app

    def _replay(self, path: Path) -> Replay:
        tokenizer = self.engine.get_tokenizer()
        return Replay(self.pins, path, tokenizer.encode, self._nats, self.watch.predicted)

    def _recorder(self, settings: CaptureSettings) -> Recorder:
        from cluster.learning.stream import Stream

        tokenizer = self.engine.get_tokenizer()

        def render(messages: list[dict[str, Any]]) -> str:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

        stream = Stream(settings.stream.url, **settings.stream.options)
        recorder = Recorder(settings, stream, render)
        recorder.start()
        return recorder

    def handed_on(self, app: FastAPI) -> HandedOn:
        """What other replicas may ask of this one."""
        return HandedOn(app, data_plane_key(), self._nats)

    async def _nats(self, tokens: list[int], manifest: str) -> float:
        """How little a version expects a text, per token; asked of another replica if this engine can't compute it."""
        for engine in others_for(self.pins.versions, self._name, manifest):
            answer = await self.neighbours.post(engine, NATS, manifest, {"tokens": tokens})
            return float(answer.raise_for_status().json()["nats"])
        with pinned_to(manifest):
            return float(await self.engine.nats(tokens))

    async def ready(self) -> dict[str, Any]:
        """Ask every expert host and one token of the engine; raises what does not answer."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        round_trips = (await self.engine.collective_rpc("expertmesh_reachable"))[0]
        sampling = SamplingParams(max_tokens=1, temperature=0.0, output_kind=RequestOutputKind.FINAL_ONLY)
        request_id = f"{PROBE}{os.urandom(8).hex()}"
        async for _ in self.engine.generate(
            {"prompt_token_ids": [self._probe_token()]}, sampling, request_id
        ):
            pass
        return {"ready": True, "host_round_trip_us": {k: round(v * 1e6, 1) for k, v in round_trips.items()}}

    @property
    def others(self) -> list[str]:
        """Names of the other replicas, as far as they matter now: while a version is on trial."""
        return others(self.pins.versions.engines, self._name)

    async def stats(self) -> dict[str, Any]:
        """The engine process's counters, and how its hosts stand."""
        return (await self.engine.collective_rpc("expertmesh_stats"))[0]

    async def set_table(self, table: str) -> int:
        """Route by another placement table from the next step on; returns its epoch."""
        new, before = PlacementTable.from_json(table), self._table
        if self._behind is not None:
            behind, self._behind = self._behind, None
            await behind
        if before is not None and _only_choice(before, new) and self._swap.can_now(new.versions):
            # The engine knows these versions, and can be told between two steps.
            await self._swap.to(new.versions)
            self._behind = asyncio.create_task(self._tell_engine(table))
        else:
            await in_daemon_thread(partial(self._dense.fetch, new.versions))
            await self._tell_engine(table)
            # Only now: the engine must know a version before it is asked for it.
            await self._swap.to(new.versions)
        self._epoch, self._table = new.epoch, new
        return new.epoch

    async def _tell_engine(self, table: str) -> None:
        left = sum(await self.engine.collective_rpc("expertmesh_set_table", args=(table,)))
        while left:
            # Steps go on in between, and hosts on other GPUs get ready.
            await asyncio.sleep(_SETTLE_PAUSE_S)
            left = sum(await self.engine.collective_rpc("expertmesh_settle", args=(_SETTLE_S,)))

    async def check_health(self) -> None:
        """Raises if the engine process is gone, so that Serve replaces the replica."""
        if self.engine is not None:
            await self.engine.check_health()

    async def drain(self, grace_s: float) -> None:
        """Let running requests end for `grace_s` seconds, abort the others, and end the engine process."""
        if self.engine is not None:
            requests = self.engine.output_processor.request_states
            deadline = time.monotonic() + grace_s
            while requests and time.monotonic() < deadline:
                await asyncio.sleep(_DRAIN_POLL_S)
            # Their streams end with finish_reason "abort"; without it they would hang.
            await self.engine.abort(list(requests), internal=True)
        await asyncio.get_running_loop().run_in_executor(None, self.shutdown)

    def shutdown(self) -> None:
        """End the engine process; a second call does nothing."""
        for task in self._background:
            task.get_loop().call_soon_threadsafe(task.cancel)
        self._dense.close()
        recorder, self.recorder = self.recorder, None
        if recorder is not None:
            recorder.stop()
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.shutdown()
            end_resource_tracker()

    def _probe_token(self) -> int:
        tokens = self.engine.model_config.hf_text_config
        bos = getattr(tokens, "bos_token_id", None)
        return bos if isinstance(bos, int) else 0

    async def _watch_table(self, next_table: NextTable) -> None:
        """Follow the controller's table. Without a controller the last one stays in use."""
        while True:
            try:
                running = list(self.pins.running)
                table = await in_daemon_thread(
                    partial(next_table, self._epoch, _TABLE_WAIT_S, self._name, running)
                )
                # An older one may come from a controller that was restarted and has not caught up.
                if table and PlacementTable.from_json(table).epoch > self._epoch:
                    epoch = await self.set_table(table)
                    log.info("placement table in use", epoch=epoch)
            except Exception as error:
                log.warning("placement table can't be followed", reason=str(error).strip().splitlines()[-1:])
                await asyncio.sleep(_TABLE_RETRY_S)

    async def _watch_stats(self) -> None:
        while True:
            try:
                self.metrics.update(await self.stats())
                self.version_metrics.update(self.pins.versions, self.pins.running, self.pins.admitted)
            except Exception as error:
                log.warning("engine stats unavailable", reason=str(error))
            await asyncio.sleep(_STATS_PERIOD_S)

    async def _watch_traffic(self) -> None:
        # By itself: the controller may be away for a while.
        while True:
            try:
                await self._tell()
            except Exception as error:
                log.warning("traffic not told", reason=str(error).strip().splitlines()[-1:])
            await asyncio.sleep(_STATS_PERIOD_S)

    async def _tell(self) -> None:
        """Tell the controller which experts were asked for; what it does not hear is lost, not counted twice."""
        seen = self.watch.take()
        if seen is not None and (observe := self._observe) is not None:
            await in_daemon_thread(partial(observe, seen))
        if self._report is None:
            return
        traffic = TRAFFIC.validate_json((await self.engine.collective_rpc("expertmesh_traffic"))[0])
        queue, report = engine_queue(len(self.engine.output_processor.request_states)), self._report
        told = replace(
            traffic,
            engine=self._name,
            waiting=queue.waiting if queue else None,
            running=queue.running if queue else None,
        )
        routing = await in_daemon_thread(lambda: report(told))
        if routing is not None:
            self.routing_metrics.update(routing)


def _only_choice(before: PlacementTable, after: PlacementTable) -> bool:
    """Whether the engine asks the same hosts for the same by either table."""
    same = replace(after, epoch=before.epoch, versions=before.versions) == before
    return same and same_but_choice(before.versions, after.versions)


def end_resource_tracker() -> None:
    """Have Python's resource tracker remove the engine's semaphores now.

    Ray kills a worker with its whole process group, the tracker included, so that it could not do so later.
    """
    from multiprocessing import resource_tracker

    stop = getattr(resource_tracker._resource_tracker, "_stop", None)
    if stop is not None:
        stop()


def engine_arguments(spec: RouterSpec) -> dict[str, Any]:
    """vLLM's engine arguments for a mesh engine."""
    from actors.engine_plugin import ENABLED, LOAD_FORMAT

    settings = spec.settings
    # These are part of the compiled model, as instructions, as a mask on the router, as further columns and as further
    # rows, so they must be part of its key.
    compiled: dict[str, Any] = {"processor": processor_digest(), "no_replica": settings.no_replica}
    if settings.capacity.policy == "reroute":
        compiled["capacity"] = "reroute"
    if settings.spare_experts:
        compiled["spare_experts"] = settings.spare_experts
    unbounded = settings.capacity.policy == "dropless"
    return {
        "model": spec.model_path,
        "served_model_name": [spec.served_name],
        "load_format": LOAD_FORMAT,
        "worker_extension_cls": "actors.engine_plugin.WorkerExtension",
        "scheduler_cls": (
            "actors.engine_scheduler.MeshScheduler"
            if unbounded
            else "actors.capacity_scheduler.CapacityScheduler"
        ),
        "additional_config": {**ENABLED, **compiled},
        **spec.engine,
    }
