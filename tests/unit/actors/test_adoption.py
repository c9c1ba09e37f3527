"""A host that serves comes to hold other experts while it goes on answering, whatever its kernel."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from actors.expert_host import ExpertHost
from actors.expert_weights import build_layer
from actors.row_versions import RowVersions
from cluster.checkpoint import Checkpoint
from cluster.holdings import digest
from cluster.live_versions import LiveVersions, Variant, numbers, variants_of, with_version
from cluster.messages import HostHolds, StoreAddress
from cluster.versions.publish import publish
from cluster.versions.store import Store
from tests.changed_model import changed_model
from tests.tiny_models import make_tiny
from tests.unit.actors.tiny_host import LOAD_TIMEOUT_S, batch, dispatcher, running, spec

NO_LIMIT = 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_tiny("mixtral", tmp_path_factory.mktemp("mixtral")))


def said_by(host: ExpertHost) -> HostHolds:
    holds = host.progress().holds
    assert holds is not None
    return holds


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LOAD_TIMEOUT_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("kernel", ["grouped-mm", "vllm-cpu", "module"])
def test_other_experts_give_what_a_host_gives_that_was_started_with_them(
    checkpoint: Checkpoint, kernel: str
) -> None:
    layers = [layer.index for layer in checkpoint.moe_layers]
    wanted = {layer: tuple(range(8)) for layer in layers}
    x, weights, ids = batch(checkpoint, 11)
    with running(spec(checkpoint, (2, 5), kernel=kernel)) as (host,):
        host.wait_ready(LOAD_TIMEOUT_S)
        assert said_by(host).holds == digest({layer: (2, 5) for layer in layers})
        host.adopt(wanted, 1, NO_LIMIT, {})
        wait_until(lambda: said_by(host).holds == digest(wanted))
        with dispatcher(checkpoint, [host.wait_ready(0)], [0] * 8) as dispatch:
            for layer in layers:
                out, expected = torch.empty_like(x), torch.empty_like(x)
                dispatch(layer, x, weights, ids, out)
                build_layer(checkpoint, layer, range(8), torch.float32, kernel=kernel).compute(
                    x, ids, weights, expected
                )
                assert torch.equal(out, expected)
        more = host.report()
        fewer = {layers[0]: (5,)}
        host.adopt(fewer, 2, NO_LIMIT, {})
        wait_until(lambda: said_by(host).holds == digest(fewer))
        less = host.report()
    assert (more.experts_loaded, less.experts_loaded) == (8 * len(layers), 1)
    assert less.weight_bytes * 8 * len(layers) == more.weight_bytes


@pytest.mark.parametrize("kernel", ["grouped-mm", "vllm-cpu", "module"])
def test_versions_are_held_beside_each_other_and_what_they_share_once(
    checkpoint: Checkpoint, kernel: str, tmp_path: Path
) -> None:
    layer = checkpoint.moe_layers[0].index
    folder, file = changed_model(checkpoint.path, tmp_path, [(layer, 1), (layer, 5)])
    store = Store(str(tmp_path / "store"))
    digest_ = publish(store, checkpoint, file).digest
    sizes = {found.index: found.num_experts for found in checkpoint.moe_layers}
    base = LiveVersions("base", {"base": {}})
    versions = with_version(base, "new", store.manifests.get(digest_).experts, sizes)
    whole = {index: tuple(range(size)) for index, size in sizes.items()}
    wanted = numbers(versions, whole)
    x, weights, ids = batch(checkpoint, 11)
    address = StoreAddress(str(tmp_path / "store"))
    with running(spec(checkpoint, tuple(range(8)), kernel=kernel, store=address)) as (host,):
        host.wait_ready(LOAD_TIMEOUT_S)
        before = said_by(host).weight_bytes
        host.adopt(wanted, 1, NO_LIMIT, variants_of(versions, wanted, sizes))
        wait_until(lambda: said_by(host).holds == digest(wanted) or bool(said_by(host).error))
        assert said_by(host).error == ""
        one = before // sum(sizes.values())
        assert said_by(host).weight_bytes == before + 2 * one, "two experts more, and nothing twice"
        with dispatcher(checkpoint, [host.wait_ready(0)], [0] * 10) as dispatch:
            rows = RowVersions(lambda: [("base", 4), ("new", 7)], lambda unknown: None)
            rows.set_versions(versions, sizes)
            dispatch.versions = rows
            out, old, new = (torch.empty_like(x) for _ in range(3))
            dispatch(layer, x, weights, ids, out)
            for source, sums in ((checkpoint, old), (Checkpoint.open(folder), new)):
                build_layer(source, layer, range(8), torch.float32, kernel=kernel).compute(
                    x, ids, weights, sums
                )
            # How many rows an expert has decides about rounding.
            torch.testing.assert_close(out[:4], old[:4])
            torch.testing.assert_close(out[4:], new[4:])
            assert not torch.allclose(old, new, rtol=1e-2)
        host.adopt(whole, 2, NO_LIMIT, {})
        wait_until(lambda: said_by(host).holds == digest(whole))
        assert said_by(host).weight_bytes == before


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is damaged"),
        (lambda data: data[: len(data) // 2], "is damaged"),
        (lambda data: b"", "is damaged"),
    ],
)
def test_a_damaged_blob_is_not_held_and_what_was_held_stays(
    checkpoint: Checkpoint, tmp_path: Path, damage: Callable[[bytes], bytes], words: str
) -> None:
    layer = checkpoint.moe_layers[0].index
    _, file = changed_model(checkpoint.path, tmp_path, [(layer, 1)])
    store = Store(str(tmp_path / "store"))
    (blob,) = store.manifests.get(publish(store, checkpoint, file).digest).blobs
    (path,) = (tmp_path / "store" / "blobs").rglob(blob)
    path.chmod(0o644)
    path.write_bytes(damage(path.read_bytes()))
    address = StoreAddress(str(tmp_path / "store"))
    with running(spec(checkpoint, (0, 1), store=address)) as (host,):
        host.wait_ready(LOAD_TIMEOUT_S)
        held = said_by(host).holds
        host.adopt({layer: (0, 1, 8)}, 3, NO_LIMIT, {layer: {8: Variant(1, blob)}})
        wait_until(lambda: said_by(host).failed == 3)
        assert words in said_by(host).error and said_by(host).holds != digest({layer: (0, 1, 8)})
        assert held


def test_dispatches_go_on_while_experts_come_and_go(checkpoint: Checkpoint) -> None:
    layer = checkpoint.moe_layers[0].index
    kept = 0, 1, 2, 3
    x, weights, _ = batch(checkpoint, 5)
    ids = torch.tensor([[row % 4, (row + 1) % 4] for row in range(5)], dtype=torch.int32)
    expected = torch.empty_like(x)
    build_layer(checkpoint, layer, range(8), torch.float32, kernel="grouped-mm").compute(
        x, ids, weights, expected
    )
    stop = threading.Event()
    outs: list[torch.Tensor] = []
    with (
        running(spec(checkpoint, kept)) as (host,),
        dispatcher(checkpoint, [host.wait_ready(LOAD_TIMEOUT_S)], [0] * 8) as dispatch,
    ):

        def ask() -> None:
            while not stop.is_set():
                out = torch.empty_like(x)
                dispatch(layer, x, weights, ids, out)
                outs.append(out)

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            for number, experts in enumerate([(*kept, 6), kept, tuple(range(8)), (*kept, 7)]):
                wanted = {layer: experts}
                seen = len(outs)
                host.adopt(wanted, number + 1, NO_LIMIT, {})
                wait_until(lambda wanted=wanted: said_by(host).holds == digest(wanted))  # type: ignore[misc]
                wait_until(lambda seen=seen: len(outs) > seen)  # type: ignore[misc]
        finally:
            stop.set()
            asking.join(LOAD_TIMEOUT_S)
    assert outs and all(torch.equal(out, expected) for out in outs)


def test_what_can_t_be_loaded_is_said_with_its_number_and_what_was_held_stays(checkpoint: Checkpoint) -> None:
    layer = checkpoint.moe_layers[0].index
    with running(spec(checkpoint, (0,), experts={layer: (0,)})) as (host,):
        host.wait_ready(LOAD_TIMEOUT_S)
        before = said_by(host).holds
        host.adopt({layer: (0, 8)}, 7, NO_LIMIT, {})
        wait_until(lambda: said_by(host).failed == 7)
        after = said_by(host)
        assert "no expert 8" in after.error
        assert after.adopting == "" and after.holds == before
        # The next one is another change.
        host.adopt({layer: (0, 3)}, 8, NO_LIMIT, {})
        wait_until(lambda: said_by(host).holds == digest({layer: (0, 3)}))
        assert (said_by(host).failed, said_by(host).error) == (0, "")


def test_a_host_that_holds_nothing_yet_is_ready_and_measured(checkpoint: Checkpoint) -> None:
    layer = checkpoint.moe_layers[0].index
    with running(spec(checkpoint, (0,), experts={})) as (host,):
        host.wait_ready(LOAD_TIMEOUT_S)
        report = host.report()
        assert (report.experts_loaded, report.weight_bytes) == (0, 0)
        assert report.cost is not None and report.cost.seconds(1, 1) > 0
        host.adopt({layer: (3,)}, 1, NO_LIMIT, {})
        wait_until(lambda: host.report().experts_loaded == 1)
