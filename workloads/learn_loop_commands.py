"""`expertmesh learn serve` and `learn status`: the loop that learns while the mesh serves."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cluster.config import Config
from cluster.errors import LearningError
from workloads.console import err
from workloads.learn_commands import learn_app as learn_app
from workloads.learn_parts import (
    StoreUrl,
    StreamUrl,
    configured,
    open_stream,
    out,
    ray_for_training,
    workshop_of,
)
from workloads.options import ConfigFile, Json, Model

if TYPE_CHECKING:
    from cluster.learning.journal import Round
    from cluster.versions.files import Files
    from workloads.learn_bandit import Bandit
    from workloads.learn_loop import Loop
    from workloads.learn_readers import Reader
    from workloads.learn_serving import Pausing, Serving
    from workloads.learn_status import Teller
    from workloads.learn_workshop import Progress, Workshop

# How often an idle loop looks for new shards, and a trial's verdict is asked for.
_LOOK_S: Final = 1.0
_BUSY_S: Final = 0.5


@learn_app.command()
def serve(
    once: Annotated[bool, typer.Option("--once", help="End with the next round.")] = False,
    until_idle: Annotated[
        bool, typer.Option("--until-idle", help="End when there is nothing to be learnt.")
    ] = False,
    publish_only: Annotated[
        bool, typer.Option("--publish-only", help="Publish what passes the gate, and serve nothing of it.")
    ] = False,
    url: Annotated[
        str | None, typer.Option("--url", help="Server to learn beside (default: the one that runs here).")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port of 127.0.0.1 for Prometheus' series of how learning goes."),
    ] = None,
    config: ConfigFile = None,
    model: Model = None,
    stream: StreamUrl = None,
    store: StoreUrl = None,
) -> None:
    """Learn what comes into the stream, round by round, and try out what passes the gate on the running server."""
    from cluster.learning.journal import Journal
    from cluster.versions.files import Files
    from workloads.learn_bandit import Bandit
    from workloads.learn_drift import DriftWatch
    from workloads.learn_loop import Loop
    from workloads.learn_metrics import LearningMetrics, Seen, served
    from workloads.learn_status import Teller
    from workloads.learn_work import MeshWork
    from workloads.logs import configure
    from workloads.progress import stages
    from workloads.serve import open_model

    settings = configured(config, model, stream, store)
    kept = open_stream(settings)
    with stages(err) as shown:
        checkpoint = open_model(settings, shown)[0]
        state = Files(settings.learning.state_url(checkpoint.digest), **settings.learning.options)
        metrics = LearningMetrics()
        with (
            alone(state),
            served(metrics, metrics_port),
            beside(settings, url, publish_only) as (server, pausing, beside_url),
        ):
            configure(settings.log_level)
            teller = Teller(state)
            progress = _unhurried(shown, teller, pausing)
            workshop = workshop_of(settings, checkpoint, progress, pausing)
            # What can't be done is told before anything is begun.
            if server is not None:
                check_clones(settings)
            workshop.serving()
            workshop.check_room()
            work = MeshWork(workshop, kept, server)
            watch = DriftWatch(
                state,
                kept,
                work.held_upto,
                workshop.serving,
                _reader(settings, workshop, beside_url, progress),
                settings.learning,
            )
            loop = Loop(Journal(state), kept, work, settings.learning, drift=watch)
            bandit = Bandit(state, kept, settings.learning.bandit, server) if server is not None else None
            if settings.learning.training.gentle:
                _give_way(settings)

            def look() -> bool:
                busy = loop.look()
                metrics.seen = Seen(loop.state, loop.waiting, watch.state)
                return busy

            metrics.seen = Seen(loop.state, {}, watch.state)
            try:
                _run(loop, look, teller, bandit, once=once, until_idle=until_idle)
            finally:
                teller("not running", 1.0, loop.waits_for)


@learn_app.command()
def status(
    config: ConfigFile = None, model: Model = None, stream: StreamUrl = None, json_: Json = False
) -> None:
    """How far the loop is: what waits, what became of the last rounds and why, and what it is doing."""
    from cluster.versions.files import Files
    from workloads.learn_status import as_json, as_text, status_of
    from workloads.progress import stages
    from workloads.serve import open_model

    settings = configured(config, model, stream)
    digest = ""
    if not settings.learning.state:
        with stages(err) as shown:
            digest = open_model(settings, shown)[0].digest
    files = Files(settings.learning.state_url(digest), **settings.learning.options)
    found = status_of(files, open_stream(settings), settings.learning)
    if json_:
        print(json.dumps(as_json(found), indent=2))
        return
    text, domains, rounds = as_text(found, time.time())
    out.print(text or "nothing was learnt yet", highlight=False, soft_wrap=True)
    out.print(domains)
    if rounds is not None:
        out.print(rounds)


def check_clones(config: Config) -> None:
    """LearningError if the server has no room for as many experts as training may add to a layer."""
    clones, spare = config.learning.training.clones, config.versions.spare_experts
    if clones > spare:
        raise LearningError(
            f"learning.training.clones is {clones}, and the server keeps room for {spare} more experts of a layer",
            f"set versions.spare_experts to {clones} and start the server again, or learn with --publish-only",
        )


@contextlib.contextmanager
def alone(state: Files) -> Iterator[None]:
    """For the block the only loop on this state, as far as this machine is concerned. LearningError if it is not."""
    from filelock import FileLock, Timeout

    if "://" in state.url:
        # There the journal tells the second one to write.
        yield
        return
    Path(state.url).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(state.url) / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise LearningError(
            f"another `expertmesh learn serve` runs on {state.url}",
            "one is enough; see `expertmesh learn status`",
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def beside(
    config: Config, url: str | None, publish_only: bool
) -> Iterator[tuple[Serving | None, Callable[[], bool], str]]:
    """For the block the server to try versions out on, if there is one, whether it has too much to do, and its URL."""
    from cluster.errors import ExpertmeshError
    from workloads import run_file
    from workloads.learn_serving import Pausing, Serving, requests_inside
    from workloads.running import NotRunningError, running_controller

    def pausing(of: str) -> Pausing:
        return Pausing(lambda: requests_inside(of), config.learning.pause_above)

    local = config.ray.address == "local"
    if local and not run_file.running() and url is None:
        if not publish_only:
            err.print("no server runs here: what passes the gate is published only", highlight=False)
        with ray_for_training(config):
            yield None, lambda: False, ""
        return
    with contextlib.ExitStack() as held:
        controller = None
        try:
            controller = held.enter_context(running_controller(config, url))
        except NotRunningError as error:
            if not publish_only or url is not None:
                raise ExpertmeshError(
                    error.message, "start a server, or learn with --publish-only"
                ) from error
        if controller is None:
            # A cluster that is there for learning alone, such as a RayJob's, has no server.
            held.enter_context(ray_for_training(config))
            yield None, lambda: False, ""
            return
        found = None if publish_only else Serving(controller)
        yield found, pausing(controller.url), controller.url


def _unhurried(shown: Progress, teller: Progress, pausing: Callable[[], bool]) -> Progress:
    """Progress that is also told to others, and takes its time while the server has much to do."""

    def progress(stage: str, fraction: float) -> None:
        shown(stage, fraction)
        teller(stage, fraction)
        while stage != "training" and pausing():
            teller(f"{stage}: waits for a quieter server", fraction)
            time.sleep(_BUSY_S)

    return progress


def _reader(config: Config, workshop: Workshop, url: str, progress: Progress) -> Reader:
    """Who reads texts: the server where there is one, or a machine would have to hold the model twice."""
    from actors.trainable_version import open_encoder
    from workloads.learn_readers import ServerReader, VersionReader

    if not url:
        return VersionReader(workshop)
    keys = config.server.api_keys
    key = keys[0].get_secret_value() if keys else os.environ.get("EXPERTMESH_API_KEY", "")
    encode = functools.cache(lambda: open_encoder(workshop.checkpoint))
    return ServerReader(
        url,
        key,
        lambda text: encode()(text),
        config.learning.gate.tokens,
        lambda: progress("looking for drift", 0.0),
    )


def _give_way(config: Config) -> None:
    """From here on this process takes the cores that nobody else wants."""
    import torch

    from actors import gentle_start

    torch.set_num_threads(config.learning.training.threads)
    gentle_start.give_way()


def _run(
    loop: Loop,
    look: Callable[[], bool],
    teller: Teller,
    bandit: Bandit | None,
    *,
    once: bool,
    until_idle: bool,
) -> None:
    ended = loop.state.rounds - (loop.state.now is not None)
    while True:
        if bandit is not None:
            bandit.look()
        busy = look()
        rounds = loop.state.rounds - (loop.state.now is not None)
        if rounds > ended:
            ended = rounds
            out.print(told(loop.state.past[-1]), highlight=False, soft_wrap=True)
            if once:
                return
        if busy:
            continue
        if loop.state.now is None and until_idle:
            return
        teller("on trial" if loop.state.now else "waits for samples", 0.0, loop.waits_for)
        time.sleep(_LOOK_S)


def told(past: Round) -> str:
    """A round's end, in a line."""
    from workloads.learn_status import bits_text

    bits = f", {bits_text(past)} bits per byte" if past.metrics else ""
    why = f": {'; '.join(past.reasons)}" if past.reasons else ""
    return f"round {past.number}, {past.samples} samples of {past.domain}{bits}: {past.phase}{why}"
