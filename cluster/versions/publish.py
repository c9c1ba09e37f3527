"""A new version from changed tensors: blobs for what is new, and a manifest that names them.

1. the source's headers are read; what the base checkpoint has no place for is refused, before anything is written
2. what equals the base's bytes needs no blob; what equals the parent's has one; the rest is written, blob by blob
3. what the source does not name is the parent's
4. the manifest is written last, so whoever finds it finds its blobs
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from cluster.checkpoint import Checkpoint
from cluster.errors import VersionError
from cluster.versions.expert_blob import check_dense, dense_form, encode_dense, encode_expert, expert_form
from cluster.versions.failpoints import reach
from cluster.versions.growth import ExpertId, Growth, grown, router_form, routers, sizes_of
from cluster.versions.manifest import Manifest
from cluster.versions.source import Source, base_dense, base_expert, open_source
from cluster.versions.spans import OpenFiles, Span
from cluster.versions.store import Store


@dataclass(frozen=True, slots=True)
class Published:
    """A version that is in the store."""

    digest: str
    new_blobs: int = 0
    reused_blobs: int = 0
    """Blobs of the version that were there already."""
    bytes_written: int = 0
    """Of blobs and manifest."""
    changed: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Layer → experts that are not the parent's."""
    changed_dense: tuple[str, ...] = ()
    """Tensors of the engine's that are not the parent's."""


def base_manifest(checkpoint: Checkpoint) -> Manifest:
    """The version that is the checkpoint itself: the same wherever it is made."""
    return Manifest(checkpoint.digest)


def publish_base(store: Store, checkpoint: Checkpoint) -> str:
    """Have the version that is the checkpoint itself in the store; its digest."""
    return store.manifests.put(base_manifest(checkpoint))


def publish(
    store: Store,
    checkpoint: Checkpoint,
    source: Path | None,
    *,
    parent: str = "",
    clones: Sequence[ExpertId] = (),
    retired: Sequence[ExpertId] = (),
    author: str = "",
    reason: str = "",
    metrics: Mapping[str, float] | None = None,
    created: float | None = None,
) -> Published:
    """Make a version of the base `checkpoint` from the `parent` (a digest; "": the base) and what `source` changes.

    `source`: see `cluster.versions.source.open_source`, None for no tensors; `clones`: experts that are to be there
    twice, the copies behind all others of their layer; `created`: seconds since 1970, now if it is not given.

    VersionError if the source can't be a change of the base, if it changes nothing of the parent, if the parent is of
    another model or lacks a blob, or if the store can't be written. The base checkpoint itself, without a parent, is
    what `publish_base` makes.
    """
    before = store.manifests.get(parent) if parent else base_manifest(checkpoint)
    if before.model != checkpoint.digest:
        raise VersionError(
            f"version {parent[:12]} is of another model than {checkpoint.path}",
            "publish with the checkpoint that it was made from",
        )
    sizes = sizes_of(checkpoint, before)
    for layer, _ in clones:
        sizes[layer] = sizes.get(layer, 0) + 1
    found = open_source(source, checkpoint, sizes) if source is not None else Source({}, {}, sizes)
    growth = grown(checkpoint, before, found.sizes, clones, retired)
    _check_added(found, before, growth)
    if parent:
        # From here on neither it nor what it names is garbage, even if no alias points to it.
        store.manifests.renew(parent)
        _check_whole(store, before, f"the parent, version {parent[:12]},")
    reach("before-blobs")
    writer = _Writer(store, before.blobs)
    with OpenFiles() as files:
        experts = _experts(checkpoint, found, before, growth, files, writer)
        dense = _dense(checkpoint, found, before, files, writer)
        dense |= _longer_routers(store, checkpoint, found, before, growth, files, writer)
    if (experts, dense, growth.added, growth.retired) == (
        before.experts,
        before.dense,
        before.added,
        before.retired,
    ):
        if not parent and source is not None and (source / "config.json").exists():
            return Published(publish_base(store, checkpoint))
        whose = f"version {parent[:12]}" if parent else "the base checkpoint"
        raise VersionError(
            f"nothing to publish: all that {source or 'it'} holds is in {whose} already",
            "give what was changed, or another parent",
        )
    manifest = Manifest(
        checkpoint.digest,
        experts,
        dense,
        parent,
        author,
        reason,
        time.time() if created is None else created,
        dict(metrics or {}),
        growth.added,
        growth.retired,
    )
    reach("before-manifest")
    digest = store.manifests.put(manifest)
    reach("after-manifest")
    try:
        _check_whole(store, manifest, f"version {digest[:12]}, just made,")
    except VersionError:
        # Blobs were collected as garbage meanwhile, against all precautions.
        store.manifests.remove(digest)
        raise
    return Published(
        digest,
        writer.new,
        len(manifest.blobs) - writer.new,
        writer.written + len(manifest.to_json()),
        manifest.changed(before),
        tuple(sorted(name for name in {*dense, *before.dense} if dense.get(name) != before.dense.get(name))),
    )


