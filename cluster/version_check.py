"""Whether a version may be loaded at all, before any host is asked to."""

from __future__ import annotations

from pathlib import Path

from cluster.errors import VersionConflictError, VersionError
from cluster.promotion import VersionSettings
from cluster.versions.manifest import Manifest
from cluster.versions.store import Store


def checked(store: Store, digest: str, model: str, settings: VersionSettings) -> Manifest:
    """The manifest of a version of this model, all of it there, signed where it must be, that engines have room for.

    VersionError with what is wrong.
    """
    public_key, room = settings.public_key, settings.spare_experts
    manifest = store.manifests.get(digest)
    if manifest.model != model:
        raise VersionError(
            f"version {digest[:12]} of {store.url} is of model {manifest.model[:12]}, this mesh runs {model[:12]}",
            "publish it for this model; each model has a store of its own (versions.store)",
        )
    more = max(map(len, manifest.added.values()), default=0)
    if more > room or (manifest.retired and not room):
        raise VersionConflictError(
            f"version {digest[:12]} "
            + (f"has layers with {more} more experts than the checkpoint's" if more else "retires experts")
            + f", and this mesh was started with versions.spare_experts: {room}",
            f"start it with versions.spare_experts: {max(more, 1)}",
        )
    # What nobody changed needs no signature: it is the checkpoint that the operator started with.
    if public_key and manifest.blobs:
        from cluster.versions.signing import verify_manifest

        verify_manifest(store, digest, Path(public_key))
    missing = store.missing(manifest)
    if missing:
        raise VersionError(
            f"version {digest[:12]} lacks {len(missing)} of its blobs, such as {missing[0][:12]}",
            "publish it again",
        )
    return manifest
