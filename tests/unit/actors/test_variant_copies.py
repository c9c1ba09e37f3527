"""Experts of versions on nodes that can't read the store: copied from hosts that can, each proved, or not held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from actors.expert_host import ExpertHost
from actors.expert_weights import build_layer
from actors.peer_copy import NoSourceError, PeerCopy
from actors.variant_reader import VariantReader
from cluster.checkpoint import Checkpoint
from cluster.errors import CheckpointError
from cluster.holdings import digest
from cluster.live_versions import Variant, Variants
from cluster.messages import HostAddress, HostSpec, StoreAddress
from cluster.versions.expert_blob import expert_form
from cluster.versions.publish import publish
from cluster.versions.store import Store
from cluster.versions.tensors import TensorForm, encode
from tests.changed_model import changed_model
from tests.tiny_models import make_tiny
from tests.unit.actors.bad_wire import BadWire
from tests.unit.actors.test_adoption import NO_LIMIT, said_by, wait_until
from tests.unit.actors.test_peer_copy import ABSENT, ALL, QUICK, copying, ready
from tests.unit.actors.tiny_host import KEY, LOAD_TIMEOUT_S, batch, dispatcher, running, spec

LAYER, NEW = 0, 8
NOWHERE = StoreAddress("/absent/store")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("versions")


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return Checkpoint.open(make_tiny("mixtral", tiny / "base"))


@pytest.fixture(scope="module")
def changed(checkpoint: Checkpoint, tiny: Path) -> tuple[Path, StoreAddress, Variants]:
    """A checkpoint with one expert changed; the store that has it as a version; what its number is."""
    folder, file = changed_model(checkpoint.path, tiny, [(LAYER, 1)])
    address = StoreAddress(str(tiny / "store"))
    store = Store(address.url)
    (blob,) = store.manifests.get(publish(store, checkpoint, file).digest).blobs
    return folder, address, {LAYER: {NEW: Variant(1, blob)}}


@pytest.fixture(params=["with the folder", "without the folder"])
def path(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> str:
    return str(checkpoint.path) if request.param == "with the folder" else ABSENT


@contextmanager
def giving(checkpoint: Checkpoint, store: StoreAddress | None, name: str = "old") -> Iterator[HostAddress]:
    """A host with the folder, and with this store, on another node."""
    made = spec(checkpoint, ALL, host_id=name, node_id="there", tcp_ip="127.0.0.1", store=store)
    with running(made) as (host,):
        yield host.wait_ready(LOAD_TIMEOUT_S)


def lacking(
    checkpoint: Checkpoint, path: str, store: StoreAddress | None = NOWHERE, **more: object
) -> HostSpec:
    options = {"host_id": "new", "model_path": path, "store": store, **more}
    return spec(checkpoint, (0, 1), **options)


def adopted(host: ExpertHost, variants: Variants) -> str:
    """What it says to an expert that is a version's, beside those that it has: "" or why it is not held."""
    before = said_by(host)
    wanted = {LAYER: (0, 1, NEW)}
    host.adopt(wanted, 3, NO_LIMIT, variants)
    wait_until(lambda: said_by(host).holds == digest(wanted) or said_by(host).failed == 3)
    after = said_by(host)
    if after.failed:
        # The other layer's experts were given back before.
        assert after.holds == digest({LAYER: (0, 1)}) and after.weight_bytes < before.weight_bytes
    return after.error


def answers(checkpoint: Checkpoint, address: HostAddress, asked: int) -> torch.Tensor:
    """What the host says of its expert of this number."""
    x, weights, _ = batch(checkpoint, 7)
    ids = torch.tensor([[0, asked]] * len(x), dtype=torch.int32)
    out = torch.empty_like(x)
    with dispatcher(checkpoint, [address], [0] * (NEW + 1)) as dispatch:
        dispatch(LAYER, x, weights, ids, out)
    return out


def due(folder: Path, checkpoint: Checkpoint) -> torch.Tensor:
    """The same of expert 1 of the checkpoint in this folder."""
    x, weights, _ = batch(checkpoint, 7)
    slots, out = torch.tensor([[0, 1]] * len(x), dtype=torch.int32), torch.empty_like(x)
    layer = build_layer(Checkpoint.open(folder), LAYER, (0, 1), torch.float32, kernel="grouped-mm")
    layer.compute(x, slots, weights, out)
    return out


def test_a_host_without_the_store_adopts_a_version_from_one_that_has_it(
    checkpoint: Checkpoint, changed: tuple[Path, StoreAddress, Variants], path: str
) -> None:
    folder, store, variants = changed
    with giving(checkpoint, store) as old, copying(lacking(checkpoint, path), ready(old)) as host:
        address = host.wait_ready(LOAD_TIMEOUT_S)
        assert adopted(host, variants) == ""
        assert torch.equal(answers(checkpoint, address, NEW), due(folder, checkpoint))
        assert torch.equal(answers(checkpoint, address, 1), due(checkpoint.path, checkpoint))
        assert host.report().copied_from == ("old",)


