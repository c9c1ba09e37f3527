"""A few tensors as safetensors: the same bytes for the same tensors on any machine, without torch.

8 bytes of length, little-endian, that many of JSON, and the data, with no gap between tensors. Those with larger items
lie first, and by name among equals, so that each begins at a multiple of its item's size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final, NamedTuple

from cluster.errors import VersionError

ITEM_BYTES: Final[Mapping[str, int]] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
# Names, dtypes and shapes of some tensors; a longer one is none of ours.
_MOST_HEADER_BYTES: Final = 1 << 16
_METADATA: Final = "__metadata__"
_WAY_OUT: Final = "publish the version again that it is of"


class TensorForm(NamedTuple):
    """What a tensor is like, but for its numbers."""

    dtype: str
    """As safetensors writes it, such as ``BF16``."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Tensors:
    """What some safetensors bytes hold; the data are views of them."""

    forms: Mapping[str, TensorForm]
    data: Mapping[str, memoryview]
    metadata: Mapping[str, str]


def encode(forms: Mapping[str, TensorForm], data: Mapping[str, bytes], metadata: Mapping[str, str]) -> bytes:
    """Safetensors of these tensors, each with its data as `forms` says. ValueError if that has another size."""
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    order, end = sorted(forms, key=lambda name: (-ITEM_BYTES[forms[name].dtype], name)), 0
    for name in order:
        form = forms[name]
        if len(data[name]) != form.size:
            raise ValueError(f"{name}: {len(data[name])} bytes where {form} has {form.size}")
        header[name] = {
            "dtype": form.dtype,
            "shape": list(form.shape),
            "data_offsets": [end, end := end + form.size],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(data[name] for name in order)])


def decode(data: bytes, what: str) -> Tensors:
    """What these bytes hold; `what` names them in errors. VersionError if they are torn, or no safetensors."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > _MOST_HEADER_BYTES:
        raise VersionError(f"{what} is no safetensors file", _WAY_OUT)
    base = 8 + length
    if base > len(data):
        raise VersionError(f"{what} is torn: {len(data)} bytes, its header alone ends at {base}", _WAY_OUT)
    try:
        header = json.loads(data[8:base])
        metadata = {str(key): str(value) for key, value in header.pop(_METADATA, {}).items()}
        forms = {str(name): _form(info) for name, info in header.items()}
        places = {str(name): _whole(info["data_offsets"]) for name, info in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise VersionError(f"{what}: its header makes no sense: {error!r}", _WAY_OUT) from error
    end = 0
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        if place != (end, end + forms[name].size):
            raise VersionError(
                f"{what}: {name} should be bytes {end} to {end + forms[name].size}, its header says {place}",
                _WAY_OUT,
            )
        end += forms[name].size
    if base + end != len(data):
        raise VersionError(f"{what} is torn: {len(data)} bytes, its header says {base + end}", _WAY_OUT)
    view = memoryview(data)[base:]
    return Tensors(forms, {name: view[place[0] : place[1]] for name, place in places.items()}, metadata)


def check(found: Tensors, forms: Mapping[str, TensorForm], what: str) -> None:
    """VersionError, with what is wrong, if the tensors are not just those that are expected."""
    if found.forms.keys() != forms.keys():
        raise VersionError(
            f"{what} holds {_list(found.forms)}, the base checkpoint has {_list(forms)} there", _WAY_OUT
        )
    for name, form in forms.items():
        if found.forms[name] != form:
            raise VersionError(
                f"{what}: {name} is {found.forms[name]}, in the base checkpoint it is {form}", _WAY_OUT
            )


def _form(info: Mapping[str, Any]) -> TensorForm:
    form = TensorForm(str(info["dtype"]), _whole(info["shape"]))
    if form.dtype not in ITEM_BYTES:
        raise ValueError(f"dtype {form.dtype} is not known")
    return form


def _whole(numbers: Any) -> tuple[int, ...]:
    # JSON has fractions and infinities too.
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{numbers} are not whole numbers")
    return tuple(numbers)


def _list(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names)) or "nothing"
