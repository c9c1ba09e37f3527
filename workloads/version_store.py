"""The store of the served model's versions, and the version that it is to begin with."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from cluster.checkpoint import Checkpoint
from cluster.config import Config
from cluster.errors import VersionConflictError
from cluster.live_versions import LiveVersions, with_version
from cluster.messages import StoreAddress
from cluster.promotion import VersionSettings
from cluster.version_check import checked
from cluster.versions.aliases import Move
from cluster.versions.publish import publish_base
from cluster.versions.store import Store


def store_address(config: Config, checkpoint: Checkpoint) -> StoreAddress:
    """As configured, else a folder of this model's beside the other caches."""
    return StoreAddress(config.versions.url(checkpoint.digest), dict(config.versions.options))


def version_settings(config: Config) -> VersionSettings:
    """What the controller needs of the configuration."""
    key = config.versions.public_key
    return VersionSettings(
        config.versions.alias,
        float(config.versions.keep_warm),
        config.versions.running == "continue",
        config.versions.history,
        config.versions.spare_experts,
        str(Path(key).expanduser().absolute()) if key else "",
    )


def first_version(
    config: Config, checkpoint: Checkpoint, now: Callable[[], float] = time.time
) -> LiveVersions:
    """What serves from the start: where the alias points, and where it points nowhere yet, the checkpoint as it is.

    VersionError if that version is damaged, of another model, or not signed where it must be.
    """
    address, alias = store_address(config, checkpoint), config.versions.alias
    store = Store(address.url, address.options)
    base = publish_base(store, checkpoint)
    current = store.aliases.current(alias)
    if current is None:
        current = Move(1, base, now(), "expertmesh serve", "the checkpoint as it is")
        try:
            store.aliases.move(alias, current)
        except VersionConflictError:
            # Another server of the same model began at the same time.
            current = store.aliases.current(alias) or current
    digest = current.manifest
    manifest = checked(store, digest, checkpoint.digest, version_settings(config))
    sizes = {layer.index: layer.num_experts for layer in checkpoint.moe_layers}
    return with_version(
        LiveVersions(serving=digest),
        digest,
        manifest.experts,
        sizes,
        manifest.dense,
        manifest.added,
        manifest.retired,
    )
