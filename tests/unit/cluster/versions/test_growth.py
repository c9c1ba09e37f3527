"""Publishing versions with more experts in a layer, and with fewer."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, load_file, save_file

from cluster.checkpoint import Checkpoint
from cluster.errors import VersionError
from cluster.versions.growth import ExpertId
from cluster.versions.manifest import Manifest
from cluster.versions.publish import publish, publish_base
from cluster.versions.store import Store
from tests.unit.cluster.versions import tiny


@pytest.fixture(params=[False, True], ids=["per-expert", "fused"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return tiny.base(tmp_path, fused=request.param)


@pytest.fixture
def store() -> Store:
    return Store(f"memory://{uuid.uuid4().hex}")


def router(store: Store, manifest: Manifest) -> np.ndarray:
    return load(store.blobs.get(manifest.dense[tiny.GATE]))[tiny.GATE]


def test_a_clone_is_a_row_of_the_router_and_nothing_else(checkpoint: Checkpoint, store: Store) -> None:
    made = publish(store, checkpoint, None, clones=[ExpertId(1, 2), ExpertId(1, 0)])
    manifest = store.manifests.get(made.digest)
    gate = load_file(checkpoint.path / "model.safetensors")[tiny.GATE]
    assert made.new_blobs == 1 and made.changed == {1: (4, 5)} and made.changed_dense == (tiny.GATE,)
    assert (manifest.experts, manifest.added, manifest.retired) == ({}, {1: {4: 2, 5: 0}}, {})
    assert np.array_equal(router(store, manifest), np.concatenate([gate, gate[[2, 0]]]))


def test_a_clone_is_changed_by_a_later_version_and_its_origin_is_not(
    checkpoint: Checkpoint, store: Store, tmp_path: Path
) -> None:
    first = publish(store, checkpoint, tiny.changes(checkpoint, tmp_path / "a.safetensors", [(1, 2)]))
    own = store.manifests.get(first.digest).experts[1][2]
    cloned = publish(store, checkpoint, None, parent=first.digest, clones=[ExpertId(1, 2)])
    manifest = store.manifests.get(cloned.digest)
    assert manifest.experts == {1: {2: own, 4: own}}, "the same bytes, once"
    assert (cloned.new_blobs, cloned.reused_blobs) == (1, 1)

    parts = tiny.expert(checkpoint, 1, 3)
    save_file({name.replace(".3.", ".4."): part for name, part in parts.items()}, tmp_path / "b.safetensors")
    changed = publish(store, checkpoint, tmp_path / "b.safetensors", parent=cloned.digest)
    assert changed.changed == {1: (4,)} and changed.new_blobs == 1
    again = publish(store, checkpoint, None, parent=changed.digest, clones=[ExpertId(1, 4)])
    assert store.manifests.get(again.digest).added == {1: {4: 2, 5: 2}}, "beside one of the base's"
    # What the base has beside it needs no blob.
    parts = tiny.expert(checkpoint, 1, 2)
    save_file({name.replace(".2.", ".4."): part for name, part in parts.items()}, tmp_path / "c.safetensors")
    back = publish(store, checkpoint, tmp_path / "c.safetensors", parent=changed.digest)
    assert store.manifests.get(back.digest).experts == {1: {2: own}} and back.new_blobs == 0


def test_a_longer_router_comes_with_the_new_experts(
    checkpoint: Checkpoint, store: Store, tmp_path: Path
) -> None:
    gate = np.ones((6, tiny.HIDDEN), np.float16)
    parts = {**tiny.expert(checkpoint, 1, 3), **tiny.expert(checkpoint, 0, 1)}
    given = {name.replace("1.block.experts.3", "1.block.experts.5"): part for name, part in parts.items()}
    given |= {name.replace(".5.", ".4."): part * 2 for name, part in given.items() if ".5." in name}
    save_file({**given, tiny.GATE: gate}, tmp_path / "a.safetensors")
    made = publish(store, checkpoint, tmp_path / "a.safetensors")
    manifest = store.manifests.get(made.digest)
    assert manifest.added == {1: {4: 0, 5: 1}} and sorted(manifest.experts[1]) == [4, 5]
    assert 0 not in manifest.experts, "that one is as in the base"
    assert np.array_equal(router(store, manifest), gate)
    with pytest.raises(VersionError, match=r"gate.weight is F16 \[4, 8\], expected is F16 \[6, 8\]"):
        save_file({tiny.GATE: gate[:4]}, tmp_path / "b.safetensors")
        publish(store, checkpoint, tmp_path / "b.safetensors", parent=made.digest)


def test_a_checkpoint_with_more_experts_is_a_version(
    checkpoint: Checkpoint, store: Store, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint.path, tmp_path / "grown")
    tensors = load_file(tmp_path / "grown" / "model.safetensors")
    for layer in range(tiny.LAYERS):
        of_layer = f"model.layers.{layer}.block."
        tensors[of_layer + "gate.weight"] = np.ones((5, tiny.HIDDEN), np.float16)
        for part, shape in tiny.FUSED_SHAPES.items() if checkpoint.layout(layer).fused else ():
            whole = of_layer + "experts." + part
            tensors[whole] = np.concatenate([tensors[whole], np.ones((1, *shape), np.float16)])
        if not checkpoint.layout(layer).fused:
            for part, shape in tiny.SHAPES.items():
                tensors[tiny.name(layer, 4, part)] = np.ones(shape, np.float16)
    save_file(tensors, tmp_path / "grown" / "model.safetensors")
    made = publish(store, checkpoint, tmp_path / "grown", parent=publish_base(store, checkpoint))
    assert made.changed == {0: (4,), 1: (4,)} and made.new_blobs == 3, (
        "the two new experts are alike but for..."
    )


def test_a_retired_expert_keeps_its_number_and_needs_no_blob(
    checkpoint: Checkpoint, store: Store, tmp_path: Path
) -> None:
    first = publish(store, checkpoint, tiny.changes(checkpoint, tmp_path / "a.safetensors", [(1, 2), (0, 0)]))
    made = publish(
        store, checkpoint, None, parent=first.digest, clones=[ExpertId(1, 3)], retired=[ExpertId(1, 2)]
    )
    manifest = store.manifests.get(made.digest)
    assert manifest.retired == {1: (2,)} and manifest.added == {1: {4: 3}} and 1 not in manifest.experts
    assert made.changed == {1: (2, 4)}
    later = publish(store, checkpoint, None, parent=made.digest, retired=[ExpertId(1, 4)])
    assert store.manifests.get(later.digest).retired == {1: (2, 4)}
    assert later.changed == {1: (4,)} and later.new_blobs == 0


@pytest.mark.parametrize(
    ("clones", "retired", "words"),
    [
        ([(1, 4)], [], "layer 1 has no expert 4"),
        ([(7, 0)], [], "layer 7 of the base checkpoint has no experts"),
        ([], [(7, 0)], "layer 7 of the base checkpoint has no experts"),
        ([], [(0, 4)], "layer 0 has no expert 4"),
        ([], [(1, 2)], "expert 2 of layer 1 is retired already"),
        ([(1, 2)], [], "expert 2 of layer 1 is retired already"),
        (
            [],
            [(0, 0), (0, 1), (0, 3)],
            "layer 0 would have 1 experts to choose from, and its router chooses 2",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    checkpoint: Checkpoint,
    store: Store,
    clones: list[tuple[int, int]],
    retired: list[tuple[int, int]],
    words: str,
) -> None:
    parent = publish(store, checkpoint, None, retired=[ExpertId(1, 2)]).digest
    before = store.manifests.all()
    with pytest.raises(VersionError, match=words):
        publish(
            store,
            checkpoint,
            None,
            parent=parent,
            clones=[ExpertId(*which) for which in clones],
            retired=[ExpertId(*which) for which in retired],
        )
    assert store.manifests.all() == before


@pytest.mark.parametrize("text", ["3", "3:", ":4", "a:b", "3:-1", "1:2:3"])
def test_an_expert_is_written_as_layer_and_number(text: str) -> None:
    assert ExpertId.parse("3:0") == (3, 0)
    with pytest.raises(VersionError, match="names no expert"):
        ExpertId.parse(text)


def test_versions_without_growth_have_the_names_that_they_had() -> None:
    assert Manifest("m").digest == "edfbbbe2448d3f81a17c6b203c2ae59b2f16a3a71af8b3939689abf8fc796e6c"
    assert b"added" not in Manifest("m").to_json()
