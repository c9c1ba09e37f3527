"""`expertmesh versions ...`: what the store of versions holds, and how something gets into it and out of it."""

from __future__ import annotations

import getpass
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.checkpoint import Checkpoint
from cluster.config import Config, load_config
from cluster.config_mistakes import BadValue
from cluster.config_values import parse_duration
from cluster.errors import VersionError
from workloads.console import console, err
from workloads.options import ConfigFile, Json, Model

if TYPE_CHECKING:
    from cluster.versions.store import Store

versions_app = typer.Typer(help="Versions of the model, expert by expert.", no_args_is_help=True)
out = console()

StoreUrl = Annotated[str | None, typer.Option("--store", help="Folder or URL (default: versions.store).")]
Version = Annotated[
    str, typer.Argument(help="Alias, digest, or how a digest begins.", metavar="VERSION", show_default=False)
]


@versions_app.command("list")
def list_(
    config: ConfigFile = None, model: Model = None, store: StoreUrl = None, json_: Json = False
) -> None:
    """All versions, the latest first, and where aliases point."""
    from cluster.versions.views import listing
    from workloads.version_views import list_view

    found = listing(_store(_config(config, model, store)))
    if json_:
        print(json.dumps(found, indent=2))
    else:
        out.print(list_view(found))


@versions_app.command()
def show(
    version: Version,
    config: ConfigFile = None,
    model: Model = None,
    store: StoreUrl = None,
    json_: Json = False,
) -> None:
    """One version: where it comes from, what it changes, whether all of it is there and signed."""
    from cluster.versions.views import about
    from workloads.version_views import about_view

    settings = _config(config, model, store)
    kept = _store(settings)
    key = settings.versions.public_key
    found = about(kept, kept.find(version), Path(key).expanduser() if key else None)
    if json_:
        print(json.dumps(found, indent=2))
    else:
        out.print(about_view(found))


@versions_app.command()
def diff(
    version: Version,
    other: Annotated[
        str, typer.Argument(help="What it is compared with (default: its parent).", show_default=False)
    ] = "",
    config: ConfigFile = None,
    model: Model = None,
    store: StoreUrl = None,
    json_: Json = False,
) -> None:
    """Which experts and tensors differ between two versions."""
    from cluster.versions.views import difference
    from workloads.version_views import diff_view

    kept = _store(_config(config, model, store))
    found = difference(kept, kept.find(version), kept.find(other) if other else None)
    if json_:
        print(json.dumps(found, indent=2))
    else:
        out.print(diff_view(found))


@versions_app.command()
def publish(
    source: Annotated[
        Path | None,
        typer.Argument(
            help="Checkpoint folder, or *.safetensors with what changed (default: the base itself)."
        ),
    ] = None,
    parent: Annotated[
        str | None, typer.Option(help="Version that it is made from (default: where versions.alias points).")
    ] = None,
    author: Annotated[str | None, typer.Option(help="Who made it (default: your login).")] = None,
    reason: Annotated[str, typer.Option(help="What for.")] = "",
    metric: Annotated[
        list[str] | None, typer.Option(help="What was measured, as name=number; may be repeated.")
    ] = None,
    clone: Annotated[
        list[str] | None,
        typer.Option(help="Expert that is to be there twice, as LAYER:EXPERT; may be repeated."),
    ] = None,
    retire: Annotated[
        list[str] | None,
        typer.Option(help="Expert that is not to be used any more, as LAYER:EXPERT; may be repeated."),
    ] = None,
    config: ConfigFile = None,
    model: Model = None,
    store: StoreUrl = None,
    json_: Json = False,
) -> None:
    """Put a version into the store: the experts and tensors that changed, and a manifest. Nothing serves it yet."""
    from cluster.versions.growth import ExpertId
    from cluster.versions.publish import Published, publish_base
    from cluster.versions.publish import publish as publish_

    clones, retired = ([ExpertId.parse(text) for text in given or ()] for given in (clone, retire))
    settings = _config(config, model, store)
    checkpoint = _checkpoint(settings)
    kept = _store(settings, checkpoint)
    if source is None and not clones and not retired:
        made = Published(publish_base(kept, checkpoint))
    else:
        made = publish_(
            kept,
            checkpoint,
            source.expanduser() if source is not None else None,
            clones=clones,
            retired=retired,
            parent=kept.find(parent) if parent else _served(kept, settings.versions.alias),
            author=getpass.getuser() if author is None else author,
            reason=reason,
            metrics=_metrics(metric or []),
        )
    if json_:
        print(json.dumps(asdict(made), indent=2))
        return
    experts = sum(map(len, made.changed.values()))
    out.print(
        f"{made.digest}\n  {experts} experts and {len(made.changed_dense)} tensors changed; "
        f"{made.new_blobs} blobs new, {made.reused_blobs} there before, {made.bytes_written} bytes written",
        highlight=False,
        soft_wrap=True,
    )


