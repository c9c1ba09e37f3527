"""Where configuration values come from: a YAML file, the environment, flags; merged, each with its origin.

Knows nothing of the schema: values are what the sources say, keys are paths: ``("hosts", 0, "count")``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from cluster.errors import ConfigError

FILE_VARIABLE: Final = "EXPERTMESH_CONFIG"
DEFAULT_FILE: Final = "expertmesh.yaml"
_PREFIX: Final = "EXPERTMESH__"

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """Who set a value; ``str()`` gives "flag --port", "file expertmesh.yaml:12", "default" and the like."""

    kind: Literal["default", "file", "environment", "flag"] = "default"
    name: str = ""
    line: int = 0

    def __str__(self) -> str:
        if self.kind == "default":
            return "default"
        return f"{self.kind} {self.name}:{self.line}" if self.line else f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing wrong with the configuration: where, which key, which value (as shown), and the way out."""

    origin: Origin
    key: str
    shown: str | None
    problem: str
    way_out: str

    def __str__(self) -> str:
        value = f" = {self.shown}" if self.shown is not None else ""
        key = f"{self.key}{value}: " if self.key else ""
        return f"{self.origin}: {key}{self.problem}"


@dataclass
class Sources:
    """Values and origins by key path, in the making: each ``add_*`` overrides what was there before."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)

    def origin(self, path: KeyPath) -> Origin:
        """Who set ``path``, or the nearest thing above it, or something in it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.origins:
                return self.origins[path[:end]]
        return next((o for known, o in self.origins.items() if known[: len(path)] == path), Origin())

    def value_origin(self, path: KeyPath) -> Origin:
        """Who set the value at ``path``; the default did if no source mentions it."""
        node: Any = self.tree
        for part in path:
            present = part < len(node) if isinstance(node, list) and isinstance(part, int) else False
            if not present and not (isinstance(node, dict) and part in node):
                return Origin()
            node = node[part]
        return self.origin(path)

    def add_file(self, file: Path) -> None:
        """Read a YAML file; ConfigError if it is unreadable or no YAML, for then nothing else can be said."""
        try:
            loader = yaml.SafeLoader(file.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.reader.ReaderError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"the configuration file {file} cannot be read: {reason}",
                f"give a readable YAML file with --config or {FILE_VARIABLE}",
            ) from error
        try:
            node = loader.get_single_node()
            if node is None:
                return
            tree = _Reader(loader, str(file), self).value(node, ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f":{mark.line + 1}" if mark else ""
            raise ConfigError(
                f"{file}{line}: not valid YAML: {error.problem or error.context}",
                "check the indentation, and put values with special characters in quotes",
            ) from error
        finally:
            loader.dispose()
        if not isinstance(tree, dict):
            raise ConfigError(
                f"{file}:1: not a mapping of keys to values", "begin with a key such as `server:`"
            )
        self.tree = tree

    def add_environment(self, environ: Mapping[str, str]) -> None:
        """Take every ``EXPERTMESH__SECTION__KEY``; an empty variable counts as unset."""
        # Shorter names first: EXPERTMESH__HOSTS must be there before EXPERTMESH__HOSTS__0__COUNT changes it.
        for name in sorted((n for n in environ if n.startswith(_PREFIX)), key=lambda n: (n.count("__"), n)):
            if not environ[name].strip():
                continue
            path = _parse_path(name.removeprefix(_PREFIX).lower().split("__"))
            origin = Origin("environment", name)
            try:
                value = _parse_variable(environ[name], free_form="options" in path)
            except yaml.YAMLError:
                self.mistakes.append(
                    Mistake(
                        origin, dotted(path), None, "not valid YAML", "write it as [a, b] or {key: value}"
                    )
                )
                continue
            self._set(path, value, origin)

    def add_flags(self, flags: Mapping[str, object], flag_names: Mapping[str, str]) -> None:
        """Take flags by dotted key; ``None`` means not given."""
        for key, value in flags.items():
            if value is not None:
                leaf = key.rsplit(".", 1)[-1].replace("_", "-")
                self._set(
                    _parse_path(key.split(".")), value, Origin("flag", flag_names.get(key, f"--{leaf}"))
                )

    def _set(self, path: KeyPath, value: object, origin: Origin) -> None:
        if isinstance(value, Mapping) and value:
            for key, item in value.items():
                self._set((*path, str(key)), item, origin)
            return
        node: Any = self.tree
        for depth, part in enumerate(path):
            if not isinstance(part, int) or not isinstance(node, list):
                part = str(part)
            path = (*path[:depth], part, *path[depth + 1 :])
            if problem := _cannot_enter(node, part, path[:depth]):
                self.mistakes.append(Mistake(origin, dotted(path), None, *problem))
                return
            last = depth == len(path) - 1
            fresh: Any = value if last else [] if isinstance(path[depth + 1], int) else {}
            if isinstance(node, list) and part == len(node):
                node.append(fresh)
            elif last or (isinstance(node, dict) and node.get(part) is None):
                node[part] = fresh
            node = node[part]
        for old in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[old]
        self.origins[path] = origin


class _Reader:
    """Turns YAML nodes into values and notes each key's line, which PyYAML's own constructors forget."""

    def __init__(self, loader: yaml.SafeLoader, file: str, sources: Sources) -> None:
        self._loader, self._file, self._sources = loader, file, sources
        self._open: set[int] = set()

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return self._loader.construct_object(node)
        if id(node) in self._open:
            raise yaml.MarkedYAMLError(problem="an alias contains itself", problem_mark=node.start_mark)
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return dict(self._entries(node, path))
            return [self._noted(item, item, (*path, index)) for index, item in enumerate(node.value)]
        finally:
            self._open.remove(id(node))

    def _entries(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[str, Any]]:
        self._check_duplicates(node, path)
        self._loader.flatten_mapping(node)
        for key_node, value_node in node.value:
            key = str(key_node.value)
            yield key, self._noted(key_node, value_node, (*path, key))

    def _noted(self, marked: yaml.Node, node: yaml.Node, path: KeyPath) -> Any:
        self._sources.origins[path] = Origin("file", self._file, marked.start_mark.line + 1)
        return self.value(node, path)

    def _check_duplicates(self, node: yaml.MappingNode, path: KeyPath) -> None:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in lines:
                origin = Origin("file", self._file, line)
                problem = f"given twice, first in line {lines[key]}"
                self._sources.mistakes.append(
                    Mistake(origin, dotted((*path, key)), None, problem, "keep one of the two")
                )
            lines.setdefault(key, line)


def _cannot_enter(node: object, part: str | int, above: KeyPath) -> tuple[str, str] | None:
    """Problem and way out if ``node``, reached by ``above``, cannot have an entry ``part``."""
    if isinstance(node, list) and isinstance(part, int):
        if part <= len(node):
            return None
        return f"there is no entry {part}", f"the next one is {dotted((*above, len(node)))}"
    if isinstance(node, dict):
        return None
    if isinstance(node, list):
        return f"{dotted(above)} is a list", f"name an entry: {dotted((*above, 0, part))}"
    return f"{dotted(above)} is a single value, not a mapping", f"correct or remove {dotted(above)}"


def dotted(path: Sequence[str | int]) -> str:
    """``("hosts", 0, "count")`` as ``hosts.0.count``."""
    return ".".join(map(str, path))


def find_file(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The configuration file to read: the given one, else the environment's, else the folder's, else none."""
    if path is not None:
        return path
    if named := environ.get(FILE_VARIABLE):
        return Path(named)
    return Path(DEFAULT_FILE) if Path(DEFAULT_FILE).exists() else None


def _parse_path(parts: Sequence[str]) -> KeyPath:
    return tuple(int(part) if part.isdecimal() else part for part in parts)


def _parse_variable(text: str, *, free_form: bool) -> object:
    # Plain scalars stay text for the schema to read: YAML would make a number of a name like 0123.
    # Extra engine options have no schema, so there YAML decides.
    stripped = text.strip()
    if free_form or stripped.startswith(("[", "{")):
        return yaml.safe_load(stripped)
    return None if stripped in ("null", "~") else stripped
