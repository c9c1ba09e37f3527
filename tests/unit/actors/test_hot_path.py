"""What the data plane keeps between messages: parts of headers, views of memory, slots, prepared calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import actors.raw_memory
from actors.header_parts import DISPATCH_LEAD, PARTS, REPLY_LEAD, lead, rest
from actors.hosted_layer import FEW, HostedLayer, Ids
from actors.raw_memory import RawMemory
from cluster.errors import HostError
from cluster.frame import DISPATCH, KINDS, REPLY, Frame, encode

u8, u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))


@given(
    st.sampled_from(sorted(KINDS)),
    u32,
    st.tuples(u64, u32, u16, u8, u8, u32, u32, u64),
    st.integers(0, 2**63),
)
def test_the_parts_make_the_header_of_the_protocol(
    kind: int, number: int, fields: tuple[int, ...], tail: int
) -> None:
    assert PARTS.pack(lead(kind), number, rest(kind, *fields), tail) == encode(
        Frame(kind, number, *fields, tail)
    )


def test_leads_differ_by_kind() -> None:
    assert (lead(DISPATCH), lead(REPLY)) == (DISPATCH_LEAD, REPLY_LEAD)
    assert len({lead(kind) for kind in KINDS}) == len(KINDS)


def test_a_view_reads_and_writes_the_tensor_and_no_more() -> None:
    tensor = torch.arange(8, dtype=torch.int32)
    view = RawMemory(16)[tensor.data_ptr()]
    assert view.cast("i").tolist() == [0, 1, 2, 3]
    view[:] = np.array([9, 8, 7, 6], np.int32).tobytes()
    assert tensor.tolist() == [9, 8, 7, 6, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="different structures"):
        view[:] = bytes(17)


def test_views_are_kept_and_their_number_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.raw_memory, "_MAX_KEPT", 4)
    tensor, memory = torch.arange(64, dtype=torch.uint8), RawMemory(1)
    first = tensor.data_ptr()
    assert memory[first] is memory[first]
    for offset in range(64):
        assert memory[first + offset].tolist() == [offset]
        assert len(memory) <= 4


class NoExperts:
    def compute(self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
        raise NotImplementedError


@given(st.data(), st.integers(1, 6), st.integers(1, 2 * FEW), st.booleans())
def test_slots_are_those_of_a_dictionary(data: st.DataObject, experts: int, rows: int, whole: bool) -> None:
    """Whatever the ids, and whether or not the host holds the whole layer: right, or refused."""
    everyone = list(range(experts))
    owned = tuple(
        everyone if whole else data.draw(st.permutations(everyone))[: data.draw(st.integers(1, experts))]
    )
    likely, any_ = (
        st.sampled_from([-1, *owned]),
        st.sampled_from([-2, experts, *everyone, -(2**31), 2**31 - 1]),
    )
    ids = data.draw(st.lists(likely, min_size=rows, max_size=rows))
    if data.draw(st.booleans()):
        ids[data.draw(st.integers(0, rows - 1))] = data.draw(any_)
    array, slots = np.array(ids, np.int32).reshape(rows, 1), Ids.of(np.full((rows, 1), 77, np.int32))
    layer = HostedLayer(NoExperts(), owned, experts)
    slot = {-1: -1, **{expert: position for position, expert in enumerate(owned)}}
    if any(expert not in slot for expert in ids):
        with pytest.raises((IndexError, HostError)):
            layer.to_slots(Ids.of(array), slots)
    else:
        layer.to_slots(Ids.of(array), slots)
        assert slots.array.ravel().tolist() == [slot[expert] for expert in ids]
        assert slots.tensor.data_ptr() == slots.array.ctypes.data