@dataclass
class _Writer:
    """Puts blobs into the store, and counts."""

    store: Store
    known: frozenset[str]
    """Blobs that are surely there."""
    new: int = 0
    written: int = 0
    _done: int = 0

    def keep(self, data: bytes) -> str:
        """Have the blob in the store; its digest."""
        digest = sha256(data).hexdigest()
        if digest not in self.known:
            _, new = self.store.blobs.put(data)
            self.new += new
            self.written += len(data) * new
            self._done += 1
            reach(f"after-blob-{self._done}")
        return digest


def _experts(
    checkpoint: Checkpoint,
    source: Source,
    before: Manifest,
    growth: Growth,
    files: OpenFiles,
    writer: _Writer,
) -> dict[int, dict[int, str]]:
    forms = {layer: expert_form(checkpoint, layer) for layer in checkpoint.layouts}
    merged = {layer: dict(experts) for layer, experts in before.experts.items()}
    for (layer, expert), parts in sorted(source.experts.items()):
        # One that was added is compared with the one beside which it lives.
        beside = growth.added.get(layer, {}).get(expert, expert)
        if _equal(files, parts, base_expert(checkpoint, layer, beside)):
            merged.get(layer, {}).pop(expert, None)
            continue
        data = {part: files.read(span) for part, span in parts.items()}
        merged.setdefault(layer, {})[expert] = writer.keep(encode_expert(forms[layer], data))
    for (layer, expert), origin in growth.copies.items():
        if (layer, expert) not in source.experts and origin in merged.get(layer, {}):
            merged[layer][expert] = merged[layer][origin]
    for layer, gone in growth.retired.items():
        for expert in gone:
            merged.get(layer, {}).pop(expert, None)
    return {layer: experts for layer, experts in merged.items() if experts}


def _check_added(source: Source, before: Manifest, growth: Growth) -> None:
    """VersionError if nobody says what an added expert is."""
    for layer, experts in growth.added.items():
        for expert in experts.keys() - before.added.get(layer, {}).keys():
            if ExpertId(layer, expert) not in growth.copies and (layer, expert) not in source.experts:
                raise VersionError(
                    f"the router of layer {layer} has a row for expert {expert}, which is not there",
                    f"give its tensors as well, or make it a copy of another one: --clone {layer}:EXPERT",
                )


def _longer_routers(
    store: Store,
    checkpoint: Checkpoint,
    source: Source,
    before: Manifest,
    growth: Growth,
    files: OpenFiles,
    writer: _Writer,
) -> dict[str, str]:
    """Blobs of routers of layers with new copies, where the source brings none: with copies of their rows."""
    of_layers = {layer: name for name, layer in routers(checkpoint).items()}
    found = {}
    for layer in sorted({layer for layer, _ in growth.copies}):
        name = of_layers.get(layer)
        if name is None:
            raise VersionError(
                f"the router of layer {layer} is not known, so that it can't get more experts",
                "this architecture is not supported",
            )
        if name in source.dense:
            continue
        form = router_form(checkpoint, name, sizes_of(checkpoint, before)[layer])
        if name in before.dense:
            blob = before.dense[name]
            rows = bytes(check_dense(store.blobs.get(blob), name, form, f"blob {blob[:12]}"))
        else:
            rows = files.read(base_dense(checkpoint, name))
        step = len(rows) // form.shape[0]
        for origin in (origin for (of_layer, _), origin in growth.copies.items() if of_layer == layer):
            rows += rows[origin * step : (origin + 1) * step]
        found[name] = writer.keep(
            encode_dense(name, router_form(checkpoint, name, source.sizes[layer]), rows)
        )
    return found


def _dense(
    checkpoint: Checkpoint, source: Source, before: Manifest, files: OpenFiles, writer: _Writer
) -> dict[str, str]:
    merged, of_routers = dict(before.dense), routers(checkpoint)
    for name, span in sorted(source.dense.items()):
        if files.same(span, base_dense(checkpoint, name)):
            merged.pop(name, None)
            continue
        form = dense_form(checkpoint, name)
        if name in of_routers:
            form = router_form(checkpoint, name, source.sizes[of_routers[name]])
        merged[name] = writer.keep(encode_dense(name, form, files.read(span)))
    return merged


def _equal(files: OpenFiles, mine: Mapping[str, Span], base: Mapping[str, Span]) -> bool:
    return all(files.same(mine[part], base[part]) for part in base)


def _check_whole(store: Store, manifest: Manifest, what: str) -> None:
    if missing := store.missing(manifest):
        which = next(name for name, digest in manifest.named() if digest == missing[0])
        raise VersionError(
            f"{what} lacks {len(missing)} of its blobs in {store.url}: that of {which}, {missing[0][:12]}",
            "publish what is missing again",
        )
