"""`expertmesh status`: what the controller, the hosts and the router say of themselves."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import httpx
from rich.console import Group
from rich.markup import escape
from rich.table import Column, Table

from cluster.config import Config
from cluster.errors import ExpertmeshError
from cluster.messages import HostReport
from cluster.repair_state import HostStatus, Phase
from cluster.table import PlacementTable
from workloads.running import NOTHING, START, running_controller
from workloads.status_groups import groups_table

_HTTP_TIMEOUT_S = 35.0


def read_status(config: Config, url: str | None, api_key: str | None) -> dict[str, Any]:
    """Ask the server that runs here (or the cluster at ray.address); ExpertmeshError if there is none.

    Without a key that the server knows, its engine's counters are missing.
    """
    with running_controller(config, url) as found:
        deployment = found.ask("deployment")
        if deployment is None:
            raise ExpertmeshError(NOTHING, START)
        reports, states, change = found.ask("reports"), found.ask("states"), found.ask("change")
        groups = found.ask("autoscaled")
        url = found.url
    devices = {spec.host_id: spec.device for spec in deployment.hosts}
    return {
        "url": url,
        "model": deployment.served_name,
        "table_epoch": PlacementTable.from_json(deployment.table).epoch,
        "change": asdict(change),
        "groups": [asdict(group) for group in groups],
        "hosts": [host_entry(state, devices[state.host_id], reports.get(state.host_id)) for state in states],
        **_router(url, api_key),
    }


def host_entry(host: HostStatus, device: str, report: HostReport | str | None) -> dict[str, Any]:
    """One host as the status' JSON has it: what the controller knows of it, and what it says of itself."""
    entry = {"host_id": host.host_id, "node_id": host.node_id, "device": device}
    known = {
        "launches": host.launches,
        "crashes": host.crashes,
        "reason": host.reason,
        "next_try_s": host.next_try_s,
    }
    if isinstance(report, HostReport):
        return {**entry, "state": "ready", **known, **_flat(asdict(report))}
    if host.state == Phase.READY:
        # Frozen, or dead since a moment.
        return {**entry, "state": "not answering", **known, "reason": str(report or host.reason)}
    return {**entry, "state": host.state, **known}


def status_view(state: dict[str, Any]) -> Group:
    """The status for a terminal."""
    head = Table.grid(padding=(0, 2))
    head.add_row("url", state["url"])
    head.add_row("model", state["model"])
    head.add_row("ready", "[green]yes[/]" if state["ready"] else f"[red]no[/] {state.get('reason', '')}")
    engine = state.get("engine")
    epoch = state.get("table_epoch")
    if epoch is not None:
        head.add_row("table epoch", str(epoch))
    if engine:
        # For a moment after a change, or for longer if the engine can't follow.
        if epoch != int(engine["epoch"]):
            head.add_row("engine's table epoch", str(int(engine["epoch"])))
        head.add_row("engine memory", f"{engine['rss_bytes'] / 2**20:.0f} MiB")
    elif "engine_reason" in state:
        head.add_row("engine", state["engine_reason"])
    change = state.get("change") or {}
    if change.get("reason"):
        head.add_row("placement", f"[yellow]changing[/]: {escape(change['reason'])}")
    elif change.get("abandoned"):
        head.add_row("placement", f"[red]not changed[/]: {escape(change['abandoned'])}")
    if change.get("leaving"):
        head.add_row("leaving", ", ".join(change["leaving"]))
    hosts = Table(
        Column("host", no_wrap=True),
        "device",
        "state",
        "experts",
        "weights MiB",
        "memory MiB",
        "kernel",
        "engines",
        "dispatches",
    )
    for host in state["hosts"]:
        if host["state"] == "ready":
            hosts.add_row(
                host["host_id"],
                host["device"],
                f"[green]ready[/]{_crashes(host)}",
                _experts(host),
                f"{host['weight_bytes'] / 2**20:.0f}",
                f"{host['rss_bytes'] / 2**20:.0f}",
                host["kernel"],
                str(host["connections"]),
                str(host["dispatches"]),
            )
        else:
            hosts.add_row(host["host_id"], host["device"], _trouble(host), "", "", "", "", "", "")
    groups = state.get("groups")
    return Group(head, hosts, *([groups_table(groups)] if groups else []))


def _trouble(host: dict[str, Any]) -> str:
    colour = "yellow" if host["state"] == Phase.STARTING else "red"
    seconds = host.get("next_try_s")
    parts = [
        escape(host.get("reason") or ""),
        _crashes(host).strip(),
        f"next try in {seconds:.0f} s" if seconds is not None else "",
    ]
    return f"[{colour}]{host['state']}[/] " + ", ".join(part for part in parts if part)


def _experts(host: dict[str, Any]) -> str:
    """How many, and from which hosts they were copied if the node lacks the model's folder."""
    others = ", ".join(host["copied_from"])
    return f"{host['experts_loaded']}" + (f" from {others}" if others else "")


def _crashes(host: dict[str, Any]) -> str:
    count = host.get("crashes", 0)
    return f" {count} crash{'es' * (count > 1)}" if count else ""


def _router(url: str, api_key: str | None) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with httpx.Client(timeout=_HTTP_TIMEOUT_S, headers=headers) as client:
            ready = client.get(f"{url}/ready")
            answer: dict[str, Any] = {"ready": ready.status_code == 200}
            if ready.status_code != 200:
                answer["reason"] = (
                    ready.json().get("reason", ready.text) if ready.text[:1] == "{" else ready.text
                )
            else:
                answer["host_round_trip_us"] = ready.json()["host_round_trip_us"]
            stats = client.get(f"{url}/expertmesh/stats")
            if stats.status_code == 200:
                answer["engine"] = stats.json()
            elif stats.status_code == 401:
                answer["engine_reason"] = "wants an API key: give one with --api-key or EXPERTMESH_API_KEY"
            return answer
    except (httpx.HTTPError, ValueError) as error:
        return {"ready": False, "reason": f"the router does not answer: {error}"}


def _flat(report: dict[str, Any]) -> dict[str, Any]:
    address = report.pop("address")
    return {**report, "unix": address["unix"], "tcp": address["tcp"], "pid": address["pid"]}
