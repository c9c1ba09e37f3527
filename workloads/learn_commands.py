"""`expertmesh learn experts | run`: one domain, learnt by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from workloads.console import err
from workloads.learn_parts import (
    Beta,
    Length,
    Rate,
    Reach,
    Replay,
    Rows,
    Steps,
    StoreUrl,
    StreamUrl,
    Workers,
    configured,
    open_stream,
    out,
    ray_for_training,
    workshop_of,
)
from workloads.learn_stream_commands import learn_app as learn_app
from workloads.options import ConfigFile, Json, Model


@learn_app.command()
def experts(
    domain: Annotated[str, typer.Option(help="Domain of the stream that is to be learnt.")],
    against: Annotated[
        list[str] | None, typer.Option(help="Domain that is known; may be repeated (default: all others).")
    ] = None,
    reach: Annotated[
        float, typer.Option(help="Part of what is asked for more that the chosen make up, per layer.")
    ] = 0.2,
    tokens: Annotated[int, typer.Option(min=1, help="Counted of each side at most.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Of which texts are counted.")] = 0,
    png: Annotated[Path | None, typer.Option(help="Write a heat map there.")] = None,
    config: ConfigFile = None,
    model: Model = None,
    stream: StreamUrl = None,
    json_: Json = False,
) -> None:
    """Which experts a domain of the stream is about: those that are to learn it, and those to be cloned first."""
    from actors.trainable_version import open_encoder, open_version
    from workloads.learn_experts import (
        as_json,
        as_table,
        domains_of,
        experts_for,
        plot,
        samples_for,
    )
    from workloads.plots import check_plot
    from workloads.progress import stages
    from workloads.serve import open_model

    settings = configured(config, model, stream)
    if png is not None:
        check_plot(png)
    found_domains = domains_of(open_stream(settings), settings.learning.holdout)
    samples = samples_for(found_domains, domain, against or ())
    with stages(err) as progress:
        checkpoint = open_model(settings, progress)[0]
        progress("loading the model", 0.0)
        trainable, encode = open_version(checkpoint), open_encoder(checkpoint)
        found = experts_for(
            trainable,
            encode,
            samples,
            reach=reach,
            tokens=tokens,
            seed=seed,
            progress=progress,
        )
    if png is not None:
        plot(found, png)
    if json_:
        print(json.dumps(as_json(found)))
        return
    out.print(as_table(found))
    out.print(
        f"{len(found.chosen)} of {found.experts} experts ({found.share:.1%}), by {found.tokens[0]} tokens of "
        f"{domain} and {found.tokens[1]} of {', '.join(found.against)}",
        highlight=False,
        soft_wrap=True,
    )


@learn_app.command()
def run(
    domain: Annotated[str, typer.Option(help="Domain of the stream that is to be learnt.")],
    against: Annotated[
        list[str] | None, typer.Option(help="Domain that is known; may be repeated (default: all others).")
    ] = None,
    reach: Reach = None,
    steps: Steps = None,
    rows: Rows = None,
    length: Length = None,
    replay: Replay = None,
    rate: Rate = None,
    beta: Beta = None,
    workers: Workers = None,
    seed: Annotated[int, typer.Option(help="Of all that is by lot.")] = 0,
    config: ConfigFile = None,
    model: Model = None,
    stream: StreamUrl = None,
    store: StoreUrl = None,
    json_: Json = False,
) -> None:
    """Learn a domain of the stream: choose experts, train them, and publish what passes the gate."""
    from workloads.learn_run import learn, material_of, outcome_json, outcome_text
    from workloads.progress import stages
    from workloads.serve import open_model

    settings = configured(
        config,
        model,
        stream,
        store,
        reach=reach,
        steps=steps,
        rows=rows,
        length=length,
        replay=replay,
        rate=rate,
        beta=beta,
        workers=workers,
    )
    learning = settings.learning
    kept = open_stream(settings)
    material = material_of(kept, learning.holdout, domain, against or (), learning.gate.fewest)
    with stages(err) as progress:
        checkpoint = open_model(settings, progress)[0]
        with ray_for_training(settings):
            outcome = learn(workshop_of(settings, checkpoint, progress), material, seed)
    if json_:
        print(json.dumps(outcome_json(outcome)))
    else:
        out.print(outcome_text(outcome), highlight=False, soft_wrap=True)
    if not outcome.verdict.passed:
        raise typer.Exit(1)
