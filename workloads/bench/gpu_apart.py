"""How long a layer's rows are away when their experts are on another GPU: beside NCCL and the barest exchange by flags.

neighbour      post and collect in a graph, a host's process on the other GPU, experts that compute nothing
device-floor   two processes, kernels that write the other GPU's memory and spin on a flag in their own
nccl           the rows sent and received back through torch's NCCL, launched each time
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from actors.buffers import Layout
from actors.cuda_driver import kernel, launch
from actors.cuda_exchange import Exchange
from actors.cuda_memory import CudaSlots
from actors.gpu_neighbours import GpuNeighbours
from cluster.messages import HostAddress
from workloads.bench.gpu_roundtrip import EXPERTS, NATIVE, TOP_K, TURNS, WARM, Size, Turns, replayed, turns_of

SIZES: Final = (Size(8, 2048), Size(64, 2048), Size(256, 7168))
_MODEL: Final = "be" * 32
_FLAGS: Final = 256
_LIMIT_NS: Final = 20 * 10**9
_READY_S: Final = 120.0


def measure(first: int = 0, second: int = 1) -> list[Turns]:
    """Every way between two GPUs at every size; a floor is the best of the others."""
    found = []
    for size in SIZES:
        bare = min((_bare(size, first, second, blocks) for blocks in (1, 8, 32)), key=np.median)
        nccl = _nccl(size, first, second)
        found += [
            turns_of(size, "device-floor", bare),
            turns_of(size, "nccl", nccl),
            turns_of(size, "neighbour", _neighbour(size, first, second), min((bare, nccl), key=np.median)),
        ]
    return found


def _neighbour(size: Size, first: int, second: int) -> np.ndarray:
    layout = Layout(max(256, size.rows), size.hidden, TOP_K, "bfloat16")
    name, key = f"bench-{secrets.token_hex(4)}", secrets.token_bytes(32)
    exchange = Exchange(layout, first, 5.0, near_deadline_s=5.0)
    exchange.serve(_nothing)
    neighbours = GpuNeighbours(exchange, layout, first, "another", model=_MODEL, key=key)
    try:
        with _child(_serve, second, name, key, size.hidden) as ours:
            ours.recv(1)
            neighbours.begin([HostAddress(name, "here", name, "", os.getpid())])
            while not neighbours.look():
                if not neighbours.pending:
                    raise AssertionError("the host on the other GPU refuses")
                neighbours.wait(_READY_S)
            took = replayed(exchange, size, first, here=0, near=0)
            if exchange.dead or exchange.lates:
                raise AssertionError("the host on the other GPU did not answer in time")
            return took
    finally:
        torch.cuda.synchronize(first)
        exchange.close()
        neighbours.close()


def _nothing(layer: int, x: Any, weights: Any, ids: Any, out: torch.Tensor) -> None:
    out.zero_()


def _serve(sock: socket.socket, device: int, name: str, key: bytes, hidden: int) -> None:
    from actors import gpu_desk
    from actors.cuda_layer import CudaLayer
    from actors.host_server import HostServer
    from actors.hosted_layer import HostedLayer
    from actors.slot_format import SlotFormat
    from cluster.frame import manifest_id

    # Experts that compute nothing: the rows as they are.
    gpu_desk.run_experts = lambda tensors, activation, x_NH, *_: x_NH  # type: ignore[assignment]
    torch.cuda.set_device(device)
    layer = CudaLayer(SlotFormat(hidden, 64, "bfloat16", "plain", "silu"), EXPERTS, device)
    server = HostServer(
        name, {0: HostedLayer(layer, tuple(range(EXPERTS)), EXPERTS)}, manifest=manifest_id(_MODEL), model=_MODEL,
        dtype="bfloat16", hidden=hidden, key=key, blobs=object(),  # type: ignore[arg-type]
    )  # fmt: skip
    server.listen_unix(name)
    sock.send(b"x")
    sock.recv(1)


def _bare(size: Size, first: int, second: int, blocks: int) -> np.ndarray:
    """Each end's inbox is on its own GPU."""
    vectors, turns = size.rows * size.hidden * 2 // 16, WARM + TURNS
    with _child(_pong, second, vectors, turns, blocks) as ours:
        took = _play(ours, first, vectors, turns, blocks, first=True)
    return took.cpu().numpy()[WARM:].astype(np.float64) / 1e9


def _pong(sock: socket.socket, device: int, vectors: int, turns: int, blocks: int) -> None:
    _play(sock, device, vectors, turns, blocks, first=False)


def _play(
    sock: socket.socket, device: int, vectors: int, turns: int, blocks: int, *, first: bool
) -> torch.Tensor:
    torch.cuda.set_device(device)
    function = kernel(NATIVE / "pingpong.cu", "pingpong", device)
    mine, theirs = (CudaSlots(device, 1, _FLAGS + vectors * 16) for _ in range(2))
    mine.take(0)
    mine.clear(_FLAGS)
    descriptor = mine.export(0)
    socket.send_fds(sock, [b"x"], [descriptor])
    os.close(descriptor)
    theirs.attach(0, socket.recv_fds(sock, 1, 1)[1][0])
    rows = torch.randn(vectors * 4, device=f"cuda:{device}")
    took = torch.zeros(turns, dtype=torch.int64, device=f"cuda:{device}")
    arrived = torch.zeros(1, dtype=torch.int32, device=f"cuda:{device}")
    sock.send(b"x")
    sock.recv(1)
    pointer, number = ctypes.c_void_p, ctypes.c_int
    values = (
        int(first), turns, vectors, rows.data_ptr(), theirs.address + _FLAGS, mine.address + _FLAGS, theirs.address,
        mine.address, arrived.data_ptr(), took.data_ptr(), _LIMIT_NS,
    )  # fmt: skip
    types = (number, number, number, *(pointer,) * 7, ctypes.c_uint64)
    launch(function, blocks, 1024, values, types)
    torch.cuda.synchronize(device)
    return took


def _nccl(size: Size, first: int, second: int) -> np.ndarray:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with _child(_give_back, second, size, port):
        seconds = _exchange(first, size, port, rank=0)
    return seconds


def _give_back(sock: socket.socket, device: int, size: Size, port: int) -> None:
    _exchange(device, size, port, rank=1)


def _exchange(device: int, size: Size, port: int, rank: int) -> np.ndarray:
    import torch.distributed as dist

    torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group(
        "nccl", store=store, rank=rank, world_size=2, device_id=torch.device("cuda", device)
    )
    try:
        x = torch.randn(size.rows, size.hidden, device=f"cuda:{device}").bfloat16()
        y, taken = torch.empty_like(x), []
        for turn in range(WARM + TURNS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            if rank == 0:
                dist.send(x, 1)
                dist.recv(y, 1)
            else:
                dist.recv(x, 0)
                dist.send(x, 0)
            end.record()
            end.synchronize()
            if turn >= WARM:
                taken.append(begin.elapsed_time(end) / 1e3)
        return np.array(taken)
    finally:
        dist.destroy_process_group()


@contextmanager
def _child(run: Callable[..., Any], *arguments: Any) -> Iterator[socket.socket]:
    """`run(socket, *arguments)` in a process of its own; the other end of the socket."""
    ours, theirs = socket.socketpair()
    process = multiprocessing.get_context("spawn").Process(
        target=partial(run, theirs, *arguments), daemon=True
    )
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(10)
        process.kill()
