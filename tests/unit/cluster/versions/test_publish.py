"""Publishing: what changed is written once, what did not is not written, and what can't be is refused before."""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, load_file, save_file

from cluster.checkpoint import Checkpoint
from cluster.errors import CheckpointError, VersionError
from cluster.versions.expert_blob import check_expert, expert_form
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


def held(
    store: Store, checkpoint: Checkpoint, digest: str, layer: int, expert: int
) -> dict[str, bytes] | None:
    """The expert's parts in that version; None for the base's."""
    blob = store.manifests.get(digest).experts.get(layer, {}).get(expert)
    if blob is None:
        return None
    parts = check_expert(store.blobs.get(blob), expert_form(checkpoint, layer), "it")
    return {part: bytes(view) for part, view in parts.items()}


def test_changed_experts_are_blobs_and_the_others_the_parent_s(
    checkpoint: Checkpoint, store: Store, tmp_path: Path
) -> None:
    base = publish_base(store, checkpoint)
    first = publish(
        store,
        checkpoint,
        tiny.changes(checkpoint, tmp_path / "a.safetensors", [(0, 1), (0, 2), (1, 3)]),
        parent=base,
        author="a",
        reason="r",
        metrics={"loss": 1.0},
    )
    assert first.changed == {0: (1, 2), 1: (3,)} and first.changed_dense == ()
    assert (first.new_blobs, first.reused_blobs) == (3, 0)
    manifest = store.manifests.get(first.digest)
    sizes = sum(map(store.blobs.size, manifest.blobs)) + store.manifests.size(first.digest)
    assert first.bytes_written == sizes
    assert (manifest.parent, manifest.author, manifest.reason, manifest.metrics) == (
        base,
        "a",
        "r",
        {"loss": 1.0},
    )
    assert manifest.model == checkpoint.digest and manifest.created > 1e9
    parts = held(store, checkpoint, first.digest, 0, 1)
    wanted = {value.tobytes() for value in load_file(tmp_path / "a.safetensors").values()}
    assert parts is not None and set(parts.values()) <= wanted
    assert held(store, checkpoint, first.digest, 0, 0) is None

    gate = load_file(checkpoint.path / "model.safetensors")[tiny.GATE] * 2
    second = publish(
        store,
        checkpoint,
        tiny.changes(checkpoint, tmp_path / "b.safetensors", [(0, 1), (1, 0)], **{tiny.GATE: gate}),
        parent=first.digest,
    )
    assert second.changed == {1: (0,)} and second.changed_dense == (tiny.GATE,), "0, 1 is as in the parent"
    assert (second.new_blobs, second.reused_blobs) == (2, 3)
    assert held(store, checkpoint, second.digest, 1, 3) == held(store, checkpoint, first.digest, 1, 3)
    dense = store.manifests.get(second.digest).dense[tiny.GATE]
    assert np.array_equal(load(store.blobs.get(dense))[tiny.GATE], gate)


def test_what_is_again_as_in_the_base_needs_no_blob(
    checkpoint: Checkpoint, store: Store, tmp_path: Path
) -> None:
    first = publish(store, checkpoint, tiny.changes(checkpoint, tmp_path / "a.safetensors", [(0, 1), (1, 2)]))
    back = publish(
        store,
        checkpoint,
        tiny.changes(checkpoint, tmp_path / "b.safetensors", [(0, 1), (0, 3)], by=0.0),
        parent=first.digest,
    )
    assert back.changed == {0: (1,)} and back.new_blobs == 0
    assert store.manifests.get(back.digest).experts == {1: store.manifests.get(first.digest).experts[1]}


