"""`expertmesh k8s ...`: the charts rendered, held against a cluster, and what a cluster lacks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.markup import escape
from rich.table import Table

from cluster.errors import ExpertmeshError
from workloads.console import console, err, show_mistake
from workloads.options import Json

if TYPE_CHECKING:
    from workloads.k8s_api import HttpApi
    from workloads.k8s_render import Wanted

k8s_app = typer.Typer(help="The mesh on Kubernetes.", no_args_is_help=True)
out = console()

# As `diff` and `kubectl diff` have it: 1 is an answer, so a mistake is 2.
DIFFERENT: Final = 1
MISTAKE: Final = 2

Charts = Annotated[
    list[str] | None, typer.Argument(help="serve, learn, operator (default: all).", show_default=False)
]
Overlay = Annotated[
    str | None, typer.Option("--overlay", "-o", help="Values of k8s/overlays: dev, gpu or mixed.")
]
Values = Annotated[
    list[Path] | None, typer.Option("--values", "-f", help="File of values; may be repeated, the last wins.")
]
Sets = Annotated[list[str] | None, typer.Option("--set", help="One value, such as image.tag=0.2.0.")]
Release = Annotated[
    str | None, typer.Option("--release", help="Name of the release (default: expertmesh-CHART).")
]
Source = Annotated[
    Path | None, typer.Option("--source", help="Folder with helm/ and k8s/ (default: beside the program).")
]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Kubernetes namespace.")]
Kubeconfig = Annotated[
    Path | None, typer.Option("--kubeconfig", help="File (default: KUBECONFIG, else ~/.kube/config).")
]
Context = Annotated[str | None, typer.Option("--context", help="Of the kubeconfig.")]


@k8s_app.command()
def render(
    charts: Charts = None,
    overlay: Overlay = None,
    values: Values = None,
    sets: Sets = None,
    release: Release = None,
    namespace: Namespace = None,
    kube_version: Annotated[
        str | None, typer.Option("--kube-version", help="Kubernetes that it is for (default: helm's own).")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write CHART.yaml into.")] = None,
    source: Source = None,
) -> None:
    """Show the manifests that the charts make of values; needs helm and no cluster."""
    from workloads.k8s_render import render as rendered
    from workloads.k8s_render import sources, written

    root = sources(source)
    wanted = _wanted(root, charts, overlay, values, sets, release, namespace, kube_version)
    texts = {one.chart: rendered(root, one) for one in wanted}
    if output is None:
        print("".join(texts.values()), end="")
        return
    for file in written(output, texts):
        err.print(str(file), highlight=False, soft_wrap=True)


@k8s_app.command()
def diff(
    charts: Charts = None,
    overlay: Overlay = None,
    values: Values = None,
    sets: Sets = None,
    release: Release = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    source: Source = None,
) -> None:
    """Show what installing or upgrading would change in the cluster; exit code 1 if anything, 2 for a mistake."""
    try:
        count = _print_changes(charts, overlay, values, sets, release, namespace, kubeconfig, context, source)
    except ExpertmeshError as error:
        show_mistake(error)
        raise typer.Exit(MISTAKE) from None
    if count:
        raise typer.Exit(DIFFERENT)


def _print_changes(
    charts: list[str] | None,
    overlay: str | None,
    values: list[Path] | None,
    sets: list[str] | None,
    release: str | None,
    namespace: str | None,
    kubeconfig: Path | None,
    context: str | None,
    source: Path | None,
) -> int:
    from workloads.k8s_diff import changes
    from workloads.k8s_render import documents, sources
    from workloads.k8s_render import render as rendered

    root = sources(source)
    wanted = _wanted(root, charts, overlay, values, sets, release, namespace, None)
    texts = [(one, rendered(root, one)) for one in wanted]
    api, count = _connected(kubeconfig, context), 0
    for one, text in texts:
        for change in changes(api, documents(text), one.namespace, one.name):
            count += 1
            print(change.text, end="")
            err.print(f"{change.action} {change.kind} {change.name}", highlight=False, soft_wrap=True)
    return count


@k8s_app.command()
def doctor(
    namespace: Namespace = None,
    secret: Annotated[str, typer.Option(help="Secret with the API keys.")] = "expertmesh-keys",
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    json_: Json = False,
) -> None:
    """Check a cluster: KubeRay, GPUs, storage, permissions, keys; says what to mend, exit code 1 if it must be."""
    from workloads.k8s_doctor import Asked, as_json, as_table, findings
    from workloads.k8s_render import NAMESPACE

    api = _connected(kubeconfig, context)
    asked = Asked(namespace or NAMESPACE, secret)
    found = list(findings(api, asked))
    if json_:
        print(json.dumps(as_json(api.server, asked, found), indent=2))
    else:
        out.print(f"{api.server}, namespace {asked.namespace}", highlight=False, soft_wrap=True)
        out.print(as_table(found))
    if any(one.status == "fail" for one in found):
        raise typer.Exit(1)


@k8s_app.command()
def nodes(kubeconfig: Kubeconfig = None, context: Context = None, json_: Json = False) -> None:
    """Show what a cluster has for hosts: nodes by class, their capacity and taints, and those that will not stay."""
    from cluster.kube_inventory import class_rows, node_classes
    from cluster.kube_objects import read_node
    from workloads.k8s_doctor import items

    found = node_classes(map(read_node, items(_connected(kubeconfig, context), "/api/v1/nodes")))
    if json_:
        print(json.dumps([asdict(one) for one in found], indent=2))
        return
    heads, *rows = class_rows(found)
    table = Table(*heads)
    for row in rows:
        table.add_row(*map(escape, row))
    out.print(table)


@k8s_app.command()
def submit(
    manifest: Annotated[Path, typer.Argument(help="YAML of a RayJob.")],
    name: Annotated[str, typer.Option(envvar="JOB_NAME", help="Of the RayJob; one that is there is joined.")],
    uid: Annotated[
        str | None,
        typer.Option(envvar="JOB_UID", help="Of the Job of that name, which the RayJob goes with."),
    ] = None,
    namespace: Namespace = None,
    wait: Annotated[bool, typer.Option(help="Until the RayJob has ended; exit code 1 if it failed.")] = True,
    timeout: Annotated[float, typer.Option(help="Longest wait in seconds.")] = 86400.0,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Create a RayJob once and wait for its end, as the CronJob of expertmesh-learn does; exit code 1 if it failed."""
    import yaml

    from cluster.kube_errors import KubeError
    from workloads.k8s_submit import Owner, RayJobError, await_end, ray_job
    from workloads.k8s_submit import submit as submitted

    try:
        found = yaml.safe_load(manifest.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RayJobError(f"{manifest} can't be read: {error}", "give the YAML file of a RayJob") from error
    try:
        api = _connected(kubeconfig, context)
        place = namespace or api.namespace
        job = ray_job(found or {}, name, place, Owner(name, uid) if uid else None)
        made = submitted(api, job)
        out.print(f"{name} {'is created' if made else 'is there already'}", highlight=False)
        if not wait:
            return
        ended = await_end(
            api, place, name, timeout, lambda said: out.print(said, highlight=False, soft_wrap=True)
        )
    except KubeError as error:
        # Of the cluster, not of the round: the Job that runs this may try again.
        show_mistake(error)
        raise typer.Exit(MISTAKE) from None
    if not ended.succeeded:
        raise RayJobError(
            f"the RayJob {name} failed: {ended.said}", f"kubectl -n {place} describe rayjob {name}"
        )
    out.print(f"{name} has ended: {ended.said}", highlight=False, soft_wrap=True)


def _wanted(
    root: Path,
    charts: list[str] | None,
    overlay: str | None,
    values: list[Path] | None,
    sets: list[str] | None,
    release: str | None,
    namespace: str | None,
    kube_version: str | None,
) -> list[Wanted]:
    """What is to be rendered. HelmError for what does not go together."""
    from workloads.k8s_render import CHARTS, NAMESPACE, HelmError, Wanted

    names = charts or [one for one in CHARTS if (root / "helm" / f"expertmesh-{one}").is_dir()]
    for name in names:
        if name not in CHARTS:
            raise HelmError(f"there is no chart {name}", f"charts are {', '.join(CHARTS)}")
    if len(names) > 1:
        for given, option in ((values, "--values"), (sets, "--set"), (release, "--release")):
            if given:
                raise HelmError(f"{option} is of one chart", f"name it, such as: {names[0]} {option} ...")
    return [
        Wanted(
            name,
            overlay,
            tuple(values or ()),
            tuple(sets or ()),
            release,
            namespace or NAMESPACE,
            kube_version,
        )
        for name in names
    ]


def _connected(kubeconfig: Path | None, context: str | None) -> HttpApi:
    from workloads.k8s_api import connect

    return connect(kubeconfig, context)
