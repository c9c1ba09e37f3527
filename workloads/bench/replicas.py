"""`expertmesh bench replicas`: what a second replica of every expert costs while nothing fails.

Two servers of one model run at once, each in a process and on a Ray cluster of its own, with the same threads,
and are asked in turn:

    one   two hosts, each with half of every layer's experts
    two   two hosts, each with all of them; half of every layer's experts are asked of each

What differs is what failover needs: deadlines that are watched, and twice the weights in memory.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console

from cluster.config import Config
from cluster.errors import ConfigError, ExpertmeshError
from workloads.bench.chaos_server import ServerChild, uninterrupted
from workloads.bench.load import AllSeries, ask_in_turn, itl_ratio, named, rows, table, throughput_ratio
from workloads.bench.ports import free_port
from workloads.bench.report import Bar, envelope, now
from workloads.serve import Progress, check_port, open_model

Note = Callable[[str], None]
REPLICAS = {"one": 1, "two": 2}
"""Per server the copies of each expert."""
_HOSTS = 2
_MIB = 2**20
_STATS_S = 30.0
_HOST_TITLE = "ray::HostActor"


@dataclass(frozen=True, slots=True)
class Settings:
    """How long and what to ask; `port` is the first server's, the other has the next. None takes free ones."""

    rounds: int
    output_tokens: int
    seed: int
    port: int | None


@dataclass(frozen=True, slots=True)
class Model:
    """What both serve; `config` names its folder and dtype."""

    config: Config
    name: str
    vocabulary: int


def opened(config: Config, progress: Progress) -> Model:
    """The model to serve; the default model is made on first use."""
    checkpoint, dtype, name = open_model(config, progress)
    # Both servers get the same folder and dtype, and neither has to make the model.
    update = {"path": str(checkpoint.path), "dtype": dtype, "name": name}
    settled = config.model_copy(update={"model": config.model.model_copy(update=update)})
    return Model(settled, name, int(checkpoint.text_config["vocab_size"]))


def check_comparable(config: Config) -> None:
    """ConfigError if it has several groups of hosts, or a Ray cluster that is not ours."""
    if config.ray.address != "local":
        raise ConfigError(
            f"ray.address is {json.dumps(config.ray.address)}, but two servers need a cluster each",
            "leave it at local: this measurement starts its own",
        )
    if len(config.hosts) != 1:
        raise ConfigError(
            f"there are {len(config.hosts)} host groups, but two equal hosts are compared",
            "leave one group; its count does not matter",
        )


def deployment(base: Config, replicas: int, port: int) -> Config:
    """`base` with two hosts of its group, that many copies of each expert, on this machine's `port`."""
    tree = base.model_dump(mode="json", exclude_none=True)
    tree["server"].pop("api_keys")  # dumped as stars
    tree["server"].update(host="127.0.0.1", port=port)
    tree["hosts"][0]["count"] = _HOSTS
    tree["placement"]["replicas"] = replicas
    return Config.model_validate(tree)


def measure(model: Model, settings: Settings, note: Note) -> dict[str, Any]:
    """Start both servers, ask them in turn, end them; the report.

    ExpertmeshError if a server can't start or an answer fails.
    """
    started_at = now()
    given = None if settings.port is None else range(settings.port, settings.port + len(REPLICAS))
    for port in given or ():
        check_port("127.0.0.1", port)
    with contextlib.ExitStack() as stack:
        servers = {}
        for number, (who, replicas) in enumerate(REPLICAS.items()):
            note(f"starting server {who}: {_HOSTS} hosts, copies of each expert: {replicas}")
            # A free one only now: the server before listens already, so it is another.
            config = deployment(model.config, replicas, given[number] if given else free_port())
            servers[who] = stack.enter_context(_started(config))
        series = ask_in_turn(
            {who: server.url for who, server in servers.items()},
            model.name,
            model.vocabulary,
            rounds=settings.rounds,
            seed=settings.seed,
            output_tokens=settings.output_tokens,
            on_round=lambda over: note(f"round {over - 1} of {settings.rounds}" if over > 1 else "warmed up"),
        )
        gauges = {who: _gauges(server) for who, server in servers.items()}
        note("ending both servers")
    return report(model, settings, series, gauges, started_at)


