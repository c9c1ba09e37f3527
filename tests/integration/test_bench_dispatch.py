"""A tiny run of the dispatch measurement, with real processes, without Ray."""

from __future__ import annotations

import io
import multiprocessing

from rich.console import Console

from workloads.bench.dispatch import Settings, measure, show


def test_a_tiny_run_measures_every_path_and_leaves_no_process() -> None:
    settings = Settings(rounds=2, ray=False, sizes=((1, 16), (3, 16)), hosts=(1, 2), block=3)
    report = measure(settings, lambda _size: None)
    assert [(line["rows"], line["hosts"]) for line in report["results"]] == [(1, 1), (1, 2), (3, 1), (3, 2)]
    for line in report["results"]:
        assert 0 < line["p50_us"] <= line["p99_us"]
        assert all(line[f"{name}_p50_us"] > 0 for name in ("floor", "socket", "zeromq"))
        assert line["ray_actor_ratio"] is None
    assert report["series"]["dispatch_2/3x16_us"]["n"] == 6
    assert report["ray_graph_reason"] == "skipped"
    text = io.StringIO()
    show(report, Console(file=text, width=160))
    assert multiprocessing.active_children() == []
    assert "3 × 16" in text.getvalue() and "floor_ratio_1x16" in text.getvalue()
