"""An expert host: loads its experts, then computes for whichever engines connect.

Experts are read from the model's folder; on a node that lacks it, or has another model there, they are copied
from other hosts (`actors.peer_copy`).

A plain class; `actors.ray_hosts` wraps it in a Ray actor. Loading runs in a thread, so that the actor
answers `progress` meanwhile.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil
import structlog
import torch

from actors.adoption import Adoption
from actors.blob_server import Blobs
from actors.blob_source import FolderBlobs, HeldBlobs
from actors.expert_weights import build_layer
from actors.failpoints import Failpoints
from actors.host_cost import measured_cost
from actors.host_server import HostedLayer, HostServer
from actors.peer_copy import NoSourceError, Patience, PeerCopy, copied_checkpoint
from actors.variant_reader import VariantReader
from cluster.checkpoint import Checkpoint
from cluster.errors import CheckpointError, ExpertmeshError, HostError
from cluster.frame import manifest_id
from cluster.holdings import Holdings
from cluster.live_versions import Variants
from cluster.messages import HostAddress, HostCost, HostProgress, HostReport, HostSpec, Sources

log = structlog.get_logger()

# Experts that a host loads to measure itself if it is to hold none yet.
_TO_MEASURE: Final = 8


class ExpertHost:
    """Holds the experts that `spec` names, on one device, and serves them on the data plane."""

    def __init__(
        self,
        spec: HostSpec,
        key: bytes,
        loaded: Callable[[], None] = lambda: None,
        sources: Callable[[], Sources] | None = None,
        patience: Patience | None = None,
    ) -> None:
        """`loaded` is called in the loading thread before anybody is told that the host is ready.

        `sources` says where to copy experts from; without it the folder must be there.
        """
        self.spec = spec
        self._sources, self._patience = sources, patience
        self._blobs: Blobs | None = None
        self._copied_from: list[str] = []
        self._loaded = loaded
        self._key = key
        self._server: HostServer | None = None
        self._address: HostAddress | None = None
        self._layers: dict[int, HostedLayer] = {}
        self._adoption: Adoption | None = None
        self._cost: HostCost | None = None
        self._load_seconds = 0.0
        self._error: Exception | None = None
        self._done = threading.Event()
        self._failpoints = Failpoints(os.environ)
        self._variants = VariantReader(spec)

    def start(self) -> None:
        """Begin loading in the background."""
        threading.Thread(target=self._run, name="expertmesh-load", daemon=True).start()

    def progress(self) -> HostProgress:
        """How far loading is; `error` says why it ended, if it failed."""
        ready = self._done.is_set() and self._error is None
        error = str(self._error) if self._error else ""
        holds = self._adoption.state() if ready and self._adoption is not None else None
        layers = len(self.spec.experts)
        return HostProgress(self.spec.host_id, min(len(self._layers), layers), layers, ready, error, holds)

    def adopt(self, experts: Holdings, number: int, bandwidth: int, variants: Variants) -> None:
        """Hold these experts from now on, loading what is new at so many bytes a second; returns at once.

        `variants` says what those are that are not the base checkpoint's.
        """
        self.wait_ready(0)
        assert self._adoption is not None
        self._variants.know(variants)
        self._adoption.ask(experts, number, bandwidth)

    def wait_ready(self, timeout_s: float) -> HostAddress:
        """Where the host listens, once it does. Raises what made loading fail; TimeoutError past the time."""
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"host {self.spec.host_id} did not finish loading within {timeout_s:.0f} s")
        if self._error is not None:
            raise self._error
        assert self._address is not None
        return self._address

    def report(self) -> HostReport:
        """Sizes, kernel and counters of a ready host."""
        address = self.wait_ready(0)
        server, adoption = self._server, self._adoption
        assert server is not None and adoption is not None
        return HostReport(
            address=address,
            experts_loaded=adoption.count,
            weight_bytes=adoption.state().weight_bytes,
            rss_bytes=psutil.Process().memory_info().rss,
            load_seconds=self._load_seconds,
            kernel=", ".join(sorted({layer.experts.kernel for layer in list(self._layers.values())})),
            connections=server.connections,
            dispatches=server.dispatches_served,
            rows=server.rows_served,
            compute_seconds=server.compute_ns / 1e9,
            copied_from=tuple(self._copied_from),
            cost=self._cost,
        )

    def failpoint(self, name: str, value: float) -> None:
        """Make this host fail on purpose, see `actors.failpoints`. HostError where that is not allowed."""
        self._failpoints.set(self._layers.values(), name, value)

    def close(self) -> None:
        """Stop serving; engines see the closed connections at once."""
        if self._server is not None:
            self._server.close()

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            self._load()
            self._listen()
        except ExpertmeshError as error:
            self._error = error
        except Exception as error:
            log.exception("host failed to load", host=self.spec.host_id)
            self._error = HostError(
                f"host {self.spec.host_id} could not load: {type(error).__name__}: {error}"
            )
        self._load_seconds = time.perf_counter() - started
        self._loaded()
        self._done.set()

    def _load(self) -> None:
        spec = self.spec
        torch.set_num_threads(spec.threads)
        with self._opened() as checkpoint:
            for layer, experts in spec.experts.items():
                self._layers[layer] = self._build(checkpoint, layer, tuple(experts))
            self._hidden = checkpoint.hidden_size
            self._cost = self._measured(checkpoint)
        self._adoption = Adoption(self._layers, spec.experts, self._opened, self._build, self._variants)

    def _build(self, checkpoint: Checkpoint, layer: int, experts: tuple[int, ...]) -> HostedLayer:
        spec = self.spec
        dtype = getattr(torch, spec.dtype)
        number = checkpoint.layout(layer).num_experts
        # Twice, for other versions beside these.
        built = build_layer(
            checkpoint,
            layer,
            experts,
            dtype,
            spec.device,
            kernel=spec.kernel,
            room=2 * number,
            variant=self._variants,
        )
        return HostedLayer(built, experts, number)

    def _measured(self, checkpoint: Checkpoint) -> HostCost | None:
        """What a layer's experts cost here; of a host that holds none yet, with some that it loads for that."""
        layer = next(iter(self._layers), None)
        if layer is None:
            layer = checkpoint.moe_layers[0].index
            experts = range(min(_TO_MEASURE, checkpoint.moe_layers[0].num_experts))
            hosted = self._build(checkpoint, layer, tuple(experts))
        else:
            hosted = self._layers[layer]
        return measured_cost(self.spec, hosted.experts, len(hosted.slots), self._hidden, checkpoint.top_k)

    @contextmanager
    def _opened(self) -> Iterator[Checkpoint]:
        """The model in this node's folder, or as other hosts give it."""
        spec = self.spec
        copy = None
        if self._sources is not None:
            copy = PeerCopy(spec, self._key, self._sources, self._patience, self._copied_from)
        with self._variants.copying(copy), self._base(copy) as checkpoint:
            yield checkpoint

    @contextmanager
    def _base(self, copy: PeerCopy | None) -> Iterator[Checkpoint]:
        spec = self.spec
        try:
            checkpoint = Checkpoint.open(Path(spec.model_path))
            if checkpoint.digest != spec.model:
                raise CheckpointError(
                    f"host {spec.host_id}: {spec.model_path} is not the engine's checkpoint",
                    "put the same folder on every node, or none",
                )
            self._blobs = FolderBlobs(checkpoint)
        except CheckpointError as lack:
            if copy is None:
                raise
            log.warning("experts are copied from other hosts", host=spec.host_id, reason=lack.message)
            try:
                with copied_checkpoint(copy, spec) as (copied, outline):
                    self._blobs = HeldBlobs(outline, self._layers)
                    yield copied
            except NoSourceError as error:
                raise CheckpointError(
                    f"host {spec.host_id} on {socket.gethostname()}: {lack.message}, and {error.message}",
                    "put the model's folder there, or start a host on a node that has it",
                ) from error
        else:
            yield checkpoint

    def _listen(self) -> None:
        spec = self.spec
        server = HostServer(
            spec.host_id,
            self._layers,
            manifest=manifest_id(spec.manifest),
            model=spec.model,
            dtype=spec.dtype,
            hidden=self._hidden,
            key=self._key,
            blobs=self._blobs,
            version=self._variants.give,
        )
        server.listen_unix(spec.unix)
        tcp = server.listen_tcp(spec.tcp_ip, spec.tcp_port) if spec.tcp_ip else ""
        self._server = server
        self._address = HostAddress(spec.host_id, spec.node_id, spec.unix, tcp, psutil.Process().pid)
