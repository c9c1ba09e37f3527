"""A frame's header in four parts, for the hot path: what one message differs in, and the rest in one piece.

    lead    4 bytes   magic, version, kind
    number  4 bytes   request id
    rest   32 bytes   manifest, epoch, layer, dtype, top-k, rows, hidden size, payload bytes
    tail    8 bytes   nanoseconds the host computed

A step sends the same few rests layer after layer, so both ends keep those that they have made or checked,
and compare 32 bytes where packing or checking twelve fields would cost ten times as much.
"""

from __future__ import annotations

import struct

from cluster.frame import DISPATCH, HEADER, HEADER_BYTES, MAGIC, PROTOCOL_VERSION, REPLY

PARTS = struct.Struct("<4sI32sQ")
assert PARTS.size == HEADER_BYTES

# Some layers times some row counts; more are forgotten all at once.
MAX_KEPT = 4096


def lead(kind: int) -> bytes:
    """The first part of every message of that kind."""
    return _parts(kind)[0]


def rest(kind: int, *fields: int) -> bytes:
    """The third part: fields from `manifest` to `payload_bytes`, in the header's order.

    struct.error if one is out of its range.
    """
    return _parts(kind, *fields)[2]


def _parts(kind: int, *fields: int) -> tuple[bytes, int, bytes, int]:
    values = fields or (0,) * 8
    return PARTS.unpack(HEADER.pack(MAGIC, PROTOCOL_VERSION, kind, 0, *values, 0))


DISPATCH_LEAD, REPLY_LEAD = lead(DISPATCH), lead(REPLY)
