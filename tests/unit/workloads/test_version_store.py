"""The version that a server begins with."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import load_config
from cluster.versions.aliases import Move
from cluster.versions.publish import publish_base
from cluster.versions.store import Store
from tests.unit.cluster.versions import tiny
from workloads.version_store import first_version


def test_two_servers_that_begin_at_the_same_time_begin_with_the_same_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = tiny.base(tmp_path)
    config = load_config(None, {"model.path": "base", "versions.store": "kept"}, {}).config
    store = Store(str(tmp_path / "kept"))
    base = publish_base(store, checkpoint)

    def other() -> float:
        # Between looking and moving.
        store.aliases.move("production", Move(1, base, 5.0, "the other"))
        return 6.0

    assert first_version(config, checkpoint, other).serving == base
    assert [move.author for move in store.aliases.history("production")] == ["the other"]