@versions_app.command()
def sign(
    version: Version,
    key: Annotated[Path, typer.Option(help="Private key on an elliptic curve, in PEM.")],
    password: Annotated[
        str | None, typer.Option(envvar="EXPERTMESH_KEY_PASSWORD", help="The key's, if it has one.")
    ] = None,
    config: ConfigFile = None,
    model: Model = None,
    store: StoreUrl = None,
) -> None:
    """Sign a version, in place of any earlier signature."""
    from cluster.versions.signing import sign_manifest

    kept = _store(_config(config, model, store))
    digest = kept.find(version)
    sign_manifest(kept, digest, key.expanduser(), password)
    out.print(f"{digest} is signed", highlight=False, soft_wrap=True)


@versions_app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    min_age: Annotated[str, typer.Option(help="Nothing younger goes, such as 90s or 2h.")] = "24h",
    history: Annotated[
        int | None, typer.Option(min=1, help="Moves of each alias that are kept (default: versions.history).")
    ] = None,
    config: ConfigFile = None,
    model: Model = None,
    store: StoreUrl = None,
    json_: Json = False,
) -> None:
    """Take out of the store what no alias points to or pointed to lately, and what does not run."""
    from cluster.versions.collect import collect
    from workloads.config_view import show_size

    settings = _config(config, model, store)
    try:
        min_age_s = parse_duration(min_age)
    except BadValue as error:
        raise typer.BadParameter(str(error), param_hint="--min-age") from None
    found = collect(
        _store(settings),
        running_versions(settings),
        history=history or settings.versions.history,
        min_age_s=min_age_s,
        dry_run=dry_run,
    )
    if json_:
        print(json.dumps(asdict(found), indent=2))
        return
    out.print(
        f"{'would free' if dry_run else 'freed'} {show_size(found.bytes)}: {len(found.manifests)} versions, "
        f"{len(found.blobs)} blobs, {found.unfinished} unfinished files; "
        f"{found.kept_manifests} versions and {found.kept_blobs} blobs stay",
        highlight=False,
        soft_wrap=True,
    )


def running_versions(config: Config) -> frozenset[str]:
    """Digests of the versions that the running mesh has loaded or is loading; none if no mesh runs."""
    from workloads import run_file
    from workloads.running import NotRunningError, running_controller

    found: set[str] = set()
    # A cluster that does not answer is an error: what it needs must not go.
    for url in [run.url for run in run_file.running()] if config.ray.address == "local" else [None]:
        try:
            with running_controller(config, url) as controller:
                if controller.ask("deployment") is not None:
                    found |= controller.ask("versions").needed
        except NotRunningError:
            continue
    return frozenset(found)


def configured(file: Path | None) -> Config:
    """The configuration, without what flags of the store may say."""
    return _config(file, None, None)


def _config(file: Path | None, model: str | None, store: str | None) -> Config:
    names = {"model.path": "--model", "versions.store": "--store"}
    return load_config(file, {"model.path": model, "versions.store": store}, os.environ, names).config


def _checkpoint(config: Config) -> Checkpoint:
    from workloads.progress import stages
    from workloads.serve import open_model

    with stages(err) as progress:
        return open_model(config, progress)[0]


def _store(config: Config, checkpoint: Checkpoint | None = None) -> Store:
    # fsspec and what it finds installed take their time to import.
    from cluster.versions.store import Store

    # Only where there is none of its own does the model say which store it is.
    model = "" if config.versions.store else (checkpoint or _checkpoint(config)).digest
    return Store(config.versions.url(model), config.versions.options)


def _served(store: Store, alias: str) -> str:
    """The version that the alias points to; "", the base checkpoint, if it never did."""
    move = store.aliases.current(alias)
    return move.manifest if move else ""


def _metrics(given: list[str]) -> dict[str, float]:
    found = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise VersionError(f"--metric {text} says no number", "write it as loss=1.25") from None
    return found
