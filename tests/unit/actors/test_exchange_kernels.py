"""What the exchange's kernels do, as plain functions of a processor (`native/on_a_processor.h`), one thread each.

The same things are tested on GPUs in `tests/gpu`, where threads of a kernel meet.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors import cuda_exchange, gpu_desk
from actors.buffers import Layout
from actors.cuda_exchange import Exchange
from actors.native_library import NATIVE, native_library

ROWS, HIDDEN, TOP_K, EXPERTS = 12, 16, 3, 8


@cache
def kernels() -> ctypes.CDLL:
    return native_library("exchange", NATIVE / "exchange.cu", ("-O1", "-x", "c++"))


class Processor:
    """In place of torch: nothing is on a device."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("zeros", "full"):
            return found

        def made(*arguments: Any, **more: Any) -> torch.Tensor:
            return found(
                *arguments, **{key: more[key] for key in more if key not in ("device", "pin_memory")}
            )

        return made


def launch(function: Any, blocks: int, threads: int, values: tuple[Any, ...], types: tuple[Any, ...]) -> None:
    function.argtypes, function.restype = types, None
    function(*values)


@pytest.fixture(autouse=True)
def on_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_exchange, "torch", Processor())
    monkeypatch.setattr(cuda_exchange, "kernel", lambda source, name, device: getattr(kernels(), name))
    monkeypatch.setattr(cuda_exchange, "launch", launch)


def answer(layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> None:
    """Expert e of layer l multiplies by e + l + 1; none is asked for by -1."""
    factor = torch.where(ids >= 0, ids + layer + 1, 0).float()
    out.copy_((x.float() * (factor * weights).sum(1, keepdim=True)).to(x.dtype))


class Neighbour:
    """A thread that answers as a host's desk does, if it wants to."""

    def __init__(self, layout: Layout, held: set[int]) -> None:
        dtype = getattr(torch, layout.dtype)
        self.layout, self.held, self.silent = layout, held, False
        self.request, self.bell = (torch.zeros(32, dtype=torch.int32) for _ in range(2))
        self.ids = torch.full((layout.max_rows, layout.top_k), -1, dtype=torch.int32)
        self.weights = torch.zeros(layout.max_rows, layout.top_k)
        self.x, self.y = (torch.zeros(layout.max_rows, layout.hidden, dtype=dtype) for _ in range(2))
        self.answered, self.desk = torch.zeros(2, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
        self.verdict = torch.zeros(2, dtype=torch.int32)
        place = [expert if expert in held else -1 for expert in range(EXPERTS)]
        self.place = torch.tensor(place, dtype=torch.int32)
        self.answers = 0
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def row(self) -> dict[str, int]:
        parts = ("request", "ids", "weights", "x", "bell", "answered", "y")
        return {part: getattr(self, part).data_ptr() for part in parts}

    def close(self) -> None:
        self._stop = True
        self._thread.join(5)

    def _run(self) -> None:
        seen, bell = 0, self.bell.numpy()
        while not self._stop:
            if bell[0] == seen or self.silent:
                time.sleep(1e-4)
                continue
            seen = int(bell[0])
            self.take(int(bell[1]), int(bell[2]))

    def take(self, layer: int, room: int, *, least: int = 0) -> bool:
        """Receive, compute and give, as a graph of this layer and size does."""
        places = torch.zeros(room, self.layout.top_k, dtype=torch.int32)
        weights = torch.zeros(room, self.layout.top_k)
        pointers = (self.request, self.ids, self.weights, self.place)
        values = (
            *(tensor.data_ptr() for tensor in pointers), EXPERTS, places.data_ptr(), weights.data_ptr(),
            self.desk.data_ptr(), self.verdict.data_ptr(), layer, least, room, self.layout.top_k, EXPERTS, 0,
        )  # fmt: skip
        launch(kernels().receive, 1, 1, values, gpu_desk._RECEIVE_TYPES)
        sums = torch.empty(room, self.layout.hidden, dtype=self.x.dtype)
        answer(layer, self.x[:room], weights, torch.where(places < EXPERTS, places, -1), sums)
        vectors = self.layout.hidden * sums.element_size() // 16
        given = (sums.data_ptr(), self.y.data_ptr(), self.answered.data_ptr(), self.desk.data_ptr(), vectors)
        launch(kernels().give, 1, 1, given, gpu_desk._GIVE_TYPES)
        taken = bool(self.desk[1])
        self.answers += taken
        return taken


class Mesh:
    def __init__(self, dtype: str, deadline_s: float, *held: set[int]) -> None:
        self.layout = Layout(ROWS, HIDDEN, TOP_K, dtype)
        self.exchange = Exchange(self.layout, 0, 5.0, near_deadline_s=deadline_s)
        self.mailed: list[tuple[int, list[int]]] = []
        self.exchange.serve(self._mail)
        self.neighbours = [Neighbour(self.layout, experts) for experts in held]
        for number, neighbour in enumerate(self.neighbours):
            self.exchange.set_neighbour(number, neighbour.row())
        self.counts = torch.zeros(EXPERTS, dtype=torch.int64)

    def _mail(self, layer: int, x: Any, weights: Any, ids: Any, out: Any) -> None:
        self.mailed.append((layer, sorted(set(ids[ids >= 0].tolist()))))
        answer(layer, x, weights, ids, out)

    def run(self, layer: int, asked: Any, place: list[int], near: list[int]) -> torch.Tensor:
        x, weights, ids = asked
        at, who = (torch.tensor(numbers, dtype=torch.int32) for numbers in (place, near))
        places, local = self.exchange.post(layer, x, weights, ids, at, who, self.counts, EXPERTS)
        y = torch.empty_like(x)
        answer(layer, x, local, torch.where(places < EXPERTS, places, -1), y)
        self.exchange.collect(y)
        return y

    def check(self, got: torch.Tensor, layer: int, asked: Any) -> None:
        x, weights, ids = asked
        wanted = torch.empty(x.shape)
        answer(layer, x.float(), weights, ids, wanted)
        error = float((got.float() - wanted).norm() / (wanted.norm() + 1e-9))
        assert error < (1e-6 if x.dtype == torch.float32 else 1e-2), error

    def close(self) -> None:
        self.exchange.close()
        for neighbour in self.neighbours:
            neighbour.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Mesh]]:
    made: list[Mesh] = []

    def one(dtype: str = "float32", deadline_s: float = 5.0, held: tuple[set[int], ...] = ()) -> Mesh:
        made.append(Mesh(dtype, deadline_s, *held))
        return made[-1]

    yield one
    for mesh in made:
        mesh.close()


