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
from typing import Final, TypeVar

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

Added = Mapping[int, Mapping[int, int]]
"""Layer index → expert that the base checkpoint does not have → the one of the base beside which it lives."""

Retired = Mapping[int, tuple[int, ...]]
"""Layer index → experts that are not chosen any more."""

Named = TypeVar("Named")


@dataclass(frozen=True, slots=True)
class EngineSide:
    """What an engine itself has of a version."""

    dense: Mapping[str, str] = field(default_factory=dict)
    """Tensor → blob."""
    added: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Layer index → experts that its router chooses among besides the base checkpoint's."""
    retired: Retired = field(default_factory=dict)
    """Layer index → experts that its router does not choose."""


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
    added: Mapping[str, Added] = field(default_factory=dict)
    """By manifest, of those that have more experts than the base checkpoint."""
    retired: Mapping[str, Retired] = field(default_factory=dict)
    """By manifest, of those that have fewer."""
    engines: tuple[str, ...] = ()
    """While a version is on trial: names of the engines that there are."""
    pinned: str = ""
    """The one of them that computes the candidate, and nothing else; "" where all of them compute both versions."""
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Context of a request → manifest → probability with which it gets that; empty where requests are not shared out.
    "" is any other context."""

    @property
    def plain(self) -> bool:
        """Whether the base checkpoint's experts, all of them, are what is asked for."""
        return not (self.retired or any(any(differs.values()) for differs in self.live.values()))


def with_version(
    versions: LiveVersions,
    manifest: str,
    experts: Mapping[int, Mapping[int, str]],
    sizes: Mapping[int, int],
    dense: Mapping[str, str] | None = None,
    added: Added | None = None,
    retired: Retired | None = None,
) -> LiveVersions:
    """With one more version; `experts` are the blobs of those that it has of its own, `sizes` the layers' experts,
    `dense` the blobs of the engine's tensors that it has of its own.

    VersionError for a layer or an expert that the model does not have.
    """
    variants = dict(versions.variants)
    # One without a blob is as its neighbour is in the base checkpoint, and costs no memory.
    differs = {
        layer: {
            expert: home for expert, home in of_layer.items() if expert not in (retired or {}).get(layer, ())
        }
        for layer, of_layer in (added or {}).items()
    }
    for layer, named in experts.items():
        for expert, blob in named.items():
            home = (added or {}).get(layer, {}).get(expert, expert)
            if not 0 <= home < sizes.get(layer, 0):
                raise VersionError(
                    f"version {manifest[:12]} has an expert {expert} in layer {layer}, which the model does not have",
                    "publish it for this model",
                )
            known, variant = variants.get(layer, ()), Variant(home, blob)
            if variant not in known:
                known = variants[layer] = (*known, variant)
            differs.setdefault(layer, {})[expert] = sizes[layer] + known.index(variant)
    return replace(
        versions,
        live={
            **versions.live,
            manifest: {layer: of_layer for layer, of_layer in differs.items() if of_layer},
        },
        variants=variants,
        dense={**versions.dense, manifest: dense} if dense else versions.dense,
        added={**versions.added, manifest: added} if added else versions.added,
        retired={**versions.retired, manifest: retired} if retired else versions.retired,
    )


def without_version(versions: LiveVersions, manifest: str) -> LiveVersions:
    """Without a version that new requests don't get."""
    assert manifest not in (versions.serving, versions.candidate, *arms(versions))

    def left(named: Mapping[str, Named]) -> dict[str, Named]:
        return {name: value for name, value in named.items() if name != manifest}

    return replace(
        versions,
        live=left(versions.live),
        dense=left(versions.dense),
        continued=left(versions.continued),
        added=left(versions.added),
        retired=left(versions.retired),
    )


def serving(versions: LiveVersions, manifest: str, *, continue_running: bool = False) -> LiveVersions:
    """All new requests get another of the live versions; those that run as well, with `continue_running`."""
    assert manifest in versions.live
    continued = {name: other for name, other in versions.continued.items() if name != manifest}
    if continue_running:
        continued = {name: manifest for name in versions.live if name != manifest}
    return replace(
        versions,
        serving=manifest,
        continued=continued,
        candidate="",
        share=0.0,
        engines=(),
        pinned="",
        shares={},
    )


def with_candidate(
    versions: LiveVersions, manifest: str, share: float, engines: Collection[str] = ()
) -> LiveVersions:
    """A share of new requests gets another of the live versions; with none of them, none does.

    Where it differs in what is the engine's own, one of the `engines` computes it: the one that did so far, if it is
    still there. There must be two then.
    """
    assert manifest in versions.live
    if not share:
        return replace(versions, candidate="", share=share, engines=(), pinned="")
    pinned = ""
    if not same_engine(versions, manifest, versions.serving):
        assert len(engines) > 1
        pinned = versions.pinned if versions.pinned in engines else max(engines)
    return replace(versions, candidate=manifest, share=share, engines=tuple(sorted(engines)), pinned=pinned)


