"""From one version to another in a replica of the router, over an engine that only notes what it is told."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from actors.dense_files import DenseFiles
from actors.outages import MANIFEST
from actors.pinning import PIN, Pin, Pinned, PinnedInputs, Pins, fingerprint, salted_anew
from actors.version_swap import VersionSwap
from cluster.errors import VersionError
from cluster.live_versions import HEADER, LiveVersions, serving, with_shares, with_version
from cluster.messages import StoreAddress
from cluster.versions.store import Store

BASE = LiveVersions("base", {"base": {}})
EXPERTS = with_version(BASE, "experts", {0: {0: "a"}}, {0: 4})


class Engine:
    """What it is told, in order."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[float]:
        self.told.append((method, *args))
        return [0.0]

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.told.append(("pause", mode, clear_cache))

    async def resume_generation(self) -> None:
        self.told.append("resume")


class World:
    def __init__(self, folder: Path) -> None:
        self.store = Store(str(folder))
        self.pins, self.engine = Pins(), Engine()
        self.dense = DenseFiles(StoreAddress(str(folder)))
        self.swap = VersionSwap(self.pins, self.dense, lambda: self.engine)

    def with_router(self) -> LiveVersions:
        """Live beside the base, with a router of its own."""
        blob, _ = self.store.blobs.put(b"router")
        versions = with_version(BASE, "router", {}, {0: 4}, {"gate": blob})
        self.dense.fetch(versions)
        return versions


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_where_only_experts_differ_the_next_request_gets_the_other_version(world: World) -> None:
    async def run() -> None:
        await world.swap.to(EXPERTS)
        first = await world.pins.enter("")
        await world.swap.to(serving(EXPERTS, "experts"))
        second = await world.pins.enter("")
        assert (first.manifest, second.manifest) == ("base", "experts") and world.engine.told == []
        assert world.pins.running == {"base": 1, "experts": 1}
        world.pins.leave(first)
        assert world.pins.running == {"experts": 1}

    asyncio.run(run())


def test_the_engines_own_tensors_change_when_no_request_of_the_version_before_runs(world: World) -> None:
    versions = world.with_router()

    async def run() -> None:
        await world.swap.to(versions)
        running = await world.pins.enter("")
        await world.swap.to(serving(versions, "router"))
        held = asyncio.create_task(world.pins.enter(""))
        await asyncio.sleep(0)
        assert not held.done() and world.engine.told == []
        world.pins.leave(running)
        assert (await asyncio.wait_for(held, 5)).manifest == "router"
        ((method, files, _),) = world.engine.told
        assert method == "expertmesh_use_dense" and Path(files["gate"]).read_bytes() == b"router"

    asyncio.run(run())
    world.dense.close()


def test_a_version_with_other_numbers_of_experts_waits_as_well(world: World) -> None:
    versions = with_version(BASE, "less", {}, {0: 4}, retired={0: (1,)})

    async def run() -> None:
        await world.swap.to(versions)
        running = await world.pins.enter("")
        assert not world.swap.can_now(serving(versions, "less"))
        await world.swap.to(serving(versions, "less"))
        held = asyncio.create_task(world.pins.enter(""))
        await asyncio.sleep(0)
        assert not held.done() and world.engine.told == []
        world.pins.leave(running)
        assert (await asyncio.wait_for(held, 5)).manifest == "less"
        assert world.engine.told == [("expertmesh_use_dense", {}, {0: [1]})]
        assert world.swap.can_now(serving(versions, "less"))

    asyncio.run(run())


def test_going_back_before_the_change_lets_those_in_that_waited(world: World) -> None:
    versions = world.with_router()

    async def run() -> None:
        await world.swap.to(versions)
        await world.pins.enter("")
        await world.swap.to(serving(versions, "router"))
        held = asyncio.create_task(world.pins.enter(""))
        await asyncio.sleep(0)
        await world.swap.to(serving(versions, "base"))
        assert (await asyncio.wait_for(held, 5)).manifest == "base" and world.engine.told == []

    asyncio.run(run())
    world.dense.close()


def test_running_requests_go_on_with_the_other_version_where_that_was_chosen(world: World) -> None:
    versions = world.with_router()

    async def run() -> None:
        await world.swap.to(versions)
        running = await world.pins.enter("")
        await world.swap.to(serving(versions, "router", continue_running=True))
        names = [told[0] if isinstance(told, tuple) else told for told in world.engine.told]
        assert names == ["pause", "expertmesh_use_dense", "expertmesh_go_on_with", "resume"]
        assert world.engine.told[0] == ("pause", "keep", True)
        assert world.engine.told[2][1] == {"base": "router"}
        assert (await world.pins.enter("")).manifest == running.manifest == "router"
        # What goes back is of the version that computes it.
        assert world.pins.running == {"router": 2} and fingerprint(running.manifest) == b"expertmesh-router"

    asyncio.run(run())
    world.dense.close()


