"""`expertmesh status`: what is asked of the router, and how it reads."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console

from workloads.console import console
from workloads.status import _flat, _router, status_view

HOST = {
    "host_id": "local-0",
    "node_id": "n",
    "device": "cpu",
    "state": "ready",
    "experts_loaded": 240,
    "copied_from": (),
    "weight_bytes": 512 * 2**20,
    "rss_bytes": 700 * 2**20,
    "kernel": "vllm-cpu-vec",
    "connections": 1,
    "dispatches": 4321,
}


@contextmanager
def server(answers: dict[str, tuple[int, str]], key: str | None = None) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.get(self.path, (404, "{}"))
            if key and self.path != "/ready" and self.headers["Authorization"] != f"Bearer {key}":
                status, body = 401, "{}"
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_args: object) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_port}"
    finally:
        made.shutdown()
        made.server_close()
        thread.join(5)


def shown(state: dict[str, Any]) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(status_view(state))
    return "\n".join(" ".join(line.split()) for line in console.export_text().splitlines())


def test_a_ready_router_brings_round_trips_and_counters() -> None:
    answers = {
        "/ready": (200, json.dumps({"ready": True, "host_round_trip_us": {"local-0": 31.5}})),
        "/expertmesh/stats": (200, json.dumps({"epoch": 2, "rss_bytes": 2**20})),
    }
    with server(answers) as url:
        assert _router(url, None) == {
            "ready": True,
            "host_round_trip_us": {"local-0": 31.5},
            "engine": {"epoch": 2, "rss_bytes": 2**20},
        }


def test_the_key_brings_the_counters_and_without_it_they_are_missed() -> None:
    answers = {
        "/ready": (200, json.dumps({"ready": True, "host_round_trip_us": {}})),
        "/expertmesh/stats": (200, json.dumps({"epoch": 2, "rss_bytes": 2**20})),
    }
    with server(answers, key="secret") as url:
        assert _router(url, "secret")["engine"]["epoch"] == 2
        for wrong in (None, "wrong"):
            state = _router(url, wrong)
            assert state["ready"] and "engine" not in state
            assert "EXPERTMESH_API_KEY" in shown({"url": url, "model": "m", "hosts": [], **state})


def test_a_router_that_is_not_ready_gives_its_reason_and_no_counters() -> None:
    with server({"/ready": (503, json.dumps({"ready": False, "reason": "host gone"}))}) as url:
        assert _router(url, None) == {"ready": False, "reason": "host gone"}
    with server({"/ready": (503, "Service Unavailable")}) as url:
        assert _router(url, None) == {"ready": False, "reason": "Service Unavailable"}


def test_a_router_that_is_gone_or_talks_nonsense_is_not_ready() -> None:
    with server({}) as url:
        pass
    gone = _router(url, None)
    assert not gone["ready"] and "does not answer" in gone["reason"]
    with server({"/ready": (200, "<html>")}) as url:
        assert not _router(url, None)["ready"]


def test_the_view_names_every_host_and_what_is_wrong() -> None:
    down = {"host_id": "local-1", "device": "cpu", "state": "down", "reason": "the actor died"}
    state = {
        "url": "http://127.0.0.1:8000",
        "model": "m",
        "ready": False,
        "reason": "host gone",
        "hosts": [HOST, down],
        "engine": {"epoch": 3.0, "rss_bytes": 1500 * 2**20},
    }
    text = shown(state)
    for expected in (
        "url http://127.0.0.1:8000",
        "ready no host gone",
        "table epoch 3",
        "engine memory 1500 MiB",
        "local-0 │ cpu │ ready │ 240 │ 512 │ 700 │ vllm-cpu-vec │ 1 │ 4321",
        "local-1 │ cpu │ down the actor died",
    ):
        assert expected in text


def test_nothing_is_cut_where_no_terminal_reads(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a-group-of-hosts-with-a-name-of-42-letters"
    down = {"host_id": f"{name}-1", "device": "cpu", "state": "down", "reason": "the actor died " * 20}
    up = {**HOST, "host_id": f"{name}-0", "dispatches": 12345678901}
    console().print(
        status_view({"url": "u", "model": "m" * 300, "ready": False, "reason": "r", "hosts": [up, down]})
    )
    text = capsys.readouterr().out
    for whole in (f" {name}-0 ", f" {name}-1 ", " 12345678901 ", "the actor died " * 20, "m" * 300):
        assert sum(whole in line for line in text.splitlines()) == 1
    assert "…" not in text


def test_a_report_becomes_flat_for_json() -> None:
    flat = _flat({"rows": 3, "address": {"unix": "x", "tcp": "", "pid": 5, "host_id": "h", "node_id": "n"}})
    assert flat == {"rows": 3, "unix": "x", "tcp": "", "pid": 5}
