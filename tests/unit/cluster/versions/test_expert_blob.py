"""Blobs of experts: the same bytes anywhere, and nothing else than what the base checkpoint has there."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from cluster.errors import CheckpointError, VersionError
from cluster.versions.expert_blob import (
    ExpertForm,
    check_dense,
    check_expert,
    dense_form,
    encode_dense,
    encode_expert,
    expert_form,
)
from cluster.versions.tensors import ITEM_BYTES, TensorForm, decode, encode
from tests.unit.cluster.versions import tiny

FORM = ExpertForm(
    {
        "gate": TensorForm("F16", (3, 2)),
        "up": TensorForm("F16", (3, 2)),
        "down": TensorForm("F16", (2, 3)),
        "down.bias": TensorForm("F32", (2,)),
    },
    fused=False,
)
PARTS = {part: bytes(range(form.size)) for part, form in FORM.parts.items()}
BLOB = encode_expert(FORM, PARTS)

forms = st.builds(
    TensorForm, st.sampled_from(sorted(ITEM_BYTES)), st.lists(st.integers(0, 3), max_size=3).map(tuple)
)


@given(st.dictionaries(st.text(max_size=5).filter(lambda name: name != "__metadata__"), forms), st.data())
def test_what_is_encoded_is_decoded(named: dict[str, TensorForm], data: st.DataObject) -> None:
    content = {
        name: data.draw(st.binary(min_size=form.size, max_size=form.size)) for name, form in named.items()
    }
    blob = encode(named, content, {"fused": "True"})
    found = decode(blob, "it")
    assert found.forms == named and found.metadata == {"fused": "True"}
    assert {name: bytes(view) for name, view in found.data.items()} == content
    assert blob == encode(dict(reversed(named.items())), content, {"fused": "True"})


@given(st.integers(0, len(BLOB) - 1))
def test_a_blob_that_is_cut_off_is_refused(length: int) -> None:
    with pytest.raises(VersionError, match="it"):
        check_expert(BLOB[:length], FORM, "it")


@given(st.integers(0, len(BLOB) - 1), st.integers(1, 255))
def test_one_wrong_byte_of_the_header_never_gives_another_expert(place: int, change: int) -> None:
    wrong = bytearray(BLOB)
    wrong[place] ^= change
    try:
        found = check_expert(bytes(wrong), FORM, "it")
    except VersionError:
        return
    # Whether numbers are right, the blob's digest says.
    assert {part: len(view) for part, view in found.items()} == {p: len(data) for p, data in PARTS.items()}


@given(st.binary(max_size=64), st.integers(0, 80))
def test_any_bytes_are_refused_in_words(noise: bytes, length: int) -> None:
    for data in (noise, length.to_bytes(8, "little") + noise):
        with pytest.raises(VersionError):
            check_expert(data, FORM, "it")


@pytest.mark.parametrize(
    "header",
    [
        [],
        1,
        {"down": 1},
        {"down": {"dtype": "F16", "shape": [2, 3]}},
        {"down": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 13]}},
        {"down": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0.0, 12]}},
        {"down": {"dtype": "F16", "shape": [2, float("inf")], "data_offsets": [0, 12]}},
        {"down": {"dtype": "F16", "shape": [-2, -3], "data_offsets": [0, 12]}},
        {"down": {"dtype": "Q4", "shape": [2, 3], "data_offsets": [0, 12]}},
        {"down": {"dtype": "F16", "shape": [2, 3], "data_offsets": [4, 16]}},
        {"__metadata__": 3, "down": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}},
    ],
)
def test_headers_that_make_no_sense_are_refused(header: Any) -> None:
    text = json.dumps(header).encode()
    with pytest.raises(VersionError, match="it"):
        check_expert(len(text).to_bytes(8, "little") + text + bytes(12), FORM, "it")
    deep = b"[" * 60_000
    with pytest.raises(VersionError, match="makes no sense"):
        decode(len(deep).to_bytes(8, "little") + deep, "it")


def test_a_blob_is_what_safetensors_itself_reads_and_aligned() -> None:
    found = load(BLOB)
    assert {part: array.tobytes() for part, array in found.items()} == PARTS
    assert found["down.bias"].dtype == np.float32 and found["gate"].shape == (3, 2)
    length = int.from_bytes(BLOB[:8], "little")
    header = json.loads(BLOB[8 : 8 + length])
    assert length % 8 == 0 and list(header) == ["__metadata__", "down.bias", "down", "gate", "up"]
    assert header["__metadata__"] == {"fused": "False"}


def test_what_others_wrote_is_read_if_it_is_the_same_expert() -> None:
    arrays = {
        part: np.frombuffer(data, np.float32 if part == "down.bias" else np.float16).reshape(
            FORM.parts[part].shape
        )
        for part, data in PARTS.items()
    }
    found = check_expert(save(arrays, metadata={"fused": "False"}), FORM, "it")
    assert {part: bytes(view) for part, view in found.items()} == PARTS


def other(**forms: TensorForm | None) -> bytes:
    changed = {**FORM.parts, **forms}
    kept = {part: form for part, form in changed.items() if form is not None}
    return encode(kept, {part: bytes(form.size) for part, form in kept.items()}, {"fused": "False"})


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        (
            other(gate=TensorForm("F16", (2, 3))),
            r"gate is F16 \[2, 3\], in the base checkpoint it is F16 \[3, 2\]",
        ),
        (other(gate=TensorForm("BF16", (3, 2))), r"gate is BF16 \[3, 2\], .* F16 \[3, 2\]"),
        (other(gate=None), "holds down, down.bias, up, the base checkpoint has down, down.bias, gate, up"),
        (other(more=TensorForm("F16", (1,))), "holds down, down.bias, gate, more, up"),
        (encode_expert(ExpertForm(FORM.parts, True), PARTS), "says fused: True, it should be False"),
    ],
)
def test_an_expert_of_another_kind_is_refused(blob: bytes, words: str) -> None:
    with pytest.raises(VersionError, match=f"blob x.*{words}"):
        check_expert(blob, FORM, "blob x")


@pytest.mark.parametrize("fused", [False, True])
def test_the_form_is_the_base_checkpoint_s(tmp_path: Path, fused: bool) -> None:
    checkpoint = tiny.base(tmp_path, fused=fused)
    form = expert_form(checkpoint, 1)
    expected: dict[str, tuple[int, ...]] = (
        {"gate_up": (8, 12), "down": (6, 8), "gate_up.bias": (12,), "down.bias": (8,)}
        if fused
        else {"gate": (6, 8), "up": (6, 8), "down": (8, 6)}
    )
    assert form.fused == fused
    assert form.parts == {part: TensorForm("F16", shape) for part, shape in expected.items()}
    assert form.size == 2 * sum(map(prod, expected.values()))
    with pytest.raises(CheckpointError, match="layer 5 has no routed experts"):
        expert_form(checkpoint, 5)


def test_a_tensor_of_the_engine_s_goes_under_its_own_name(tmp_path: Path) -> None:
    checkpoint = tiny.base(tmp_path)
    form = dense_form(checkpoint, tiny.GATE)
    assert form == TensorForm("F16", (tiny.EXPERTS, tiny.HIDDEN))
    data = bytes(range(form.size))
    blob = encode_dense(tiny.GATE, form, data)
    assert bytes(check_dense(blob, tiny.GATE, form, "it")) == data == load(blob)[tiny.GATE].tobytes()
    with pytest.raises(VersionError, match=r"it holds .*gate.weight, the base checkpoint has other"):
        check_dense(blob, "other", form, "it")
    for name, words in (
        (tiny.name(0, 1, "w1.weight"), "belongs to experts"),
        ("model.layers.2.block.gate.weight", "nobody loads"),
        ("model.layers.1.gate.weight", "has no tensor model.layers.1.gate.weight"),
    ):
        with pytest.raises(VersionError, match=words):
            dense_form(checkpoint, name)