def operands(dtype: str, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, HIDDEN, generator=generator).to(getattr(torch, dtype))
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(rows)]).int()
    return x, torch.rand(rows, TOP_K, generator=generator), ids


NOWHERE = [-1] * EXPERTS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 5, ROWS])
def test_every_share_is_added_once(make: Callable[..., Mesh], dtype: str, rows: int) -> None:
    mesh = make(dtype, held=({0, 1, 2}, {3}))
    place, near = [*NOWHERE[:4], 4, 5, -1, -1], [0, 0, 0, 1, -1, -1, -1, -1]
    for layer in range(6):
        asked = operands(dtype, rows, layer)
        mesh.check(mesh.run(layer, asked, place, near), layer, asked)
    assert int(mesh.counts.sum()) == 6 * rows * TOP_K
    assert mesh.exchange.dead == [] and mesh.exchange.lates == 0
    assert {expert for _, experts in mesh.mailed for expert in experts} <= {6, 7}


def test_a_neighbour_comes_before_what_is_here(make: Callable[..., Mesh]) -> None:
    mesh = make(held=(set(range(EXPERTS)),))
    asked = operands("float32", 4)
    mesh.check(mesh.run(0, asked, list(range(EXPERTS)), [0] * EXPERTS), 0, asked)
    assert mesh.neighbours[0].answers == 1 and mesh.mailed == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_neighbour_owes_is_mailed_and_it_is_asked_no_more(
    make: Callable[..., Mesh], dtype: str
) -> None:
    mesh = make(dtype, 0.05, ({0, 1, 2, 3}, {4, 5}))
    near = [0, 0, 0, 0, 1, 1, -1, -1]
    mesh.neighbours[0].silent = True
    asked = operands(dtype, ROWS)
    got = mesh.run(2, asked, NOWHERE, near)
    mesh.check(got, 2, asked)
    assert mesh.exchange.dead == [0]
    assert mesh.mailed == [(2, [6, 7]), (2, [0, 1, 2, 3])]
    mesh.mailed.clear()
    # Behind it: replicas that are here take its place, the rest is mailed at once.
    for layer in range(3, 6):
        asked = operands(dtype, ROWS, layer)
        mesh.check(mesh.run(layer, asked, [0, 1, *NOWHERE[2:]], near), layer, asked)
    assert mesh.mailed == [(layer, [2, 3, 6, 7]) for layer in range(3, 6)]
    assert mesh.neighbours[1].answers == 4 and mesh.exchange.lates == 0
    # Another process in its place is asked again.
    mesh.neighbours[0].silent = False
    fresh = Neighbour(mesh.layout, {0, 1, 2, 3})
    mesh.neighbours.append(fresh)
    mesh.exchange.set_neighbour(0, None)
    mesh.exchange.set_neighbour(0, fresh.row())
    assert mesh.exchange.dead == []
    asked = operands(dtype, 3, 9)
    mesh.check(mesh.run(1, asked, NOWHERE, near), 1, asked)
    assert fresh.answers == 1


