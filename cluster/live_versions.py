"""The versions that a mesh can compute with at the same time, and the numbers by which their experts go.

The base checkpoint's experts go by their own numbers. An expert that a version has of its own gets the next number
behind those of its layer: hosts hold numbers, and the data plane asks for numbers, so that rows of several versions
travel in one message, and what two versions share exists once. Where an expert is placed does not depend on its
version: all that live of it are on the same hosts.

A number is never given to another content, so that an engine that is behind gets an error, and never sums of a
version that it did not ask for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Final

from cluster.errors import VersionError
from cluster.holdings import Holdings

HEADER: Final = "x-expertmesh-manifest"
"""Names the version of the model in every answer over HTTP."""

Differs = Mapping[int, Mapping[int, int]]
"""Layer index → expert → its number, of experts that are not the base checkpoint's."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One content of an expert that is not the base checkpoint's."""

    expert: int
    blob: str
    """Digest, see `cluster.versions.blobs`."""


Variants = Mapping[int, Mapping[int, Variant]]
"""Layer index → number → what it is."""


@dataclass(frozen=True, slots=True)
class LiveVersions:
    """Which versions engines may ask for, and which of them new requests get."""

    serving: str = ""
    """Digest of the manifest that new requests get."""
    live: Mapping[str, Differs] = field(default_factory=dict)
    """By manifest; hosts hold all that these name."""
    dense: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Manifest → tensor of the engine's → blob, of those that are not the base checkpoint's."""
    variants: Mapping[int, tuple[Variant, ...]] = field(default_factory=dict)
    """Layer index → all that ever had a number, in the order of their numbers."""
    continued: Mapping[str, str] = field(default_factory=dict)
    """Manifest → the one that its running requests go on with."""
    candidate: str = ""
    """Manifest that some new requests get in its place; "" for none."""
    share: float = 0.0
    """Of new requests that get the candidate."""

    @property
    def plain(self) -> bool:
        """Whether the base checkpoint's experts are all that is asked for."""
        return not any(any(differs.values()) for differs in self.live.values())


def with_version(
    versions: LiveVersions,
    manifest: str,
    experts: Mapping[int, Mapping[int, str]],
    sizes: Mapping[int, int],
    dense: Mapping[str, str] | None = None,
) -> LiveVersions:
    """With one more version; `experts` are the blobs of those that it has of its own, `sizes` the layers' experts,
    `dense` the blobs of the engine's tensors that it has of its own.

    VersionError for a layer or an expert that the model does not have.
    """
    variants = dict(versions.variants)
    differs: dict[int, dict[int, int]] = {}
    for layer, named in experts.items():
        for expert, blob in named.items():
            if not 0 <= expert < sizes.get(layer, 0):
                raise VersionError(
                    f"version {manifest[:12]} has an expert {expert} in layer {layer}, which the model does not have",
                    "publish it for this model",
                )
            known, variant = variants.get(layer, ()), Variant(expert, blob)
            if variant not in known:
                known = variants[layer] = (*known, variant)
            differs.setdefault(layer, {})[expert] = sizes[layer] + known.index(variant)
    return replace(
        versions,
        live={**versions.live, manifest: differs},
        variants=variants,
        dense={**versions.dense, manifest: dense} if dense else versions.dense,
    )


def without_version(versions: LiveVersions, manifest: str) -> LiveVersions:
    """Without a version that new requests don't get."""
    assert manifest not in (versions.serving, versions.candidate)
    live = {name: differs for name, differs in versions.live.items() if name != manifest}
    dense = {name: named for name, named in versions.dense.items() if name != manifest}
    continued = {name: other for name, other in versions.continued.items() if name != manifest}
    return replace(versions, live=live, dense=dense, continued=continued)


def serving(versions: LiveVersions, manifest: str, *, continue_running: bool = False) -> LiveVersions:
    """All new requests get another of the live versions; those that run as well, with `continue_running`."""
    assert manifest in versions.live
    continued = {name: other for name, other in versions.continued.items() if name != manifest}
    if continue_running:
        continued = {name: manifest for name in versions.live if name != manifest}
    return replace(versions, serving=manifest, continued=continued, candidate="", share=0.0)


def with_candidate(versions: LiveVersions, manifest: str, share: float) -> LiveVersions:
    """A share of new requests gets another of the live versions; with none of them, none does."""
    assert manifest in versions.live
    return replace(versions, candidate=manifest if share else "", share=share)


def same_but_choice(one: LiveVersions, other: LiveVersions) -> bool:
    """Whether they differ at most in what new requests get."""
    return one == replace(
        other, serving=one.serving, candidate=one.candidate, share=one.share, continued=one.continued
    )


def chosen(versions: LiveVersions, who: str) -> str:
    """The manifest that a request of somebody gets: the same for all of theirs, and kept when the share grows."""
    if not versions.candidate:
        return versions.serving
    lot = int.from_bytes(sha256(f"{versions.candidate}:{who}".encode()).digest()[:8], "big") / 2**64
    return versions.candidate if lot < versions.share else versions.serving


def live_numbers(versions: LiveVersions, layer: int, expert: int) -> list[int]:
    """All numbers of an expert that engines may ask for, ascending."""
    if not versions.live:
        return [expert]
    return sorted({differs.get(layer, {}).get(expert, expert) for differs in versions.live.values()})


def numbers(versions: LiveVersions, held: Holdings) -> Holdings:
    """What a host that has these experts holds: every number of each that engines may ask for."""
    if versions.plain:
        return held
    return {
        layer: tuple(sorted(n for expert in experts for n in live_numbers(versions, layer, expert)))
        for layer, experts in held.items()
    }


def dead_numbers(versions: LiveVersions, layer: int, size: int) -> frozenset[int]:
    """Numbers of a layer of `size` base experts that no version has any more."""
    if versions.plain and not versions.variants.get(layer):
        return frozenset()
    alive = {n for expert in range(size) for n in live_numbers(versions, layer, expert)}
    return frozenset(range(size + len(versions.variants.get(layer, ())))) - alive


def variants_of(versions: LiveVersions, held: Holdings, sizes: Mapping[int, int]) -> Variants:
    """What the numbers in `held` are that are not the base checkpoint's."""
    found = {}
    for layer, held_numbers in held.items():
        if layer not in versions.variants:
            continue
        known = {n: versions.variants[layer][n - sizes[layer]] for n in held_numbers if n >= sizes[layer]}
        if known:
            found[layer] = known
    return found


def new_numbers(
    before: LiveVersions, after: LiveVersions, sizes: Mapping[int, int]
) -> dict[int, tuple[int, ...]]:
    """Layer index → numbers that hosts must load for `after` and did not hold for `before`."""
    found = {}
    for layer, size in sizes.items():
        had = {n for expert in range(size) for n in live_numbers(before, layer, expert)}
        want = {n for expert in range(size) for n in live_numbers(after, layer, expert)}
        if want - had:
            found[layer] = tuple(sorted(want - had))
    return found


def expert_of(versions: LiveVersions, layer: int, number: int, size: int) -> int:
    """Which expert of the model a number is."""
    return number if number < size else versions.variants[layer][number - size].expert


def manifests(versions: LiveVersions) -> Collection[str]:
    """Digests of all live versions."""
    return versions.live.keys()
