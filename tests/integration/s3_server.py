"""A server that speaks S3 over HTTP, in a process of its own: moto's, with one request at a time.

`python -m tests.integration.s3_server` prints its port and serves until its standard input ends.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Wsgi = Callable[[dict[str, Any], Any], Iterable[bytes]]


@contextmanager
def s3_server() -> Iterator[str]:
    """A server without buckets for a block; its URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.s3_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def in_turn(app: Wsgi) -> Wsgi:
    """The same application, which answers one request after the other.

    S3 looks at a write's condition and writes in one step; moto does one after the other.
    """
    lock = threading.Lock()

    def answer(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        with lock:
            return list(app(environ, start))

    return answer


def main() -> None:
    """Serve."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app = in_turn(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