def report(
    model: Model,
    settings: Settings,
    series: AllSeries,
    gauges: Mapping[str, Mapping[str, float]],
    started_at: str,
) -> dict[str, Any]:
    """The object that `--json` writes."""
    ratio = throughput_ratio(series, "two", "one")
    return envelope(
        "bench replicas",
        seed=settings.seed,
        started_at=started_at,
        series=named(series),
        bars=bars(ratio, sum(of_server["hosts_out"] for of_server in gauges.values())),
        throughput_ratio=ratio,
        itl_ratio=itl_ratio(series, "two", "one"),
        rounds=settings.rounds,
        output_tokens=settings.output_tokens,
        dtype=model.config.model.dtype,
        model=model.name,
        hosts=_HOSTS,
        results=rows(series),
        servers=[
            {"server": who, "replicas": REPLICAS[who], **of_server} for who, of_server in gauges.items()
        ],
    )


def bars(ratio: float, hosts_out: float) -> list[Bar]:
    """The limits. If a host was out meanwhile something did fail, and the ratio is of something else."""
    return [
        Bar("throughput_ratio", ratio, 0.98, at_most=False),
        Bar("hosts_out", hosts_out, 0, at_most=True),
    ]


def show(found: Mapping[str, Any], console: Console) -> None:
    """The report for people."""
    console.print(table(found["results"]))
    for key, bar in found["bars"].items():
        sign = "≤" if bar["at_most"] else "≥"
        console.print(
            f"{'met' if bar['met'] else 'missed'}  {key} {bar['value']:.5g} {sign} {bar['limit']:g}",
            highlight=False,
        )
    console.print(f"itl_ratio {found['itl_ratio']:.3f}", highlight=False)
    for server in found["servers"]:
        console.print(
            f"server {server['server']}, copies of each expert: {server['replicas']}; MiB: engine "
            f"{server['engine_rss_mb']:.0f}, hosts {server['hosts_rss_mb']:.0f}; late answers {server['late']}, "
            f"hedged {server['hedges']}, failed over {server['failovers']}",
            highlight=False,
        )


@contextlib.contextmanager
def _started(config: Config) -> Iterator[ServerChild]:
    """A ready server in a process of its own; ended with the block, however that ends."""
    with tempfile.TemporaryDirectory(prefix="expertmesh-bench-") as folder:
        child = ServerChild(Path(folder), config)
        try:
            child.wait_ready()
            yield child
        finally:
            with uninterrupted():
                child.end()


def _gauges(server: ServerChild) -> dict[str, float]:
    """Resident MiB of the engine and of the hosts, and what the engine counted since its start."""
    try:
        stats = httpx.get(f"{server.url}/expertmesh/stats", timeout=_STATS_S).raise_for_status().json()
    except httpx.HTTPError as error:
        raise ExpertmeshError(f"{server.url} does not tell its counters: {error}") from error
    return {
        "engine_rss_mb": stats["rss_bytes"] / _MIB,
        "hosts_rss_mb": sum(_host_rss(process) for process in server.family()) / _MIB,
        # Each time that a host was put out: it was let back since, or is out still.
        "hosts_out": stats["ejected"] + stats["let_back"],
        **{key: stats[key] for key in ("lost", "late", "hedges", "failovers")},
    }


def _host_rss(process: psutil.Process) -> int:
    """Resident bytes of an expert host, 0 for any other process."""
    with contextlib.suppress(psutil.Error):
        if " ".join(process.cmdline()).startswith(_HOST_TITLE):
            return int(process.memory_info().rss)
    return 0
