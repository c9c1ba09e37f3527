"""What a controller writes down of a version that is about to serve, and of those that served: its journal.

    1. the promotion is written down in the controller's document
    2. the alias is moved in the store
    3. the table with the version in front is published, and the promotion crossed out

A controller that finds a promotion in its document looks where the alias is: if the move was made, or can still be,
it goes on with the next step; if somebody else has moved the alias, it crosses the promotion out.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.versions.aliases import Move


@dataclass(frozen=True, slots=True)
class Promotion:
    """A version is to serve."""

    alias: str
    move: Move
    """The alias's."""
    continue_running: bool = False
    """Whether running requests go on with it."""


@dataclass(frozen=True, slots=True)
class Retiring:
    """A version that served."""

    since: float
    """Seconds since 1970."""
    epoch: int
    """Of the table from which on no new request gets it."""


@dataclass(frozen=True, slots=True)
class VersionSettings:
    """How versions come to serve."""

    alias: str = "production"
    """Says in the store which version serves."""
    keep_warm_s: float = 600.0
    """How long a version that served stays loaded."""
    continue_running: bool = False
    """Whether requests that run at a promotion go on with the new version; else they end with their own."""
    history: int = 10
    """Moves of each alias that can be made back."""
    spare_experts: int = 0
    """Experts by which a version may enlarge a layer."""
    public_key: str = ""
    """Path of the key that manifests must be signed with; empty where unsigned ones may serve."""
