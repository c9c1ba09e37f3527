"""The command line: `expertmesh serve`, and all that is asked of a served model.

Importing this module loads neither torch nor Ray: commands import what they need, so that `--help`
and mistakes in the configuration answer at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.config import LoadedConfig, load_config
from cluster.errors import ExpertmeshError
from workloads.bench.chaos_cli import chaos_app
from workloads.bench.learn_cli import bench_app
from workloads.console import console, err, show_mistake
from workloads.k8s_commands import k8s_app
from workloads.learn_bandit_commands import learn_app
from workloads.live_version_commands import versions_app
from workloads.models.cli import model_app
from workloads.operator import operator
from workloads.options import ConfigFile, Json

app = typer.Typer(
    name="expertmesh",
    help="Run a mixture-of-experts language model as a mesh of experts in Ray actors.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
config_app = typer.Typer(help="The configuration.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(model_app, name="model")
app.add_typer(versions_app, name="versions")
app.add_typer(learn_app, name="learn")
app.add_typer(bench_app, name="bench")
app.add_typer(chaos_app, name="chaos")
app.add_typer(k8s_app, name="k8s")
app.command()(operator)

out = console()

Model = Annotated[str | None, typer.Option("--model", "-m", help="Checkpoint folder, or 'default'.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Hosts = Annotated[int | None, typer.Option("--hosts", help="Number of expert hosts in the first group.")]
Address = Annotated[str | None, typer.Option("--address", help="Ray cluster: local, auto or ip:port.")]
Url = Annotated[
    str | None, typer.Option("--url", help="Server to talk to (default: the one that runs here).")
]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", envvar="EXPERTMESH_API_KEY", help="API key, if one is set.")
]

_FLAGS = {"hosts.0.count": "--hosts", "ray.address": "--address"}


@app.command()
def serve(
    config: ConfigFile = None,
    model: Model = None,
    dtype: Dtype = None,
    hosts: Hosts = None,
    address: Address = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Serve a model with its experts in Ray actors, until Ctrl-C."""
    loaded = _load(
        config,
        model,
        dtype,
        hosts,
        address,
        {"server.host": host, "server.port": port, "log_level": log_level},
    )
    from workloads.logs import configure
    from workloads.progress import stages
    from workloads.serve import interruptible, serving

    configure(loaded.config.log_level)
    with interruptible() as stop, stages(err, stop) as progress, serving(loaded.config, progress) as server:
        progress.close()
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in server.breakdown.seconds.items())
        out.print(f"start to ready {server.breakdown.total:.1f} s ({parts})", highlight=False)
        out.print(
            f"[bold green]ready[/] {server.url}/v1  model {server.served_name}  "
            f"experts on {len(server.blueprint.deployment.hosts)} host(s)",
            highlight=False,
        )
        if server.admin_url:
            out.print(f"  versions are administered at {server.admin_url}/docs", highlight=False)
        out.print(f"  expertmesh chat   or   curl {server.url}/v1/models   Ctrl-C ends it", highlight=False)
        while not stop.wait(1.0):
            pass
        err.print("stopping ...")