def test_a_host_that_starts_with_a_version_copies_it_too(
    checkpoint: Checkpoint, changed: tuple[Path, StoreAddress, Variants], path: str
) -> None:
    folder, store, variants = changed
    made = lacking(checkpoint, path, variants=variants, experts={LAYER: (0, NEW)})
    with giving(checkpoint, store) as old, copying(made, ready(old)) as host:
        address = host.wait_ready(LOAD_TIMEOUT_S)
        assert torch.equal(answers(checkpoint, address, NEW), due(folder, checkpoint))


def test_without_the_store_and_without_a_host_that_reads_it_the_error_says_both(
    checkpoint: Checkpoint, changed: tuple[Path, StoreAddress, Variants]
) -> None:
    _, _, variants = changed
    blob = variants[LAYER][NEW].blob
    made = lacking(checkpoint, str(checkpoint.path))
    with (
        giving(checkpoint, StoreAddress("/absent/there")) as old,
        giving(checkpoint, None, "none") as none,
        copying(made, ready(old, none)) as host,
    ):
        host.wait_ready(LOAD_TIMEOUT_S)
        error = adopted(host, variants)
    assert error.startswith(f"expert 1 of layer 0 (blob {blob[:12]}): /absent/store has no blobs/")
    assert "and no other host gives its experts" in error
    assert "old: /absent/there has no blobs/" in error and "none: has no store of versions" in error
    with copying(made, ready()) as host:
        host.wait_ready(LOAD_TIMEOUT_S)
        assert "/absent/store has no blobs/" in (error := adopted(host, variants))
        assert "and no other host is ready" in error
    with running(made) as (host,):
        host.wait_ready(LOAD_TIMEOUT_S)
        assert "and no other host can be asked" in adopted(host, variants)


@pytest.mark.parametrize("fault", ["flip", "cut"])
def test_what_was_damaged_on_its_way_is_not_held(
    checkpoint: Checkpoint, changed: tuple[Path, StoreAddress, Variants], fault: str
) -> None:
    _, store, variants = changed
    made = lacking(checkpoint, str(checkpoint.path))
    with giving(checkpoint, store) as old, BadWire(old, fault, 100_000) as wire:
        with copying(made, ready(wire.address)) as host:
            host.wait_ready(LOAD_TIMEOUT_S)
            words = "the sha256 that it was sent with" if fault == "flip" else "closed in the middle"
            assert words in adopted(host, variants)
        with (
            giving(checkpoint, store, "good") as good,
            BadWire(old, fault, 100_000) as again,
            copying(made, ready(again.address, good)) as host,
        ):
            host.wait_ready(LOAD_TIMEOUT_S)
            assert adopted(host, variants) == "" and host.report().copied_from == ("good",)


