"""The data plane's binary frame: one fixed header per message, little-endian, 48 bytes.

A dispatch header announces `rows` rows of `hidden` activations with `top_k` expert ids and weights
each; a reply announces the same rows summed. The payload follows on TCP and lies in shared memory
on the same node, so the header is all that a unix socket carries.

    offset  size  field
    0       2     magic "EM"
    2       1     protocol version
    3       1     kind (DISPATCH, REPLY, ERROR, PING, PONG)
    4       4     request id: a reply repeats it, so a late one is recognised and dropped
    8       8     manifest: first 8 bytes of the manifest's sha256
    16      4     epoch of the placement table the sender used
    20      2     layer
    22      1     dtype code
    23      1     top_k
    24      4     rows
    28      4     hidden size
    32      8     payload bytes
    40      8     nanoseconds the host computed (REPLY), else 0
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from cluster.errors import ProtocolError

PROTOCOL_VERSION = 1
MAGIC = 0x4D45
HEADER = struct.Struct("<HBBIQIHBBIIQQ")
HEADER_BYTES = HEADER.size

DISPATCH, REPLY, ERROR, PING, PONG = 1, 2, 3, 4, 5
KINDS = frozenset((DISPATCH, REPLY, ERROR, PING, PONG))

DTYPE_CODES = {"float32": 1, "bfloat16": 2, "float16": 3}
DTYPE_NAMES = {code: name for name, code in DTYPE_CODES.items()}
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# An error's text travels behind its header; more than this is cut by the sender, refused by the reader.
MAX_ERROR_BYTES = 4096


class Frame(NamedTuple):
    """A decoded header. Field meanings and units are in the module's table."""

    kind: int
    request_id: int
    manifest: int
    epoch: int
    layer: int
    dtype: int
    top_k: int
    rows: int
    hidden: int
    payload_bytes: int
    compute_ns: int


def manifest_id(digest: str) -> int:
    """First 8 bytes of a hexadecimal digest as an unsigned integer, as frames carry it."""
    return int(digest[:16], 16)


def dispatch_bytes(rows: int, hidden: int, top_k: int, item_bytes: int) -> int:
    """Payload of a dispatch: int32 ids and float32 weights per (row, k), then the rows."""
    return rows * (8 * top_k + hidden * item_bytes)


def encode(frame: Frame) -> bytes:
    """Header bytes of `frame`; struct.error if a field is out of its range."""
    return HEADER.pack(MAGIC, PROTOCOL_VERSION, *frame)


def encode_into(buffer: bytearray, *fields: int) -> None:
    """Pack the fields of a `Frame`, in order, into a kept buffer: the hot path's encoder."""
    HEADER.pack_into(buffer, 0, MAGIC, PROTOCOL_VERSION, *fields)


def decode(buffer: bytes | bytearray | memoryview) -> Frame:
    """Parse and check a header's own consistency; ProtocolError names what is wrong."""
    magic, version, *fields = HEADER.unpack_from(buffer)
    if magic != MAGIC:
        raise ProtocolError(
            f"not an expertmesh frame (magic {magic:#06x})", "something else speaks on this data-plane port"
        )
    if version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"data-plane protocol {version}, this process speaks {PROTOCOL_VERSION}",
            "run the same expertmesh version on every node",
        )
    frame = Frame._make(fields)
    if frame.kind not in KINDS:
        raise ProtocolError(f"unknown frame kind {frame.kind}")
    if frame.kind == ERROR:
        if frame.payload_bytes > MAX_ERROR_BYTES:
            raise ProtocolError(
                f"error text of {frame.payload_bytes} bytes, at most {MAX_ERROR_BYTES} allowed"
            )
        return frame
    if frame.kind in (PING, PONG):
        return frame
    dtype = DTYPE_NAMES.get(frame.dtype)
    if dtype is None:
        raise ProtocolError(f"unknown dtype code {frame.dtype}")
    expected = (
        dispatch_bytes(frame.rows, frame.hidden, frame.top_k, ITEM_BYTES[dtype])
        if frame.kind == DISPATCH
        else frame.rows * frame.hidden * ITEM_BYTES[dtype]
    )
    if frame.payload_bytes != expected:
        raise ProtocolError(f"payload of {frame.payload_bytes} bytes announced, the counts say {expected}")
    return frame