def test_a_whole_checkpoint_is_compared_with_the_base(
    checkpoint: Checkpoint, store: Store, tmp_path: Path
) -> None:
    """Everything is named in it, so nothing is left of the parent."""
    first = publish(store, checkpoint, tiny.changes(checkpoint, tmp_path / "a.safetensors", [(1, 2)]))
    given = load_file(checkpoint.path / "model.safetensors")
    fused = checkpoint.layout(0).fused
    down = "model.layers.0.block.experts.down_proj" if fused else tiny.name(0, 1, "w2.weight")
    if fused:
        given[down][1] *= 3
    else:
        given[down] *= 3
    given["model.embed_tokens.weight"] += 1
    tuned = tiny.save(tmp_path / "tuned", given)
    made = publish(store, checkpoint, tuned, parent=first.digest)
    assert made.changed == {0: (1,), 1: (2,)} and made.changed_dense == ("model.embed_tokens.weight",)
    assert store.manifests.get(made.digest).experts.keys() == {0}
    base = publish(store, checkpoint, checkpoint.path)
    assert base.digest == publish_base(store, checkpoint) == Manifest(checkpoint.digest).digest
    again = publish(store, checkpoint, checkpoint.path, parent=made.digest)
    assert store.manifests.get(again.digest).blobs == frozenset() and again.changed == {0: (1,)}


def test_nothing_that_is_new_is_an_error(checkpoint: Checkpoint, store: Store, tmp_path: Path) -> None:
    source = tiny.changes(checkpoint, tmp_path / "a.safetensors", [(0, 1)])
    first = publish(store, checkpoint, source)
    before = store.files.names("")
    with pytest.raises(VersionError, match=f"nothing to publish: .* in version {first.digest[:12]} already"):
        publish(store, checkpoint, source, parent=first.digest)
    with pytest.raises(VersionError, match=r"nothing to publish: .* in the base checkpoint already"):
        publish(store, checkpoint, tiny.changes(checkpoint, tmp_path / "b.safetensors", [(0, 1)], by=0.0))
    with pytest.raises(VersionError, match="nothing to publish"):
        publish(store, checkpoint, checkpoint.path, parent=publish_base(store, checkpoint))
    assert set(store.files.names("")) - set(before) == {f"manifests/{publish_base(store, checkpoint)}"}


def test_several_files_of_a_folder_are_one_change(
    checkpoint: Checkpoint, store: Store, tmp_path: Path
) -> None:
    tiny.changes(checkpoint, tmp_path / "parts" / "one.safetensors", [(0, 1)])
    tiny.changes(checkpoint, tmp_path / "parts" / "two.safetensors", [(1, 1)])
    assert publish(store, checkpoint, tmp_path / "parts").changed == {0: (1,), 1: (1,)}
    tiny.changes(checkpoint, tmp_path / "parts" / "three.safetensors", [(1, 1)])
    with pytest.raises(VersionError, match=r"is in .*three\.safetensors and in .*two\.safetensors"):
        publish(store, checkpoint, tmp_path / "parts")


def test_tensors_of_all_experts_are_cut_up(store: Store, tmp_path: Path) -> None:
    checkpoint = tiny.base(tmp_path, fused=True)
    whole = "model.layers.0.block.experts."
    given = {n: v for n, v in load_file(checkpoint.path / "model.safetensors").items() if n.startswith(whole)}
    given[f"{whole}gate_up_proj"][3] += 1
    save_file(given, tmp_path / "a.safetensors")
    assert publish(store, checkpoint, tmp_path / "a.safetensors").changed == {0: (3,)}


def half(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float16)