def test_another_blob_than_was_asked_for_is_not_held(
    checkpoint: Checkpoint,
    changed: tuple[Path, StoreAddress, Variants],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, store, variants = changed
    monkeypatch.setattr(VariantReader, "give", lambda self, blob: b"another")
    with (
        giving(checkpoint, store) as old,
        copying(lacking(checkpoint, str(checkpoint.path)), ready(old)) as host,
    ):
        host.wait_ready(LOAD_TIMEOUT_S)
        assert f"what came is not blob {variants[LAYER][NEW].blob[:12]}" in adopted(host, variants)


def test_only_blobs_are_given_and_a_damaged_one_is_not(
    checkpoint: Checkpoint, changed: tuple[Path, StoreAddress, Variants], tmp_path: Path
) -> None:
    kept = Store(str(tmp_path))
    whole, _ = kept.blobs.put(b"whole")
    damaged, _ = kept.blobs.put(b"damaged")
    (file,) = tmp_path.rglob(damaged)
    file.chmod(0o644)
    file.write_bytes(b"otherwise")
    with giving(checkpoint, StoreAddress(str(tmp_path))) as old:
        asked: list[int] = []
        copy = PeerCopy(lacking(checkpoint, ABSENT), KEY, lambda: asked.append(1) or ready(old)(), QUICK)  # type: ignore[func-returns-value]
        with closing(copy):
            for name, words in (
                ("../../manifests", "is no blob's digest"),
                ("ab" * 32, "has no blobs/ab"),
                (damaged, "is damaged"),
            ):
                with pytest.raises(NoSourceError, match=words):
                    copy.version(name, 100)
            before = len(asked)
            assert copy.version(whole, 100) == b"whole"
            assert len(asked) == before, "the connection was lost"
            with pytest.raises(NoSourceError, match="5 bytes announced, at most 4 are due"):
                copy.version(whole, 4)


def _as_float16(forms: dict[str, TensorForm]) -> None:
    forms["up"] = TensorForm("F16", forms["up"].shape)


def _transposed(forms: dict[str, TensorForm]) -> None:
    forms["down"] = TensorForm("F32", forms["down"].shape[::-1])


def _longer(forms: dict[str, TensorForm]) -> None:
    forms["gate"] = TensorForm("F32", (forms["gate"].shape[0] + 1, *forms["gate"].shape[1:]))


def _without_down(forms: dict[str, TensorForm]) -> None:
    del forms["down"]


def _renamed(forms: dict[str, TensorForm]) -> None:
    forms["router"] = forms.pop("gate")


def strange(checkpoint: Checkpoint, store: Store, spoil: Callable[[dict[str, TensorForm]], None]) -> Variants:
    """A blob of an expert that is not like the layer's."""
    forms = dict(expert_form(checkpoint, LAYER).parts)
    spoil(forms)
    return {LAYER: {NEW: Variant(1, store.blobs.put(encoded(forms))[0])}}


def encoded(forms: Mapping[str, TensorForm], fused: str = "False") -> bytes:
    return encode(forms, {part: bytes(form.size) for part, form in forms.items()}, {"fused": fused})


@pytest.mark.parametrize(
    ("spoil", "by_headers", "by_config"),
    [
        (
            _as_float16,
            "up is F16 [96, 128], in the base checkpoint it is F32",
            "is float16, the base checkpoint",
        ),
        (_transposed, "down is F32 [96, 128], in the base", "down is [96, 128] per expert, config.json says"),
        (_longer, "gate is F32 [97, 128], in the base", "is no expert of 36864 parameters: "),
        (_without_down, "holds gate, up, the base checkpoint has down", "is no expert of 36864 parameters"),
        (_renamed, "holds down, router, up, the base", "is no expert of 36864 parameters: "),
    ],
    ids=["dtype", "transposed", "longer", "lacks a part", "another part"],
)
def test_a_blob_that_is_not_like_the_layers_experts_is_not_held(
    checkpoint: Checkpoint,
    tmp_path: Path,
    path: str,
    spoil: Callable[[dict[str, TensorForm]], None],
    by_headers: str,
    by_config: str,
) -> None:
    store = StoreAddress(str(tmp_path))
    variants = strange(checkpoint, Store(store.url), spoil)
    with giving(checkpoint, store) as old, copying(lacking(checkpoint, path, store), ready(old)) as host:
        host.wait_ready(LOAD_TIMEOUT_S)
        error = adopted(host, variants)
    assert f"blob {variants[LAYER][NEW].blob[:12]}" in error
    assert (by_config if path == ABSENT else by_headers) in error


def test_biases_of_another_length_are_not_held(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_tiny("gpt_oss", tmp_path / "model"))
    store = StoreAddress(str(tmp_path / "store"))
    forms = dict(expert_form(checkpoint, LAYER).parts)
    # Together as many numbers as before.
    forms["gate_up.bias"], forms["down.bias"] = forms["down.bias"], forms["gate_up.bias"]
    blob, _ = Store(store.url).blobs.put(encoded(forms, "True"))
    with (
        giving(checkpoint, None) as old,
        copying(lacking(checkpoint, ABSENT, store), ready(old)) as host,
    ):
        host.wait_ready(LOAD_TIMEOUT_S)
        error = adopted(host, {LAYER: {NEW: Variant(1, blob)}})
    assert "gate_up.bias is [128] per expert, config.json says" in error


def test_a_store_that_failed_is_not_asked_for_each_blob(
    checkpoint: Checkpoint, changed: tuple[Path, StoreAddress, Variants], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store, variants = changed
    blob = variants[LAYER][NEW].blob
    asked: list[str] = []

    class Copy:
        fails = False

        def version(self, blob: str, most: int) -> bytes:
            asked.append("host")
            if self.fails:
                raise NoSourceError("nobody")
            return Store(store.url).blobs.get(blob)

        def close(self) -> None:
            asked.append("closed")

    reader = VariantReader(lacking(checkpoint, ABSENT, variants=variants))
    from_store = reader._from_store
    monkeypatch.setattr(reader, "_from_store", lambda blob: asked.append("store") or from_store(blob))  # type: ignore[func-returns-value]
    copy = Copy()
    with reader.copying(copy):  # type: ignore[arg-type]
        for _ in range(2):
            assert reader(checkpoint, LAYER, NEW).parts.keys() == {"gate", "up", "down"}
        assert asked == ["store", "host", "host"]
        copy.fails = True
        with pytest.raises(CheckpointError, match=rf"blob {blob[:12]}\): /absent/store has .*, and nobody"):
            reader(checkpoint, LAYER, NEW)
    assert asked[3:] == ["host", "store", "closed"]
    with reader.copying(None), pytest.raises(CheckpointError, match="layer 0 has no expert 9"):
        reader(checkpoint, LAYER, 9)
