"""How long a layer's rows are away: every way that the engine on a GPU has, beside the barest exchange of its kind.

Paths, each over many turns, with experts that compute nothing:

    mapped            nothing is sent: the host's weights are mapped; what posting and collecting costs a layer
    host-process      to a process of the host's processors, with everything the mesh does on the way
    host-floor        a kernel writes memory of the host and spins on a flag; a thread gives the flag back
    device-floor      two processes that exchange rows by flags in memory that both have mapped on the GPU
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch

from actors.buffers import Layout
from actors.cuda_driver import kernel, launch
from actors.cuda_exchange import Exchange
from actors.cuda_memory import CudaSlots
from actors.native_library import native_library
from workloads.bench.gpu_noop_host import noop_dispatcher

NATIVE: Final = Path(__file__).parent / "native"
EXPERTS, TOP_K = 16, 8
TURNS, WARM = 400, 50


@dataclass(frozen=True, slots=True)
class Size:
    rows: int
    hidden: int


SIZES: Final = (Size(8, 2048), Size(64, 2048))


@dataclass(frozen=True, slots=True)
class Turns:
    """One path at one size."""

    rows: int
    hidden: int
    path: str
    p50_us: float
    p99_us: float
    floor_us: float | None = None


def measure(device: int = 0) -> list[Turns]:
    """Every path at every size; HostError where the GPU's driver refuses."""
    found = []
    for size in SIZES:
        floor = _host_floor(size, device)
        device_floor = _device_floor(size, device)
        found += [
            turns_of(size, "device-floor", device_floor),
            turns_of(size, "host-floor", floor),
            turns_of(size, "mapped", _exchange(size, device, lambda *_: None, here=EXPERTS), device_floor),
            turns_of(size, "host-process", _host_process(size, device), floor),
        ]
    return found


def turns_of(size: Size, path: str, seconds: np.ndarray, floor: np.ndarray | None = None) -> Turns:
    """Quantiles in microseconds, beside the floor's median."""
    micros = seconds * 1e6
    bare = None if floor is None else round(float(np.median(floor)) * 1e6, 2)
    p50, p99 = (round(float(np.quantile(micros, q)), 2) for q in (0.5, 0.99))
    return Turns(size.rows, size.hidden, path, p50, p99, bare)


def _exchange(size: Size, device: int, compute: Callable[..., None], here: int) -> np.ndarray:
    """Seconds of a graph of one post and one collect, as the engine captures them."""
    exchange = Exchange(Layout(256, size.hidden, TOP_K, "bfloat16"), device, 5.0)
    exchange.serve(compute)
    try:
        return replayed(exchange, size, device, here)
    finally:
        torch.cuda.synchronize()
        exchange.close()


def replayed(exchange: Exchange, size: Size, device: int, here: int, near: int = -1) -> np.ndarray:
    """Seconds of a graph of one post and one collect; experts from `here` on are elsewhere, at neighbour `near`."""
    with torch.cuda.device(device):
        x = torch.randn(size.rows, size.hidden, device="cuda").bfloat16()
        ids = torch.stack([torch.randperm(EXPERTS, device="cuda")[:TOP_K] for _ in range(size.rows)]).int()
        weights = torch.rand(size.rows, TOP_K, device="cuda")
        place = torch.tensor(
            [e if e < here else -1 for e in range(EXPERTS)], dtype=torch.int32, device="cuda"
        )
        neighbour = torch.full_like(place, near)
        counts = torch.zeros(EXPERTS, dtype=torch.int64, device="cuda")
        y = torch.zeros_like(x)

        def layer() -> None:
            exchange.post(0, x, weights, ids, place, neighbour, counts, EXPERTS)
            exchange.collect(y)

        layer()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layer()
        return _timed(graph.replay)


def _timed(call: Callable[[], None]) -> np.ndarray:
    taken = []
    for turn in range(WARM + TURNS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        if turn >= WARM:
            taken.append(begin.elapsed_time(end) / 1e3)
    return np.array(taken)


def _host_floor(size: Size, device: int) -> np.ndarray:
    """The same kernels, answered by a thread that does nothing but give the flag back."""
    exchange = Exchange(Layout(256, size.hidden, TOP_K, "bfloat16"), device, 5.0)
    echo = native_library("echo", NATIVE / "echo.cpp", ("-O2",)).expertmesh_echo
    echo.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64, ctypes.c_uint32]
    box = exchange.mailbox
    exchange.answered_by(partial(echo, box.asked, box.answered, box.x, box.y, 0, 1 + WARM + TURNS))
    return replayed(exchange, size, device, here=0)


def _host_process(size: Size, device: int) -> np.ndarray:
    """Through the dispatcher to a host's process, whose experts give the rows back."""
    with noop_dispatcher(size.hidden, TOP_K, EXPERTS) as compute:
        return _exchange(size, device, compute, here=0)


def _device_floor(size: Size, device: int) -> np.ndarray:
    """Two processes, one block each."""
    ours, theirs = socket.socketpair()
    vectors, turns = size.rows * size.hidden * 2 // 16, WARM + TURNS
    process = multiprocessing.get_context("spawn").Process(
        target=_pong, args=(theirs, device, vectors, turns), daemon=True
    )
    process.start()
    theirs.close()
    try:
        shared = CudaSlots(device, 1, 2 * (vectors * 16 + 256))
        shared.take(0)
        shared.bytes().zero_()
        torch.cuda.synchronize()
        descriptor = shared.export(0)
        ours.recv(1)
        socket.send_fds(ours, [b"x"], [descriptor])
        os.close(descriptor)
        ours.recv(1)
        took = _play(shared, device, vectors, turns, first=True)
    finally:
        process.join(30)
        process.kill()
    return took.cpu().numpy()[WARM:].astype(np.float64) / 1e9


def _pong(sock: socket.socket, device: int, vectors: int, turns: int) -> None:
    torch.cuda.init()
    kernel(NATIVE / "pingpong.cu", "pingpong", device)
    sock.send(b"x")
    _, descriptors, _, _ = socket.recv_fds(sock, 1, 1)
    shared = CudaSlots(device, 1, 2 * (vectors * 16 + 256))
    shared.attach(0, descriptors[0])
    sock.send(b"x")
    _play(shared, device, vectors, turns, first=False)


def _play(shared: CudaSlots, device: int, vectors: int, turns: int, *, first: bool) -> torch.Tensor:
    function = kernel(NATIVE / "pingpong.cu", "pingpong", device)
    base = shared.bytes().data_ptr()
    half = vectors * 16 + 256
    there, back = (base, base + half) if first else (base + half, base)
    rows = torch.randn(vectors * 4, device=f"cuda:{device}")
    took = torch.zeros(turns, dtype=torch.int64, device=f"cuda:{device}")
    arrived = torch.zeros(1, dtype=torch.int32, device=f"cuda:{device}")
    pointer, number = ctypes.c_void_p, ctypes.c_int
    values = (
        int(first), turns, vectors, rows.data_ptr(), there + 256, back + 256, there, back, arrived.data_ptr(),
        took.data_ptr(), 20 * 10**9,
    )  # fmt: skip
    types = (number, number, number, *(pointer,) * 7, ctypes.c_uint64)
    launch(function, 1, 1024, values, types)
    torch.cuda.synchronize()
    return took
