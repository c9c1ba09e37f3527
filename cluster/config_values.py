"""The kinds of values a configuration has (sizes, durations, counts, keys), and how each is read."""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PlainValidator,
    SecretStr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)

from cluster.config_mistakes import BadValue

# How every section of the configuration is read.
SECTION: Final = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)

_BYTES: Final = TypeAdapter(ByteSize)
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(us|ms|s|m|h)?")
_SECONDS: Final[Mapping[str | None, float]] = {"us": 1e-6, "ms": 1e-3, "s": 1, None: 1, "m": 60, "h": 3600}
# Group names become part of host ids, metric labels and Kubernetes names.
_GROUP_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,40}[a-z0-9])?")
# vLLM arguments with a key of their own here: given twice, one of the two would silently lose.
_OWN_KEYS: Final[Mapping[str, str]] = {
    "model": "model.path",
    "served_model_name": "model.name",
    "dtype": "model.dtype",
    "device": "engine.device",
    "max_model_len": "engine.max_model_len",
    "max_num_seqs": "engine.max_num_seqs",
    "max_num_batched_tokens": "engine.max_num_batched_tokens",
    "kv_cache_memory_bytes": "engine.kv_cache",
    "enforce_eager": "engine.enforce_eager",
}


def parse_size(value: object) -> ByteSize:
    """Bytes of ``"4GiB"``, ``"500MB"`` or a plain number; BadValue if it is no size above zero."""
    try:
        size = _BYTES.validate_python(value)
    except ValidationError:
        size = ByteSize(0)
    if size <= 0 or isinstance(value, bool):
        raise BadValue('should be a size above zero, such as "4GiB" or "500MiB"')
    return size


def parse_duration(value: object) -> float:
    """Seconds of ``"30s"``, ``"500ms"``, ``"20us"``, ``"5m"``, ``"1h"`` or a plain number of seconds."""
    match = _DURATION.fullmatch(str(value).strip())
    if match is None:
        raise BadValue('should be a duration, such as "30s" or "500ms"')
    return float(match[1]) * _SECONDS[match[2]]


def _positive_duration(value: object) -> float:
    seconds = parse_duration(value)
    if seconds <= 0:
        raise BadValue('should be a duration above zero, such as "30s"')
    return seconds


def _auto_size(value: object) -> ByteSize | Literal["auto"]:
    return "auto" if value == "auto" else parse_size(value)