@app.command()
def plan(
    config: ConfigFile = None,
    model: Model = None,
    dtype: Dtype = None,
    hosts: Hosts = None,
    address: Address = None,
    ray_cluster: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="On the nodes of a RayCluster or RayService that `helm template` printed."
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Show which host would hold which experts; starts nothing of the mesh."""
    from cluster.ray_cluster import local_node
    from workloads.config_view import plan_json, plan_table
    from workloads.deploy import blueprint
    from workloads.engine_resources import engine_memory, engine_needs
    from workloads.progress import stages
    from workloads.serve import open_model

    loaded = _load(config, model, dtype, hosts, address, {})
    with stages(err) as progress:
        checkpoint, dtype_name, name = open_model(loaded.config, progress)
    nodes: tuple[Any, ...]
    if ray_cluster is not None:
        from cluster.ray_cluster_manifest import read_nodes

        nodes = read_nodes(ray_cluster)
    elif loaded.config.ray.address == "local":
        nodes = (local_node(),)
    else:
        from cluster.ray_cluster import connected
        from cluster.ray_cluster import nodes as cluster_nodes

        with connected(loaded.config.ray):
            nodes = cluster_nodes()
    placed = blueprint(loaded.config, checkpoint, dtype_name, name, nodes)
    if json_:
        print(json.dumps(plan_json(placed.plan, placed.slots, nodes), indent=2))
        return
    out.print(plan_table(placed.plan, placed.slots, nodes))
    if engine_memory(loaded.config, checkpoint, dtype_name):
        out.print(engine_needs(loaded.config, checkpoint, dtype_name), highlight=False)


@config_app.command("show")
def config_show(
    config: ConfigFile = None,
    model: Model = None,
    dtype: Dtype = None,
    hosts: Hosts = None,
    address: Address = None,
) -> None:
    """Print the effective values and where each came from."""
    from workloads.config_view import config_table

    out.print(config_table(_load(config, model, dtype, hosts, address, {})))


@app.command()
def chat(
    message: Annotated[
        str | None, typer.Argument(help="One question; without it a conversation starts.")
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
) -> None:
    """Talk to the served model."""
    from workloads.client import Client

    client = Client(url, api_key, max_tokens, temperature)
    if message is not None:
        client.ask([{"role": "user", "content": message}], out)
        return
    client.converse(out)


@app.command()
def complete(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    url: Url = None,
    api_key: ApiKey = None,
    max_tokens: Annotated[int, typer.Option(help="Longest continuation in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
) -> None:
    """Continue a text with the served model."""
    from workloads.client import Client

    Client(url, api_key, max_tokens, temperature).complete(prompt, out)


@app.command()
def status(
    json_: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
    config: ConfigFile = None,
    address: Address = None,
) -> None:
    """The running mesh: hosts, experts, memory, traffic, readiness."""
    from workloads.status import read_status, status_view

    state = read_status(_load(config, None, None, None, address, {}).config, url, api_key)
    if json_:
        print(json.dumps(state, indent=2))
    else:
        out.print(status_view(state))
    if not state["ready"]:
        raise typer.Exit(1)


@app.command()
def experts(
    layer: Annotated[int | None, typer.Option(help="One layer, expert by expert.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object, all counts in it.")] = False,
    url: Url = None,
    config: ConfigFile = None,
    address: Address = None,
) -> None:
    """Where the experts are, how often they are asked for, and what hosts take for them."""
    from workloads.placement_commands import experts_json, experts_view
    from workloads.running import running_controller

    with running_controller(_load(config, None, None, None, address, {}).config, url) as controller:
        report = controller.ask("experts")
    if json_:
        print(json.dumps(experts_json(report), indent=2))
    else:
        out.print(experts_view(report, layer))


@app.command()
def rebalance(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would move, and why.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    url: Url = None,
    config: ConfigFile = None,
    address: Address = None,
) -> None:
    """Move experts to where they gain most, while the mesh serves."""
    from dataclasses import asdict

    from workloads.placement_commands import proposal_view
    from workloads.running import running_controller

    with running_controller(_load(config, None, None, None, address, {}).config, url) as controller:
        found = controller.ask("propose" if dry_run else "rebalance")
    made = found.worthwhile and not dry_run
    if json_:
        print(json.dumps({**asdict(found), "gain": found.gain, "made": made}, indent=2))
    else:
        out.print(proposal_view(found, made=made))


@app.command()
def drain(
    node: Annotated[str, typer.Argument(help="Name, address or id of a node.")],
    undo: Annotated[bool, typer.Option("--undo", help="Let hosts be placed there again.")] = False,
    timeout: Annotated[float, typer.Option(help="Longest wait in seconds.")] = 600.0,
    url: Url = None,
    config: ConfigFile = None,
    address: Address = None,
) -> None:
    """Empty a node's expert hosts and end them, while the mesh serves."""
    from workloads.placement_commands import wait_for_change
    from workloads.running import running_controller

    with running_controller(_load(config, None, None, None, address, {}).config, url) as controller:
        if undo:
            controller.ask("undrain", node)
            out.print(f"hosts may be placed on {node} again", highlight=False)
            return
        going = controller.ask("drain", node)
        wait_for_change(
            controller,
            lambda change: not set(going) & set(change.leaving),
            timeout,
            lambda said: err.print(said),
        )
        what = ", ".join(going) or "no host was there"
        out.print(f"{node} is drained: {what}", highlight=False)


@app.command()
def scale(
    group: Annotated[str, typer.Argument(help="Name of a host group.")],
    count: Annotated[int, typer.Argument(help="Hosts that it is to have.")],
    timeout: Annotated[float, typer.Option(help="Longest wait in seconds.")] = 600.0,
    url: Url = None,
    config: ConfigFile = None,
    address: Address = None,
) -> None:
    """Change the number of a group's hosts, while the mesh serves."""
    from workloads.placement_commands import wait_for_change
    from workloads.running import running_controller

    with running_controller(_load(config, None, None, None, address, {}).config, url) as controller:
        coming, going = controller.ask("scale", group, count)
        wait_for_change(
            controller,
            lambda change: not set(going) & set(change.leaving) and not set(coming) & set(change.absent),
            timeout,
            lambda said: err.print(said),
        )
    came = f"{', '.join(coming)} joined" if coming else ""
    went = f"{', '.join(going)} left" if going else ""
    out.print(f"group {group} has {count} hosts: {came or went or 'as before'}", highlight=False)


@app.command()
def doctor(config: ConfigFile = None) -> None:
    """Check this machine: versions, kernels, memory, ports, token; says what to mend."""
    from workloads.doctor import examine

    if not examine(_load(config, None, None, None, None, {}).config, out):
        raise typer.Exit(1)


@app.command()
def down(
    url: Url = None,
    config: ConfigFile = None,
    address: Address = None,
) -> None:
    """End the server that runs here, or the mesh on the cluster at --address; leaves nothing behind."""
    from workloads.down import end

    end(_load(config, None, None, None, address, {}).config, url, out)


def _load(
    file: Path | None,
    model: str | None,
    dtype: str | None,
    hosts: int | None,
    address: str | None,
    more: dict[str, Any],
) -> LoadedConfig:
    flags = {
        "model.path": model,
        "model.dtype": dtype,
        "hosts.0.count": hosts,
        "ray.address": address,
        **more,
    }
    names = {**_FLAGS, "model.path": "--model", "model.dtype": "--dtype"}
    return load_config(file, flags, os.environ, names)


def main() -> None:
    """Entry point: an ExpertmeshError is one message and exit code 1, Ctrl-C is 130."""
    # A reader that went away (`expertmesh status | head`) is no error of ours.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        app()
    except ExpertmeshError as error:
        show_mistake(error)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
