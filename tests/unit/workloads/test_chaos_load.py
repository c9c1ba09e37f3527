"""One answer under faults: every way in which it can end is told apart. A real HTTP server, no model."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from workloads.bench.chaos_load import Answer, ask, once, prompts, under_faults
from workloads.bench.chaos_scenario import Load

LOAD = Load(streams=2, prompt_tokens=4, output_tokens=3, prompts=2, duration=0.5, request_timeout=2)
DONE = b"data: [DONE]\n\n"


def event(*tokens: int) -> bytes:
    return b"data: " + json.dumps({"choices": [{"token_ids": list(tokens)}]}).encode() + b"\n\n"


def error(code: object) -> bytes:
    return b"data: " + json.dumps({"error": {"message": "gone", "code": code}}).encode() + b"\n\n"


@contextmanager
def serving(status: int, chunks: list[bytes], *, whole: bool = True, wait_s: float = 0) -> Iterator[str]:
    """A server that always answers so; without `whole` it cuts the connection in the middle."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for chunk in chunks:
                self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
            self.wfile.flush()
            time.sleep(wait_s)
            if whole:
                self.wfile.write(b"0\r\n\r\n")
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def asked(url: str, load: Load = LOAD) -> Answer:
    prompt = replace(prompts(load, 50)[0][0], wanted=3)

    async def request() -> Answer:
        async with httpx.AsyncClient(timeout=5) as client:
            return await ask(client, url, "m", prompt, load)

    return asyncio.run(request())


GOOD = [event(7), event(8, 9), DONE]
# Characters at which str.splitlines splits, in an event and at the border of two chunks.
ODD = 'data: {"choices": [{"token_ids": [8, 9], "text": "\u2028\x85"}]}\n\n'.encode()
CASES = {
    "good": (200, GOOD, True, "ok", (7, 8, 9)),
    "odd characters": (200, [event(7), ODD[:50], ODD[50:], DONE], True, "ok", (7, 8, 9)),
    "no JSON": (200, [event(7), b"data: {oops\n\n", DONE], True, "event", (7,)),
    "done too early": (200, [event(7), DONE], True, "short", (7,)),
    "too many": (200, [event(7, 8, 9, 10), DONE], True, "short", (7, 8, 9, 10)),
    "cut off": (200, [event(7)], False, "broken", (7,)),
    "cut off in a line": (200, [event(7), b'data: {"choi'], True, "no-done", (7,)),
    "no end": (200, [event(7), event(8, 9)], True, "no-done", (7, 8, 9)),
    "an error event": (200, [event(7), error("oops"), DONE], True, "event", (7,)),
    "a refusal in the stream": (200, [event(7), error(503), DONE], True, "refused", (7,)),
    "refused": (503, [b"{}"], True, "refused", ()),
    "an error": (500, [b"{}"], True, "status", ()),
}


@pytest.mark.parametrize(("status", "chunks", "whole", "outcome", "tokens"), CASES.values(), ids=list(CASES))
def test_outcomes(
    status: int, chunks: list[bytes], whole: bool, outcome: str, tokens: tuple[int, ...]
) -> None:
    with serving(status, chunks, whole=whole) as url:
        found = asked(url)
    assert (found.outcome, found.tokens) == (outcome, tokens), found.reason
    assert sum(found.counts) == len(tokens) and len(found.times_ns) == len(found.counts)
    assert list(found.times_ns) == sorted(found.times_ns) and found.sent_ns <= found.ended_ns
    assert (found.reason == "") == (outcome == "ok")


def test_nobody_listens_and_no_end_in_time() -> None:
    with serving(200, GOOD) as url:
        pass
    assert asked(url).outcome == "unreachable"
    with serving(200, [event(7)], wait_s=1.0) as url:
        found = asked(url, LOAD.model_copy(update={"request_timeout": 0.2}))
    assert (found.outcome, found.tokens) == ("timeout", (7,))


def test_prompts_are_of_the_seed_and_all_different() -> None:
    found = prompts(LOAD, 512)
    assert found == prompts(LOAD, 512) != prompts(LOAD.model_copy(update={"seed": 1}), 512)
    flat = [prompt for stream in found for prompt in stream]
    assert len({prompt.tokens for prompt in flat}) == len({prompt.key for prompt in flat}) == 4
    assert all(0 <= token < 512 for prompt in flat for token in prompt.tokens)


def test_answers_are_of_different_lengths_so_that_streams_do_not_end_as_one() -> None:
    wanted = [p.wanted for stream in prompts(Load(output_tokens=64), 512) for p in stream]
    assert min(wanted) >= 32 and max(wanted) <= 64 and len(set(wanted)) > 20


def test_once_sends_every_prompt_and_faults_run_beside_the_load() -> None:
    streams = prompts(LOAD, 50)
    struck: list[float] = []

    async def faults() -> None:
        await asyncio.sleep(0.1)
        struck.append(time.monotonic_ns())

    with serving(200, GOOD) as url:
        answers = asyncio.run(once(url, "m", LOAD, streams, 2))
        assert sorted(answer.key for answer in answers) == sorted(2 * [p.key for s in streams for p in s])
        answers = asyncio.run(under_faults(url, "m", LOAD, streams, faults))
        assert len(struck) == 1 and len(answers) > 4
        assert {answer.sent_ns > struck[0] for answer in answers} == {True, False}
        short = LOAD.model_copy(update={"repeat": False})
        assert len(asyncio.run(under_faults(url, "m", short, streams, faults))) == 4


def test_a_fault_that_cannot_be_carried_out_ends_the_load() -> None:
    async def faults() -> None:
        raise RuntimeError("no such process")

    with serving(200, GOOD) as url, pytest.raises(RuntimeError, match="no such process"):
        asyncio.run(under_faults(url, "m", LOAD, prompts(LOAD, 50), faults))
