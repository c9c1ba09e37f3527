"""What `helm test` and `helm install` of expertmesh-serve tell; the script runs against APIs that answer so or so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.charts import serve_chart as chart
from tests.charts.helm import of_kind, one

_KEY = "an api key"


@contextmanager
def _api(*, ready: bool = True, asks_for_key: bool = True, key: str = _KEY, tokens: int = 3) -> Iterator[str]:
    """An API on this machine; its URL."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/ready":
                self._say(200 if ready else 503, {})
            elif self._known():
                self._say(200, {"data": [{"id": "mixtral"}]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self._known():
                assert asked["model"] == "mixtral" and asked["messages"][0]["role"] == "user"
                self._say(
                    200,
                    {"usage": {"completion_tokens": tokens}, "choices": [{"message": {"content": "Paris."}}]},
                )

        def _known(self) -> bool:
            if asks_for_key and self.headers.get("Authorization") != f"Bearer {key}":
                self._say(401, {})
                return False
            return True

        def _say(self, status: int, body: dict[str, Any]) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def _ask(url: str, timeout_s: float = 20) -> subprocess.CompletedProcess[str]:
    """The pod's command, as it is rendered, with this URL."""
    (container,) = one(chart.render(), "Pod")["spec"]["containers"]
    assert container["command"] == ["python", "-c"]
    given = {item["name"]: item.get("value", _KEY) for item in container["env"]}
    return subprocess.run(
        [sys.executable, "-c", *container["args"]],
        env={**os.environ, **given, "API_URL": url, "TIMEOUT_S": str(timeout_s)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_an_api_that_answers_passes() -> None:
    with _api() as url:
        done = _ask(url)
    assert done.returncode == 0, done.stderr
    assert "mixtral answers: Paris." in done.stdout


@pytest.mark.parametrize(
    ("api", "told"),
    [
        ({"asks_for_key": False}, "without a key was answered with 200"),
        ({"key": "another key"}, "not accepted: 401"),
        ({"tokens": 0}, "no answer: 200"),
        ({"ready": False}, "not ready"),
    ],
)
def test_an_api_that_does_not_fails(api: dict[str, Any], told: str) -> None:
    with _api(**api) as url:
        done = _ask(url, 1 if not api.get("ready", True) else 20)
    assert done.returncode == 1
    assert told in done.stderr


def test_the_pod_asks_the_service_with_the_key() -> None:
    objects = chart.render("exposed")
    pod, service = one(objects, "Pod"), one(objects, "Service", "experts-api")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (container,) = pod["spec"]["containers"]
    variables = {item["name"]: item for item in container["env"]}
    (port,) = service["spec"]["ports"]
    assert variables["API_URL"]["value"] == f"http://experts-api:{port['port']}"
    reference = variables["EXPERTMESH_API_KEY"]["valueFrom"]["secretKeyRef"]
    assert reference == {"name": "mesh-keys", "key": "EXPERTMESH_API_KEY"}
    assert not of_kind(chart.render(values={"tests": {"enabled": False}}), "Pod")


def test_notes_say_what_is_left_to_do() -> None:
    """Of values that leave something open."""

    def notes(*arguments: str) -> str:
        folder = str(chart.CI.parent)
        return chart.HELM.run("install", "mesh", folder, "--dry-run=client", *arguments).partition("NOTES:")[
            2
        ]

    plain = notes()
    assert "service/mesh-expertmesh-serve-api 8080:8080" in plain
    assert "mesh-expertmesh-serve-model is new and empty" in plain
    assert "tables in memory" in plain and "fixed" in plain
    open_one = notes("--values", str(chart.CI / "rocksdb-values.yaml"), "--set", "rayAuth.mode=disabled")
    assert "GCSFaultToleranceEmbeddedStorage" in open_one
    assert "can run code" in open_one and "new and empty" not in open_one
