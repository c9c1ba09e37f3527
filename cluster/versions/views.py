"""What is told of versions: plain data that becomes JSON, the same for the command line and over HTTP."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, Final

from cluster.errors import VersionError
from cluster.versions.manifest import Manifest
from cluster.versions.signing import is_signed, verify_manifest
from cluster.versions.store import Store

SHOWN: Final = 12
"""Hexadecimal digits of a digest that people are shown."""


def listing(store: Store) -> dict[str, Any]:
    """All versions, the latest first, and all aliases with what they point to."""
    moves = {name: store.aliases.current(name) for name in store.aliases.names()}
    aliases = {name: move.manifest for name, move in moves.items() if move is not None}
    named = defaultdict(list)
    for alias, digest in aliases.items():
        named[digest].append(alias)
    versions = [
        {"digest": digest, "aliases": named[digest], **_entry(store, digest)}
        for digest in store.manifests.all()
    ]
    versions.sort(key=lambda version: (-version["created"], version["digest"]))
    return {"store": store.url, "aliases": aliases, "versions": versions}


def about(store: Store, digest: str, public_key: Path | None) -> dict[str, Any]:
    """One version; `signature` is "none", "unchecked", "good", or what is wrong with it."""
    manifest = store.manifests.get(digest)
    signature = "unchecked" if is_signed(store, digest) else "none"
    if public_key is not None and signature != "none":
        try:
            verify_manifest(store, digest, public_key)
            signature = "good"
        except VersionError as error:
            signature = error.message
    return {
        "digest": digest,
        "store": store.url,
        "model": manifest.model,
        **_head(manifest),
        "layers": {
            layer: dict(sorted(experts.items())) for layer, experts in sorted(manifest.experts.items())
        },
        "tensors": dict(sorted(manifest.dense.items())),
        "added": {layer: dict(experts) for layer, experts in sorted(manifest.added.items())},
        "retired": {layer: list(experts) for layer, experts in sorted(manifest.retired.items())},
        "missing": list(store.missing(manifest)),
        "signature": signature,
    }


def difference(store: Store, digest: str, other: str | None) -> dict[str, Any]:
    """Layer → experts, and tensors, that one version has otherwise than another, which is its parent if not given."""
    mine = store.manifests.get(digest)
    against = mine.parent if other is None else other
    theirs = store.manifests.get(against) if against else Manifest(mine.model)
    if mine.model != theirs.model:
        raise VersionError(
            f"{digest[:SHOWN]} and {against[:SHOWN]} are versions of two models", "compare two of one model"
        )
    names = {*mine.dense, *theirs.dense}
    return {
        "version": digest,
        "against": against,
        "layers": {layer: list(experts) for layer, experts in mine.changed(theirs).items()},
        "tensors": sorted(name for name in names if mine.dense.get(name) != theirs.dense.get(name)),
        "metrics": {
            name: [theirs.metrics.get(name), mine.metrics.get(name)]
            for name in sorted({*mine.metrics, *theirs.metrics})
        },
    }


def _entry(store: Store, digest: str) -> dict[str, Any]:
    try:
        return {**_head(store.manifests.get(digest)), "error": ""}
    except VersionError as error:
        # The list is where an operator looks for another one.
        return {**_head(Manifest("")), "error": error.message}


def _head(manifest: Manifest) -> dict[str, Any]:
    return {
        "parent": manifest.parent,
        "created": manifest.created,
        "author": manifest.author,
        "reason": manifest.reason,
        "metrics": dict(manifest.metrics),
        "experts": sum(map(len, manifest.experts.values())),
        "dense": len(manifest.dense),
    }
