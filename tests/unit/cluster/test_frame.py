"""The frame codec: what goes in comes out, and nothing malformed gets through."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ProtocolError
from cluster.frame import (
    DISPATCH,
    DTYPE_CODES,
    DTYPE_NAMES,
    ERROR,
    HEADER,
    HEADER_BYTES,
    ITEM_BYTES,
    MAX_ERROR_BYTES,
    PING,
    REPLY,
    Frame,
    decode,
    dispatch_bytes,
    encode,
    manifest_id,
)


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    kind = draw(st.sampled_from([DISPATCH, REPLY]))
    dtype = draw(st.sampled_from(sorted(DTYPE_CODES.values())))
    top_k, rows = draw(st.integers(1, 255)), draw(st.integers(0, 1 << 20))
    hidden = draw(st.integers(1, 1 << 16))
    item = ITEM_BYTES[DTYPE_NAMES[dtype]]
    size = dispatch_bytes(rows, hidden, top_k, item) if kind == DISPATCH else rows * hidden * item
    return Frame(
        kind,
        draw(st.integers(0, 2**32 - 1)),
        draw(st.integers(0, 2**64 - 1)),
        draw(st.integers(0, 2**32 - 1)),
        draw(st.integers(0, 2**16 - 1)),
        dtype,
        top_k,
        rows,
        hidden,
        size,
        draw(st.integers(0, 2**64 - 1)),
    )


@given(frames())
def test_round_trip(frame: Frame) -> None:
    data = encode(frame)
    assert len(data) == HEADER_BYTES == 48
    assert decode(data) == frame


@given(frames(), st.integers(0, 1 << 40))
def test_a_size_that_contradicts_the_counts_is_refused(frame: Frame, size: int) -> None:
    if size == frame.payload_bytes:
        return
    with pytest.raises(ProtocolError, match="payload"):
        decode(encode(frame._replace(payload_bytes=size)))


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_noise_never_passes_silently(data: bytes) -> None:
    try:
        frame = decode(data)
    except ProtocolError:
        return
    assert encode(frame) == data


def test_each_broken_field_is_named() -> None:
    good = Frame(REPLY, 1, 2, 3, 4, DTYPE_CODES["float32"], 2, 5, 8, 160, 0)
    fields = list(HEADER.unpack(encode(good)))
    for position, value, message in (
        (0, 0x1234, "magic"),
        (1, 9, "protocol 9"),
        (2, 77, "kind 77"),
        (7, 50, "dtype"),
    ):
        broken = list(fields)
        broken[position] = value
        with pytest.raises(ProtocolError, match=message):
            decode(HEADER.pack(*broken))


def test_an_error_text_is_bounded() -> None:
    frame = Frame(ERROR, 1, 0, 0, 0, 0, 0, 0, 0, MAX_ERROR_BYTES + 1, 0)
    with pytest.raises(ProtocolError, match="at most"):
        decode(encode(frame))


def test_a_ping_needs_no_dtype() -> None:
    assert decode(encode(Frame(PING, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0))).request_id == 7


def test_manifest_id_is_the_digests_start() -> None:
    assert manifest_id("00000000000000ff" + "0" * 48) == 255
