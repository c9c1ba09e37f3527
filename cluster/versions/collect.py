"""Takes out of the store what no version needs that could still serve.

Kept are the versions that an alias points to or pointed to lately, those that run, those that were published lately,
and all blobs of these. A version's parent is not kept for its child's sake: the child names all that it is made of.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from cluster.versions.aliases import Move
from cluster.versions.failpoints import reach
from cluster.versions.manifest import Manifest
from cluster.versions.signing import signature_name
from cluster.versions.store import Store


@dataclass(frozen=True, slots=True)
class Garbage:
    """What may go."""

    manifests: tuple[str, ...] = ()
    blobs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Collected:
    """What went, or would go."""

    manifests: tuple[str, ...]
    blobs: tuple[str, ...]
    unfinished: int
    """Files that publishers which were killed left half written."""
    bytes: int
    kept_manifests: int
    kept_blobs: int


def retained(histories: Iterable[Collection[Move]], running: Collection[str], history: int) -> frozenset[str]:
    """Versions that the last `history` moves of each alias name, with the one that it points to, and what runs."""
    named = {move.manifest for moves in histories for move in list(moves)[-max(1, history) :]}
    return frozenset(named) | frozenset(running)


def kept(
    manifests: Collection[str], retained: Collection[str], is_young: Callable[[str], bool]
) -> frozenset[str]:
    """The manifests of these that stay."""
    return frozenset(digest for digest in manifests if digest in retained or is_young(digest))


def garbage(
    manifests: Collection[str],
    kept: Mapping[str, Manifest],
    blobs: Collection[str],
    is_young: Callable[[str], bool],
) -> Garbage:
    """What is neither kept, nor named by what is kept, nor young: what it is for may just be under way."""
    needed = frozenset[str]().union(*(manifest.blobs for manifest in kept.values()))
    return Garbage(
        tuple(sorted(digest for digest in manifests if digest not in kept)),
        tuple(sorted(digest for digest in blobs if digest not in needed and not is_young(digest))),
    )


def collect(
    store: Store,
    running: Collection[str] = (),
    *,
    history: int,
    min_age_s: float,
    dry_run: bool = False,
    now: float | None = None,
) -> Collected:
    """Take the garbage out of the store; with `dry_run` only say what that is.

    `running`: digests of versions that are in use; `history`: moves of each alias that may be made back; `min_age_s`:
    nothing younger goes. VersionError, and nothing is taken away, if a version that is kept can't be read.
    """
    before = (time.time() if now is None else now) - min_age_s

    def young(modified: Callable[[str], float | None]) -> Callable[[str], bool]:
        # What is gone by now, and what nobody knows the age of, counts as young: it is left alone.
        return lambda digest: (at := modified(digest)) is None or at >= before

    # Blobs first: a version that is published from here on is seen among the manifests, or is young.
    blobs = store.blobs.all()
    histories = [store.aliases.history(alias, history) for alias in store.aliases.names()]
    manifests = store.manifests.all()
    stay = kept(manifests, retained(histories, running, history), young(store.manifests.modified))
    found = garbage(
        manifests,
        {digest: store.manifests.get(digest) for digest in stay},
        blobs,
        young(store.blobs.modified),
    )
    unfinished = store.files.unfinished(before)
    freed = 0
    # Manifests before blobs: killed in between, this leaves blobs without a version, and no version without its blobs.
    for digest in found.manifests:
        if dry_run:
            freed += store.manifests.size(digest) + store.files.size(signature_name(digest))
        else:
            freed += store.files.remove(signature_name(digest)) + store.manifests.remove(digest)
    reach("after-manifests-removed")
    for digest in found.blobs:
        freed += store.blobs.size(digest) if dry_run else store.blobs.remove(digest)
    for name in unfinished:
        freed += store.files.size(name) if dry_run else store.files.remove(name)
    return Collected(
        found.manifests, found.blobs, len(unfinished), freed, len(stay), len(blobs) - len(found.blobs)
    )
