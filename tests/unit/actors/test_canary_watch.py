"""What a router sees of a trial: who gets which version, how answers ended, how held-out text is predicted."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from actors.canary_watch import CanaryWatch
from actors.pinning import Pinned, Pins
from actors.replay import Replay, texts
from cluster.canary import Answered, Observed
from cluster.errors import VersionError
from cluster.live_versions import HEADER, LiveVersions, chosen, with_candidate, with_version

VERSIONS = with_version(LiveVersions("old", {"old": {}}), "new", {0: {0: "a"}}, {0: 4})


def on_trial(share: float = 0.5) -> Pins:
    pins = Pins()
    pins.use(with_candidate(VERSIONS, "new", share))
    return pins


def metrics(tokens: int, seconds: float) -> SimpleNamespace:
    return SimpleNamespace(num_generation_tokens=tokens, first_token_ts=5.0, last_token_ts=5.0 + seconds)


def test_nothing_is_kept_without_a_trial() -> None:
    pins = Pins()
    pins.use(VERSIONS)
    watch = CanaryWatch(pins)
    watch.answered("cmpl-a-0", "old", failed=False)
    assert watch.take() is None and not watch.liked("cmpl-a", 1.0)


def test_answers_and_what_users_say_of_them_are_told_once() -> None:
    watch = CanaryWatch(on_trial())
    watch.answered("cmpl-a-0", "old", failed=False, metrics=metrics(3, 0.4))
    watch.answered("chatcmpl-b-1", "new", failed=True)
    watch.answered("cmpl-c-0", "new", failed=False, metrics=metrics(1, 0.0))
    assert watch.liked("cmpl-a", 0.5) and watch.liked("chatcmpl-b-1", 0.0) and not watch.liked("cmpl-z", 1.0)
    watch.predicted(0.25)
    assert watch.take() == Observed(
        "new",
        (Answered(False, pytest.approx(0.2)),),
        (Answered(True, None), Answered(False, None)),
        (0.25,),
        (0.5,),
        (0.0,),
    )
    assert watch.take() is None


def asked(pins: Pins, body: bytes, key: str = "") -> str:
    """The manifest of the answer to a request with this body; the application must read the same one."""
    sent: list[Message] = []
    parts = [body[:3], body[3:]]

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        assert await Request(scope, receive).body() == body
        await PlainTextResponse("")(scope, receive, send)

    async def receive() -> Message:
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"authorization", key.encode())] if key else []
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    asyncio.run(Pinned(application, pins)(scope, receive, send))
    return dict(sent[0]["headers"])[HEADER.encode()].decode()


def test_a_user_stays_on_one_side_whatever_the_key() -> None:
    pins = on_trial()
    for user in ("ada", "bob", "eve", "kim"):
        found = {asked(pins, b'{"user": "%s"}' % user.encode(), key) for key in ("", "Bearer a", "Bearer b")}
        assert found == {chosen(pins.versions, f"user {user}")}


def test_without_a_user_the_key_decides_and_without_a_key_each_request() -> None:
    pins = on_trial()
    for key in ("Bearer a", "Bearer b", "Bearer c"):
        assert {asked(pins, body, key) for body in (b"{}", b"no json", b'{"user": 3}')} == {
            chosen(pins.versions, f"key {key}")
        }
    assert {asked(pins, b"{}") for _ in range(64)} == {"old", "new"}


def test_held_out_text_is_paragraphs_or_lines_of_json(tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("one\nmore\n\n\ntwo\n")
    lines.write_text('{"text": "one"}\n\n{"text": "two", "other": 1}\n')
    assert texts(plain) == ["one\nmore", "two"] and texts(lines) == ["one", "two"]
    lines.write_text('{"words": "one"}\n')
    with pytest.raises(VersionError, match="line 1 of the held-out text has no `text`"):
        texts(lines)
    plain.write_text("\n\n")
    with pytest.raises(VersionError, match="has no text in it"):
        texts(plain)
    with pytest.raises(VersionError, match="can't be read"):
        texts(tmp_path / "none.txt")


def test_both_versions_predict_the_same_texts_while_one_is_on_trial(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text of some length\n\nanother text as long\n\nshort")
    pins, told, asked_of = on_trial(), [], []

    async def nats(tokens: list[int], manifest: str) -> float:
        asked_of.append((manifest, tuple(tokens)))
        return 2.0 if manifest == "new" else 1.5

    async def run() -> None:
        replay = Replay(
            pins, tmp_path / "a.txt", lambda text: list(text.encode()), nats, told.append, pause_s=0.0
        )
        task = asyncio.create_task(replay.run())
        while len(told) < 2:
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(asyncio.wait_for(run(), 30))
    assert told == [0.5, 0.5]
    assert [manifest for manifest, _ in asked_of] == ["old", "new"] * 2 and asked_of[0][1] == asked_of[1][1]