def test_a_tensor_that_is_missing_is_an_error_before_anything_changes(world: World) -> None:
    versions = world.with_router()
    world.dense.close()
    world.store.blobs.remove(versions.dense["router"]["gate"])
    with pytest.raises(VersionError, match="has no blobs/"):
        world.dense.fetch(versions)


def test_files_of_versions_that_are_gone_are_removed(world: World) -> None:
    versions = world.with_router()
    (path,) = world.dense.paths(versions, "router").values()
    world.dense.fetch(BASE)
    assert not Path(path).exists()
    world.dense.close()


def test_a_request_on_its_way_to_the_engine_names_the_version_that_it_goes_on_with(world: World) -> None:
    """It was admitted before, and would be handed over after the engine was told whose requests go on."""
    given = Request(None, Params(None))
    handed = asyncio.Event()

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await handed.wait()
        PinnedInputs(Inputs(given), world.pins).process_inputs()

    async def nothing(*_: Any) -> Any:
        return {"type": "http.request"}

    async def told(method: str, args: tuple[Any, ...] = ()) -> list[float]:
        handed.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return [0.0]

    async def run() -> None:
        await world.swap.to(EXPERTS)
        scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
        request = asyncio.create_task(Pinned(application, world.pins)(scope, nothing, nothing))
        await asyncio.sleep(0)
        world.engine.collective_rpc = told  # type: ignore[method-assign]
        await world.swap.to(serving(EXPERTS, "experts", continue_running=True))
        await request

    asyncio.run(run())
    assert given.sampling_params.extra_args == {MANIFEST: "experts"} and given.cache_salt == "experts:"


class Request:
    def __init__(self, cache_salt: str | None, params: Any) -> None:
        self.cache_salt, self.sampling_params = cache_salt, params


class Params:
    def __init__(self, extra_args: dict[str, Any] | None) -> None:
        self.extra_args = extra_args


class Inputs:
    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokenizer = "vLLM's"

    def process_inputs(self, *args: Any) -> Request:
        return self.request

    async def process_inputs_async(self, *args: Any) -> Request:
        return self.request


def test_an_answer_names_its_version_and_the_engine_is_told() -> None:
    pins = Pins()
    pins.use(BASE)
    given = Request("mine", Params({"other": 1, MANIFEST: "forged"}))
    inputs = PinnedInputs(Inputs(given), pins)
    assert inputs.tokenizer == "vLLM's"
    sent: list[Message] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        pins.use(serving(EXPERTS, "experts"))  # after this request came in
        await inputs.process_inputs_async("request")
        body = f'{{"system_fingerprint": "{pins.placeholder}"}}'
        await PlainTextResponse(body)(scope, receive, send)

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request"}

    asyncio.run(
        Pinned(application, pins)(
            {"type": "http", "method": "POST", "path": "/v1/completions"}, receive, send
        )
    )
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    assert headers[HEADER] == "base" and sent[1]["body"] == b'{"system_fingerprint": "expertmesh-base"}'
    assert given.cache_salt == "base:mine" and given.sampling_params.extra_args == {
        "other": 1,
        MANIFEST: "base",
    }
    assert not pins.busy and pins.current() == "experts", "outside of a request"
    assert salted_anew(given.cache_salt, "experts") == "experts:mine"
    inputs.process_inputs()
    assert given.sampling_params.extra_args[MANIFEST] == "experts", "such as a probe"


def test_a_request_gets_its_version_by_lot_and_says_how_probable_that_was() -> None:
    lots = iter([0.1, 0.9, 0.1])
    pins = Pins(lot=lambda: next(lots))
    shares = {"text/short": {"base": 0.25, "experts": 0.75}, "": {"base": 1.0}}
    pins.use(with_shares(EXPERTS, shares))
    seen: list[tuple[str, str, float | None]] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["body"] == b"{}"
        pin = scope[PIN]
        seen.append((pins.current(), pin.context, pin.propensity))

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Message) -> None:
        raise AssertionError

    async def ask(path: str) -> None:
        scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        await Pinned(application, pins)(scope, receive, send)

    for path in ("/v1/completions", "/v1/completions", "/v1/chat/completions"):
        asyncio.run(ask(path))
    pins.use(EXPERTS)
    asyncio.run(ask("/v1/completions"))
    assert seen == [
        ("base", "text/short", 0.25),
        ("experts", "text/short", 0.75),
        ("base", "chat/short", 1.0),
        ("base", "", None),
    ]


def test_a_request_that_goes_on_with_another_version_says_nothing_of_either() -> None:
    pins = Pins(lot=lambda: 0.9)
    pins.use(with_shares(EXPERTS, {"": {"base": 0.5, "experts": 0.5}}))
    pin = asyncio.run(pins.enter("", "text/short"))
    assert isinstance(pin, Pin) and pin.propensity == 0.5
    pins.go_on({"experts": "base"})
    assert (pin.manifest, pin.propensity) == ("base", None)


def test_a_fingerprint_is_as_long_as_what_it_takes_the_place_of() -> None:
    pins = Pins()
    assert len(fingerprint("ab" * 32)) == len(pins.placeholder)
