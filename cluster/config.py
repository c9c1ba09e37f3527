"""The configuration: one frozen model of everything an operator may set. Imports neither torch nor Ray.

Read with :func:`load_config`; `docs/configuration.md` describes every key.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PlainValidator,
    SecretStr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from cluster.config_mistakes import raise_mistakes, schema_mistakes
from cluster.config_sources import KeyPath, Mistake, Origin, Sources, dotted, find_file

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
    """Bytes of ``"4GiB"``, ``"500MB"`` or a plain number; ValueError if it is no size above zero."""
    try:
        size = _BYTES.validate_python(value)
    except ValidationError:
        size = ByteSize(0)
    if size <= 0 or isinstance(value, bool):
        raise ValueError('should be a size above zero, such as "4GiB" or "500MiB"')
    return size


def parse_duration(value: object) -> float:
    """Seconds of ``"30s"``, ``"500ms"``, ``"20us"``, ``"5m"``, ``"1h"`` or a plain number of seconds."""
    match = _DURATION.fullmatch(str(value).strip())
    if match is None:
        raise ValueError('should be a duration, such as "30s" or "500ms"')
    return float(match[1]) * _SECONDS[match[2]]


def _positive_duration(value: object) -> float:
    seconds = parse_duration(value)
    if seconds <= 0:
        raise ValueError('should be a duration above zero, such as "30s"')
    return seconds


def _auto_size(value: object) -> ByteSize | Literal["auto"]:
    return "auto" if value == "auto" else parse_size(value)


def _auto_count(value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not str(value).isdecimal() or int(str(value)) < 1:
        raise ValueError('should be "auto" or a whole number of at least 1')
    return int(str(value))


def _no_bool(value: object) -> object:
    # pydantic would read `true` as 1.
    if isinstance(value, bool):
        raise ValueError("should be a whole number")
    return value


def _group_name(value: str) -> str:
    if not _GROUP_NAME.fullmatch(value):
        raise ValueError("should be at most 42 lower-case letters, digits and inner hyphens")
    return value


def _ray_address(value: str) -> str:
    if value not in ("local", "auto") and not re.fullmatch(r"[\w.:\[\]-]+:\d{1,5}", value):
        raise ValueError('should be "local", "auto" or "ip:port" of the head node, such as "10.0.0.1:6379"')
    return value


def _engine_options(value: dict[str, Any]) -> dict[str, Any]:
    for key in value:
        if own := _OWN_KEYS.get(key.replace("-", "_")):
            raise ValueError(f"{key} has a key of its own: set {own} instead")
    return value


Size = Annotated[ByteSize, PlainValidator(parse_size)]
AutoSize = Annotated[ByteSize | Literal["auto"], PlainValidator(_auto_size)]
AutoCount = Annotated[int | Literal["auto"], PlainValidator(_auto_count)]
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
Duration = Annotated[float, PlainValidator(_positive_duration)]
"""In seconds."""
Name = Annotated[str, Field(min_length=1)]


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: where it leads is not ours to guess


def _resolve_key(item: object, environ: Mapping[str, str]) -> list[SecretStr]:
    """The keys that one entry of ``api_keys`` stands for: itself, ``env:NAME``'s, or one per line of ``file:PATH``."""
    text = item.get_secret_value() if isinstance(item, SecretStr) else item
    if not isinstance(text, str):
        raise ValueError("should be a list of texts; put a key of digits in quotes")
    found = [text]
    if text.startswith("env:"):
        found = [environ.get(text.removeprefix("env:"), "")]
    elif text.startswith("file:"):
        try:
            found = Path(text.removeprefix("file:")).expanduser().read_text("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{text} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    keys = [SecretStr(key.strip()) for key in found if key.strip()]
    if not keys:
        raise ValueError(
            f"{text} is unset or empty" if text.startswith(("env:", "file:")) else "an API key is empty"
        )
    return keys


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)


class ModelConfig(_Section):
    """Which checkpoint to serve, under which name, in which precision."""

    path: Name = "default"
    name: Name | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class EngineConfig(_Section):
    """The vLLM engine: everything but the routed experts. ``options`` go to vLLM as they are."""

    replicas: Count = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: AutoCount = "auto"
    max_model_len: Count | None = None
    max_num_seqs: Count = 64
    max_num_batched_tokens: Count | None = None
    kv_cache: Size = parse_size("1GiB")
    enforce_eager: bool = False
    options: Annotated[dict[str, Any], AfterValidator(_engine_options)] = {}


class HostGroup(_Section):
    """Expert hosts of one kind; ``selector`` limits the nodes they may run on."""

    name: Annotated[str, AfterValidator(_group_name)] = "local"
    count: Count = 1
    device: Literal["cpu", "cuda"] = "cpu"
    memory: AutoSize = "auto"
    threads: AutoCount = "auto"
    selector: dict[str, str] = {}
    kernel: Name = "auto"


