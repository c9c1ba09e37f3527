"""Starting nodes, with a program that stands for Ray's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import HostError
from workloads.bench import ray_nodes
from workloads.bench.ray_nodes import HEAD, RayNodes

_BUSY = "The current node timed out during startup. This could happen because the GCS has become overloaded."


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[RayNodes]:
    nodes = RayNodes(tmp_path / "token")
    yield nodes
    nodes.close()


def says(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> None:
    """Every start says the next of these; it goes on if that is that Ray has started."""
    program = f"""
import pathlib, time
count = pathlib.Path({str(folder / "count")!r})
number = len(count.read_text()) if count.exists() else 0
count.write_text("x" * (number + 1))
word = {list(words)!r}[number]
print(word, flush=True)
if "started" in word: time.sleep(600)
raise SystemExit(1)
"""
    monkeypatch.setattr(ray_nodes, "_RAY", program)


def test_a_node_that_was_too_late_on_a_busy_machine_is_started_again(
    nodes: RayNodes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    says(monkeypatch, tmp_path, _BUSY, "Ray runtime started.")
    nodes.start(head_cpus=1)
    assert len((tmp_path / "count").read_text()) == 2
    assert len(nodes.processes(HEAD)) == 1


@pytest.mark.parametrize("words", [(_BUSY, _BUSY), ("no such option: --heads",)])
def test_one_that_does_not_start_is_told_in_its_own_words(
    nodes: RayNodes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: tuple[str, ...]
) -> None:
    says(monkeypatch, tmp_path, *words)
    with pytest.raises(HostError, match=words[-1][:20]):
        nodes.start(head_cpus=1)
    assert len((tmp_path / "count").read_text()) == len(words)
    assert not nodes.processes(HEAD)