def with_shares(versions: LiveVersions, shares: Mapping[str, Mapping[str, float]]) -> LiveVersions:
    """New requests are shared out among live versions by lot; with none, the one that serves gets all of them."""
    assert not versions.candidate
    assert all(manifest in versions.live for of_context in shares.values() for manifest in of_context)
    return replace(versions, shares=shares)


def arms(versions: LiveVersions) -> tuple[str, ...]:
    """Manifests that requests are shared out among; none where they are not."""
    return tuple(sorted({name for of_context in versions.shares.values() for name in of_context}))


def share_of(versions: LiveVersions, manifest: str) -> float:
    """Of new requests that get a version; where contexts have shares of their own, the mean over contexts."""
    if versions.shares:
        return sum(of.get(manifest, 0.0) for of in versions.shares.values()) / len(versions.shares)
    if manifest == versions.serving:
        return 1 - versions.share
    return versions.share if manifest == versions.candidate else 0.0


def assigned(versions: LiveVersions, context: str, lot: float) -> tuple[str, float]:
    """The manifest that a request of a context gets by a lot of 0 to 1, and the probability with which it does."""
    found = versions.shares.get(context) or versions.shares.get("") or {versions.serving: 1.0}
    among = sorted((name, share) for name, share in found.items() if share > 0)
    for name, share in among:
        if lot < share:
            return name, share
        lot -= share
    # What rounding left of the whole is the last one's.
    return among[-1]


def computed_by(versions: LiveVersions, engine: str) -> str:
    """What an engine computes for whoever asks for no version."""
    return versions.candidate if versions.pinned and versions.pinned == engine else versions.serving


def others_for(versions: LiveVersions, engine: str, manifest: str) -> tuple[str, ...]:
    """The engines of which one must compute a request's version, since this one can't; none if it can."""
    if not versions.pinned or (manifest == versions.candidate) == (versions.pinned == engine):
        return ()
    if manifest == versions.candidate:
        return (versions.pinned,)
    return tuple(name for name in versions.engines if name != versions.pinned)


def same_but_choice(one: LiveVersions, other: LiveVersions) -> bool:
    """Whether they differ at most in what new requests get."""
    return one == replace(
        other,
        serving=one.serving,
        candidate=one.candidate,
        share=one.share,
        continued=one.continued,
        engines=one.engines,
        pinned=one.pinned,
        shares=one.shares,
    )


def chosen(versions: LiveVersions, who: str) -> str:
    """The manifest that a request of somebody gets: the same for all of theirs, and kept when the share grows."""
    if not versions.candidate:
        return versions.serving
    lot = int.from_bytes(sha256(f"{versions.candidate}:{who}".encode()).digest()[:8], "big") / 2**64
    return versions.candidate if lot < versions.share else versions.serving


def same_engine(versions: LiveVersions, one: str, other: str) -> bool:
    """Whether one engine can compute for both versions at a time: its own tensors are the same, and its routers choose
    among the same experts.
    """
    return engine_side(versions, one) == engine_side(versions, other)


def engine_side(versions: LiveVersions, manifest: str) -> EngineSide:
    """What an engine must have of a version; nothing for the base checkpoint's, and for one that is not live."""
    retired, added = versions.retired.get(manifest, {}), versions.added.get(manifest, {})
    return EngineSide(
        versions.dense.get(manifest, {}),
        {layer: tuple(sorted(experts)) for layer, experts in added.items()},
        {layer: tuple(sorted(experts)) for layer, experts in retired.items()},
    )


def all_added(versions: LiveVersions) -> Added:
    """What the live versions have added; of an expert that lives elsewhere in each, what the serving one says."""
    found: dict[int, dict[int, int]] = {}
    for added in (*versions.added.values(), versions.added.get(versions.serving, {})):
        for layer, experts in added.items():
            found.setdefault(layer, {}).update(experts)
    return found


def live_numbers(versions: LiveVersions, layer: int, expert: int) -> list[int]:
    """All numbers of an expert and of those that live beside it that engines may ask for, ascending."""
    if not versions.live:
        return [expert]
    found = set()
    for name, differs in versions.live.items():
        of_layer = differs.get(layer, {})
        if expert not in versions.retired.get(name, {}).get(layer, ()):
            found.add(of_layer.get(expert, expert))
        beside = versions.added.get(name, {}).get(layer, {})
        found.update(
            of_layer[other] for other, home in beside.items() if home == expert and other in of_layer
        )
    return sorted(found)


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