def test_a_neighbour_without_an_expert_owes_all_of_the_layer(make: Callable[..., Mesh]) -> None:
    mesh = make(held=({0, 1},))
    x, weights, _ = operands("float32", 4)
    asked = x, weights, torch.tensor([[0, 1, 2]] * 4, dtype=torch.int32)
    mesh.check(mesh.run(0, asked, NOWHERE, [0] * EXPERTS), 0, asked)
    assert mesh.exchange.dead == [0] and mesh.mailed == [(0, [0, 1, 2])]


def test_only_a_request_that_fits_is_taken(make: Callable[..., Mesh]) -> None:
    mesh = make(deadline_s=0.01, held=(set(range(EXPERTS)),))
    neighbour = mesh.neighbours[0]
    neighbour.silent = True
    asked = operands("float32", 5)
    mesh.run(3, asked, NOWHERE, [0] * EXPERTS)
    assert not neighbour.take(2, 8) and not neighbour.take(3, 4) and not neighbour.take(3, 12, least=5)
    assert not bool(neighbour.answered[0])
    assert neighbour.take(3, 8, least=4) and not neighbour.take(3, 8, least=4)
    assert neighbour.answered.tolist() == [int(neighbour.bell[0]), 0]
    assert neighbour.verdict.tolist() == [5, int(neighbour.bell[0])]


def test_a_late_answer_is_not_taken_for_another(make: Callable[..., Mesh]) -> None:
    mesh = make(deadline_s=0.02, held=(set(range(EXPERTS)),))
    neighbour, near = mesh.neighbours[0], [0] * EXPERTS
    neighbour.silent = True
    first, second = operands("float32", 4, 1), operands("float32", 4, 2)
    mesh.check(mesh.run(0, first, NOWHERE, near), 0, first)
    assert neighbour.take(0, 8)
    mesh.check(mesh.run(1, second, NOWHERE, near), 1, second)
    assert len(mesh.mailed) == 2


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.integers(1, ROWS),
            st.lists(st.integers(-1, 1), min_size=EXPERTS, max_size=EXPERTS),
            st.lists(st.booleans(), min_size=EXPERTS, max_size=EXPERTS),
            st.integers(0, 2**31),
            st.floats(0, 1),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_whoever_has_what_the_sum_is_the_same(layers: list[Any]) -> None:
    mesh = Mesh("float32", 5.0, set(range(EXPERTS)), set(range(EXPERTS)))
    try:
        for layer, (rows, near, here, seed, unwanted) in enumerate(layers):
            x, weights, ids = operands("float32", rows, seed)
            none = torch.from_numpy(np.random.default_rng(seed).random(ids.shape) < unwanted)
            asked = x, weights, ids.masked_fill(none, -1)
            place = [expert if held else -1 for expert, held in enumerate(here)]
            mesh.check(mesh.run(layer, asked, place, near), layer, asked)
        assert mesh.exchange.dead == [] and mesh.exchange.lates == 0
    finally:
        mesh.close()
