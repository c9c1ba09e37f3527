"""`complete` against a server whose answers break off: one message, no traceback."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

from cluster.errors import ExpertmeshError
from workloads.client import Client

LOST = "no living host holds expert 7 of layer 0; the mesh is being repaired, try again"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    ending = b""

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        body = json.dumps({"object": "list", "data": [{"id": "tiny", "object": "model"}]}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        chunk = {"id": "1", "object": "text_completion", "choices": [{"index": 0, "text": "Paris"}]}
        for event in (b"data: " + json.dumps(chunk).encode() + b"\n\n", self.ending):
            self.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n" if event else b"")
        # Without the last chunk: as a server does that is killed.
        self.close_connection = True


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("ending", "message", "hint"),
    [
        (
            b'data: {"error": {"message": "' + LOST.encode() + b'"}}\n\n',
            "broke the answer off: " + LOST,
            "expertmesh status",
        ),
        (b"", "no server answers", "expertmesh serve"),
    ],
)
def test_an_answer_that_breaks_off_is_one_message(
    url: str, ending: bytes, message: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "ending", ending)
    written = io.StringIO()
    with pytest.raises(ExpertmeshError, match=message) as broken:
        Client(url, None, 8, 0.0).complete("The capital of France is", Console(file=written))
    assert hint in broken.value.hint
    assert "Paris" in written.getvalue()