def _auto_count(value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not str(value).isdecimal() or int(str(value)) < 1:
        raise BadValue('should be "auto" or a whole number of at least 1')
    return int(str(value))


def _host_count(value: object) -> int | Literal["per_node"]:
    if value == "per_node":
        return "per_node"
    if isinstance(value, bool) or not str(value).isdecimal() or int(str(value)) < 1:
        raise BadValue('should be "per_node" or a whole number of at least 1')
    return int(str(value))


def _share(value: object) -> Decimal:
    share = _decimal(value)
    if not (share.is_finite() and 0 < share <= 1):
        raise BadValue("should be a share above 0 and at most 1, such as 0.25")
    return share


def _gpu_share(value: object) -> Decimal:
    share = _decimal(value)
    # Ray counts in ten thousandths, and refuses what is finer only when an actor is made.
    if not (share.is_finite() and 0 < share <= 1 and share == round(share, 4)):
        raise BadValue(
            "should be a share of one GPU above 0 and at most 1, with at most 4 decimals, such as 0.4"
        )
    return share.normalize()


def _number(value: object, allowed: Callable[[float], bool], problem: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(str(value))
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and allowed(number)):
        raise BadValue(problem)
    return number


def _positive(value: object) -> float:
    return _number(value, lambda number: number > 0, "should be a number above zero, such as 1.25")


def _non_negative(value: object) -> float:
    return _number(value, lambda number: number >= 0, "should be a number of at least zero, such as 1.5")


def _fraction(value: object) -> float:
    return _number(value, lambda number: 0 <= number < 1, "should be at least 0 and below 1, such as 0.01")


def positive_number(value: object) -> Decimal:
    """The decimal that was written; BadValue if it is no number above zero."""
    number = _decimal(value)
    if not (number.is_finite() and number > 0):
        raise BadValue("should be a number above 0, such as 0.5")
    return number


def _decimal(value: object) -> Decimal:
    # The decimal that was written: a tenth of 30 experts is 3 of them, where the float's is 3.0000000000000004.
    try:
        return Decimal(str(value))
    except InvalidOperation:
        return Decimal(0)


def _no_bool(value: object) -> object:
    # pydantic would read `true` as 1.
    if isinstance(value, bool):
        raise BadValue("should be a whole number")
    return value


def _group_name(value: str) -> str:
    if not _GROUP_NAME.fullmatch(value):
        raise BadValue("should be at most 42 lower-case letters, digits and inner hyphens")
    return value


def _ray_address(value: str) -> str:
    if value not in ("local", "auto") and not re.fullmatch(r"[\w.:\[\]-]+:\d{1,5}", value):
        raise BadValue('should be "local", "auto" or "ip:port" of the head node, such as "10.0.0.1:6379"')
    return value


def _engine_options(value: dict[str, Any]) -> dict[str, Any]:
    for key in value:
        if own := _OWN_KEYS.get(key.replace("-", "_")):
            raise BadValue(f"{key} has a key of its own", f"set {own} instead")
    return value


def is_loopback(host: str) -> bool:
    """Whether a server bound to ``host`` is reachable from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: where it leads is not ours to guess


def resolve_key(item: object, environ: Mapping[str, str]) -> list[SecretStr]:
    """The keys that one entry of ``api_keys`` stands for.

    That is the entry itself, or the value of ``env:NAME``, or every line of ``file:PATH``. BadValue if it
    is no text, cannot be read, or is empty.
    """
    text = item.get_secret_value() if isinstance(item, SecretStr) else item
    if not isinstance(text, str):
        raise BadValue("should be a list of texts", "put a key of digits in quotes")
    found = [text]
    if text.startswith("env:"):
        found = [environ.get(text.removeprefix("env:"), "")]
    elif text.startswith("file:"):
        try:
            found = Path(text.removeprefix("file:")).expanduser().read_text("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BadValue(f"{text} cannot be read: {reason}", "one key a line is expected there") from error
    keys = [SecretStr(key.strip()) for key in found if key.strip()]
    if not keys:
        named = text.startswith(("env:", "file:"))
        raise BadValue(
            f"{text} is unset or empty" if named else "an API key is empty", "give a long random text"
        )
    return keys


def _api_keys(value: object, info: ValidationInfo) -> object:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    environ = (info.context or {}).get("environ", os.environ)
    return tuple(key for item in value for key in resolve_key(item, environ))


Size = Annotated[ByteSize, PlainValidator(parse_size)]
AutoSize = Annotated[ByteSize | Literal["auto"], PlainValidator(_auto_size)]
AutoCount = Annotated[int | Literal["auto"], PlainValidator(_auto_count)]
HostCount = Annotated[int | Literal["per_node"], PlainValidator(_host_count)]
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
LayerIndex = Annotated[int, Field(ge=0)]
ExpertIndex = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
Share = Annotated[Decimal, BeforeValidator(_share)]
GpuShare = Annotated[Decimal, BeforeValidator(_gpu_share)]
Positive = Annotated[float, PlainValidator(_positive)]
NonNegative = Annotated[float, PlainValidator(_non_negative)]
Fraction = Annotated[float, PlainValidator(_fraction)]
Port = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=65535)]
Duration = Annotated[float, PlainValidator(_positive_duration)]
Name = Annotated[str, Field(min_length=1)]
GroupName = Annotated[str, AfterValidator(_group_name)]
ApiKeys = Annotated[tuple[SecretStr, ...], BeforeValidator(_api_keys)]
RayAddress = Annotated[str, AfterValidator(_ray_address)]
EngineOptions = Annotated[dict[str, Any], AfterValidator(_engine_options)]