W1 = tiny.name(0, 1, "w1.weight")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t | {"model.layers.1.block.gates.weight": half(4, 8)},
            "no tensor model.layers.1.block.gates",
        ),
        (
            lambda t: t | {"model.layers.2.block.gate.weight": half(4, 8)},
            "further tokens, which nobody loads",
        ),
        (lambda t: t | {tiny.name(0, 4, "w1.weight"): half(6, 8)}, "layer 0 has no expert 4"),
        (lambda t: t | {tiny.name(1, 1, "gate_up_proj"): half(12, 8)}, "is no part of an expert"),
        (lambda t: t | {tiny.name(1, 1, "w9.weight"): half(6, 8)}, "is no part of an expert"),
        (
            lambda t: t | {"model.layers.0.block.experts.down_proj": half(4, 8, 6)},
            "holds all experts of layer 0",
        ),
        (
            lambda t: t | {tiny.name(0, 1, "gate_proj.weight"): half(6, 8)},
            "gate of expert 1 .* is there twice",
        ),
        (lambda t: t | {W1: half(8, 6)}, r"w1.weight is F16 \[8, 6\], expected is F16 \[6, 8\]"),
        (lambda t: t | {W1: np.ones((6, 8), np.float32)}, r"w1.weight is F32 \[6, 8\], expected is F16"),
        (lambda t: t | {tiny.GATE: half(3, 8)}, r"gate.weight is F16 \[3, 8\], expected is F16 \[4, 8\]"),
        (lambda t: t | {tiny.GATE: half(5, 7)}, r"gate.weight is F16 \[5, 7\], expected is F16 \[5, 8\]"),
        (lambda t: t | {tiny.GATE: half(5, 8)}, "layer 1 has a row for expert 4, which is not there"),
        (
            lambda t: {n: v for n, v in t.items() if n != W1},
            r"gate of expert 1 of layer 0 is missing \(there: down, up\)",
        ),
        (lambda t: {}, "holds no tensors"),
    ],
)
def test_what_the_base_has_no_place_for_is_refused_before_anything_is_written(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], words: str
) -> None:
    checkpoint, store = tiny.base(tmp_path), Store(str(tmp_path / "store"))
    source = tiny.changes(checkpoint, tmp_path / "a.safetensors", [(0, 1), (1, 2)])
    save_file(change(load_file(source)), source)
    with pytest.raises(VersionError, match=words) as caught:
        publish(store, checkpoint, source)
    assert caught.value.hint and not (tmp_path / "store").exists()


def test_a_source_that_is_no_change_of_the_base_is_refused(tmp_path: Path) -> None:
    checkpoint, store = tiny.base(tmp_path), Store(str(tmp_path / "store"))
    with pytest.raises(VersionError, match="no such file or folder"):
        publish(store, checkpoint, tmp_path / "absent")
    source = tiny.changes(checkpoint, tmp_path / "a.safetensors", [(0, 1)])
    source.write_bytes(source.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="bytes long, its header says"):
        publish(store, checkpoint, source)
    other = tiny.save(tmp_path / "other", tiny.tensors(seed=1))
    (other / "config.json").write_text('{"model_type": "olmoe"}')
    with pytest.raises(VersionError, match="of type olmoe, the base checkpoint is of type mixtral"):
        publish(store, checkpoint, other)


def test_a_checkpoint_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    """Or what is not named in it would silently be the parent's."""
    checkpoint, store = tiny.base(tmp_path), Store(str(tmp_path / "store"))
    given = {name: value for name, value in tiny.tensors().items() if ".1.block.experts.3." not in name}
    with pytest.raises(VersionError, match="is a checkpoint without expert 3 of layer 1"):
        publish(store, checkpoint, tiny.save(tmp_path / "tuned", given))


