"""With or without a server to learn beside, on a cluster that has none of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from cluster.config import Config
from cluster.errors import ExpertmeshError
from workloads import learn_loop_commands, running
from workloads.running import NOTHING, START, NotRunningError


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Clusters that were joined to train on; none has a controller."""
    found: list[str] = []

    @contextlib.contextmanager
    def nobody(config: Config, url: str | None = None) -> Iterator[None]:
        raise NotRunningError(NOTHING, START)
        yield

    @contextlib.contextmanager
    def training(config: Config) -> Iterator[None]:
        found.append(config.ray.address)
        yield

    monkeypatch.setattr(running, "running_controller", nobody)
    monkeypatch.setattr(learn_loop_commands, "ray_for_training", training)
    return found


CONFIG = Config.model_validate({"ray": {"address": "auto"}})


def test_a_rayjobs_cluster_has_no_server_and_needs_none_to_publish(joined: list[str]) -> None:
    with learn_loop_commands.beside(CONFIG, None, True) as (server, pausing, url):
        assert (server, pausing(), url) == (None, False, "")
    assert joined == ["auto"]


@pytest.mark.parametrize(("url", "publish_only"), [(None, False), ("http://127.0.0.1:8000", True)])
def test_a_server_that_is_asked_for_must_be_there(
    joined: list[str], url: str | None, publish_only: bool
) -> None:
    with pytest.raises(ExpertmeshError, match=NOTHING), learn_loop_commands.beside(CONFIG, url, publish_only):
        pass
    assert joined == []