class ServerConfig(_Section):
    """The HTTP endpoint and its admission."""

    host: Name = "127.0.0.1"
    port: Annotated[int, BeforeValidator(_no_bool), Field(ge=0, le=65535)] = 8000
    api_keys: tuple[SecretStr, ...] = ()
    max_queue: Count = 512
    request_timeout: Duration = 600.0

    @field_validator("api_keys", mode="before")
    @classmethod
    def _read_keys(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list | tuple):
            return value
        environ = (info.context or {}).get("environ", os.environ)
        return tuple(key for item in value for key in _resolve_key(item, environ))

    @field_validator("api_keys")
    @classmethod
    def _guard_network(cls, keys: tuple[SecretStr, ...], info: ValidationInfo) -> tuple[SecretStr, ...]:
        host = info.data.get("host")
        if host is not None and not keys and not _is_loopback(host):
            raise ValueError(
                f"server.host {host} is reachable from other machines, which needs an API key: "
                "set server.api_keys, for example [env:EXPERTMESH_API_KEY], or server.host to 127.0.0.1"
            )
        return keys


class RayConfig(_Section):
    """Which Ray cluster to join, or ``local`` for one of this process's own."""

    address: Annotated[str, AfterValidator(_ray_address)] = "local"
    token_path: Name | None = None
    namespace: Name = "expertmesh"


class DataPlaneConfig(_Section):
    """How activations travel between the engine and the hosts. Durations in seconds."""

    deadline: Duration = 30.0
    connect_timeout: Duration = 60.0
    tcp: Literal["auto", "always", "never"] = "auto"
    poll: Annotated[float, PlainValidator(parse_duration)] = 0.0


class PlacementConfig(_Section):
    """Which expert goes to which host."""

    strategy: Literal["balanced"] = "balanced"
    replicas: Count = 1
    spread: Literal["node", "host"] = "node"


class Config(_Section):
    """Everything an operator may set, from one YAML file, the environment and flags."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    hosts: Annotated[tuple[HostGroup, ...], Field(min_length=1)] = (HostGroup(),)
    server: ServerConfig = ServerConfig()
    ray: RayConfig = RayConfig()
    data_plane: DataPlaneConfig = DataPlaneConfig()
    placement: PlacementConfig = PlacementConfig()
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("placement")
    @classmethod
    def _enough_hosts(cls, placement: PlacementConfig, info: ValidationInfo) -> PlacementConfig:
        count = sum(group.count for group in info.data.get("hosts", ()))
        if count and placement.replicas > count:
            raise ValueError(
                f"replicas: {placement.replicas} copies of each expert need as many hosts, hosts has {count}: "
                "raise a group's count or lower placement.replicas"
            )
        return placement


def leaves(section: BaseModel, above: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every single value with its key path, in the order of the schema; an empty mapping counts as a value."""
    for name in type(section).model_fields:
        yield from _leaves(getattr(section, name), (*above, name))


def _leaves(value: object, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, BaseModel):
        yield from leaves(value, path)
    elif isinstance(value, dict) and value:
        for key, item in value.items():
            yield (*path, key), item
    elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and where each of its values came from."""

    config: Config
    origins: Mapping[str, Origin]
    """By dotted key, for every single value (a list of plain values counts as one)."""
    file: Path | None
    """The file that was read, if any."""


def load_config(
    path: Path | None,
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    flag_names: Mapping[str, str] | None = None,
) -> LoadedConfig:
    """Merge flags over environment over file over defaults.

    ``path`` is ``--config``'s; without it EXPERTMESH_CONFIG's file is read, else ./expertmesh.yaml if it exists.
    ``flags`` has dotted keys (``server.port``); ``None`` means not given. ``flag_names`` gives a flag's name
    where it isn't the key's last part (``{"hosts.0.count": "--hosts"}``).

    Raises ConfigError with every mistake of all sources.
    """
    sources = Sources()
    file = find_file(path, environ)
    if file is not None:
        sources.add_file(file)
    sources.add_environment(environ)
    sources.add_flags(flags, flag_names or {})
    # `server:` with all its keys commented out is no mistake.
    tree = {key: value for key, value in sources.tree.items() if value is not None}
    mistakes = [*sources.mistakes, *_duplicate_groups(tree, sources)]
    try:
        config = Config.model_validate(tree, context={"environ": environ})
    except ValidationError as error:
        raise_mistakes([*schema_mistakes(Config, error, sources), *mistakes])
    if mistakes:
        raise_mistakes(mistakes)
    origins = {dotted(leaf): sources.origin(leaf) for leaf, _ in leaves(config)}
    return LoadedConfig(config, origins, file)


def _duplicate_groups(tree: Mapping[str, Any], sources: Sources) -> list[Mistake]:
    """Groups whose name an earlier one has. On raw values, to be reported beside mistakes inside the groups."""
    groups = tree.get("hosts")
    default = HostGroup.model_fields["name"].default
    first: dict[object, int] = {}
    mistakes = []
    for index, group in enumerate(groups if isinstance(groups, list) else ()):
        if not isinstance(group, dict):
            continue
        name = str(group.get("name", default))
        path: KeyPath = ("hosts", index, "name")
        if name in first:
            problem = f"hosts.{first[name]} has this name too"
            origin = sources.origin(path)
            mistakes.append(
                Mistake(origin, dotted(path), repr(name), problem, "give each group its own name")
            )
        first.setdefault(name, index)
    return mistakes