def test_three_experts_of_some_size_take_no_time_and_no_more_than_their_bytes(tmp_path: Path) -> None:
    shapes = {"w1.weight": (576, 1536), "w3.weight": (576, 1536), "w2.weight": (1536, 576)}
    given = {
        tiny.name(0, expert, part): np.full(shape, expert, np.float16)
        for expert in range(4)
        for part, shape in shapes.items()
    }
    checkpoint, store = Checkpoint.open(tiny.save(tmp_path / "base", given)), Store(str(tmp_path / "store"))
    source = tiny.changes(checkpoint, tmp_path / "a.safetensors", [(0, 0), (0, 1), (0, 3)])
    began = time.monotonic()
    made = publish(store, checkpoint, source)
    assert time.monotonic() - began < 2.0
    size = expert_form(checkpoint, 0).size
    assert 3 * size < made.bytes_written < 3 * size + 4096
    written = sum(path.stat().st_size for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert written == made.bytes_written


def test_a_parent_that_will_not_do_is_refused(tmp_path: Path) -> None:
    checkpoint, store = tiny.base(tmp_path), Store(str(tmp_path / "store"))
    source = tiny.changes(checkpoint, tmp_path / "a.safetensors", [(0, 1)])
    with pytest.raises(VersionError, match="has no manifests/abc"):
        publish(store, checkpoint, source, parent="abc")
    foreign = store.manifests.put(Manifest("f" * 64))
    with pytest.raises(VersionError, match=f"version {foreign[:12]} is of another model"):
        publish(store, checkpoint, source, parent=foreign)
    first = publish(store, checkpoint, source)
    lost = store.manifests.get(first.digest).experts[0][1]
    store.blobs.remove(lost)
    following = tiny.changes(checkpoint, tmp_path / "b.safetensors", [(1, 1)])
    with pytest.raises(VersionError, match=f"parent, version .* that of layer 0, expert 1, {lost[:12]}"):
        publish(store, checkpoint, following, parent=first.digest)
    assert publish(store, checkpoint, source, created=0.0).new_blobs == 1, "published again, it is whole"
    assert publish(store, checkpoint, following, parent=first.digest).changed == {1: (1,)}


def test_a_version_whose_blobs_are_collected_while_it_is_made_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, store = tiny.base(tmp_path), Store(str(tmp_path / "store"))

    def collected(step: str) -> None:
        if step == "before-manifest":
            for digest in store.blobs.all():
                store.blobs.remove(digest)

    monkeypatch.setattr("cluster.versions.publish.reach", collected)
    with pytest.raises(VersionError, match="just made, lacks 1 of its blobs"):
        publish(store, checkpoint, tiny.changes(checkpoint, tmp_path / "a.safetensors", [(0, 1)]))
    assert store.manifests.all() == []


Step = dict[tuple[int, int], int]
steps = st.lists(
    st.dictionaries(
        st.tuples(st.integers(0, tiny.LAYERS - 1), st.integers(0, tiny.EXPERTS - 1)),
        st.integers(0, 2),
        min_size=1,
    ),
    max_size=5,
)


@settings(max_examples=25)
@given(steps, st.booleans())
def test_a_chain_of_versions_is_what_was_published(chain: list[Step], fused: bool) -> None:
    """Each version holds, expert by expert, what was last given; equal experts are one blob, the base's none."""
    folder = Path(tempfile.mkdtemp())
    try:
        checkpoint = tiny.base(folder, fused=fused)
        store, parent = Store(f"memory://{uuid.uuid4().hex}"), ""
        given: Step = {}
        for step in chain:
            file = folder / "a.safetensors"
            tensors: dict[str, Any] = {}
            for place, by in step.items():
                for name, value in tiny.expert(checkpoint, *place).items():
                    tensors[name] = value + np.float16(by)
            save_file(tensors, file)
            following = {place: by for place, by in {**given, **step}.items() if by}
            if following == given:
                with pytest.raises(VersionError, match="nothing to publish"):
                    publish(store, checkpoint, file, parent=parent)
                continue
            made = publish(store, checkpoint, file, parent=parent)
            changed = {place for place in {*given, *following} if given.get(place) != following.get(place)}
            assert {(la, e) for la, experts in made.changed.items() for e in experts} == changed
            given, parent = following, made.digest
            manifest = store.manifests.get(parent)
            assert {(la, e) for la, experts in manifest.experts.items() for e in experts} == given.keys()
            assert store.missing(manifest) == ()
        for (layer, expert), by in given.items():
            wanted = tiny.expert(checkpoint, layer, expert).values()
            parts = held(store, checkpoint, parent, layer, expert)
            assert parts is not None
            assert sorted(parts.values()) == sorted((value + np.float16(by)).tobytes() for value in wanted)
    finally:
        shutil.rmtree(folder)
