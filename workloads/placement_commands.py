"""`expertmesh experts`, `rebalance`, `drain` and `scale`: the placement of a mesh that serves."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

from rich.console import Group
from rich.table import Table

from cluster.changes import ChangeStatus
from cluster.errors import HostError
from cluster.experts_report import ExpertsReport
from cluster.moves import Proposal
from workloads.running import RunningController

_POLL_S: Final = 0.5
# Of a long list; all of it is in the JSON.
_SHOWN: Final = 20


def experts_view(report: ExpertsReport, layer: int | None) -> Group:
    """The experts for a terminal: all layers in numbers, or one of them expert by expert."""
    head = Table.grid(padding=(0, 2))
    head.add_row("table epoch", str(report.epoch))
    if report.prediction_error is not None:
        head.add_row("predicted against measured step", f"{report.prediction_error:.1%} off in the median")
    if layer is not None:
        if layer not in report.holders:
            known = ", ".join(map(str, report.holders))
            raise HostError(f"the model has no layer {layer} of experts", f"its layers of experts: {known}")
        return Group(head, _of_layer(report, layer))
    layers = Table("layer", "experts", "copies", "max over mean", "never asked", "effective")
    for index, summary in report.layers.items():
        holders = report.holders[index]
        layers.add_row(
            str(index),
            str(len(holders)),
            str(sum(map(len, holders))),
            f"{summary.max_over_mean:.2f}",
            f"{summary.dead_share:.0%}",
            f"{summary.effective_experts:.1f}",
        )
    busiest = Table("layer", "expert", "share of its layer", "hosts", title="asked for most")
    for found in report.busiest:
        hosts = ", ".join(report.holders[found.layer][found.expert])
        busiest.add_row(str(found.layer), str(found.expert), f"{found.share:.1%}", hosts)
    costs = Table("host", "ms per dispatch", "us per expert", "us per row", title="measured")
    for host_id, cost in report.costs.items():
        costs.add_row(
            host_id,
            f"{cost.fixed_s * 1e3:.3f}",
            f"{cost.per_expert_s * 1e6:.1f}",
            f"{cost.per_row_s * 1e6:.2f}",
        )
    return Group(head, layers, *([busiest] if report.busiest else []), *([costs] if report.costs else []))


def _of_layer(report: ExpertsReport, layer: int) -> Table:
    chosen = report.chosen[layer]
    total = max(1, sum(chosen))
    table = Table("expert", "chosen", "share", "hosts", title=f"layer {layer}")
    for expert, hosts in enumerate(report.holders[layer]):
        table.add_row(str(expert), str(chosen[expert]), f"{chosen[expert] / total:.1%}", ", ".join(hosts))
    return table


def experts_json(report: ExpertsReport) -> dict[str, Any]:
    """Everything, the full matrix of counts too."""
    return asdict(report)


def proposal_view(found: Proposal, *, made: bool) -> Group:
    """Every move and its gain, the largest first."""
    head = Table.grid(padding=(0, 2))
    head.add_row("predicted time of a step's experts", f"{found.seconds_now * 1e3:.3f} ms")
    head.add_row("after the change", f"{found.seconds_then * 1e3:.3f} ms ({found.gain:.1%} less)")
    head.add_row("experts to load", str(found.loads))
    head.add_row("experts to drop", str(found.drops))
    head.add_row("verdict", found.verdict)
    head.add_row("", "under way: see `expertmesh status`" if made else "nothing was changed")
    if not found.moves:
        return Group(head)
    moves = Table("layer", "expert", "to", "instead of", "gain us a step")
    for move in found.moves[:_SHOWN]:
        moves.add_row(
            str(move.layer),
            str(move.expert),
            move.to,
            move.instead_of or "(one copy more)",
            f"{move.gain_s * 1e6:.1f}",
        )
    if len(found.moves) > _SHOWN:
        moves.add_row("...", f"{len(found.moves) - _SHOWN} more in --json", "", "", "")
    return Group(head, moves)


def wait_for_change(
    controller: RunningController,
    done: Callable[[ChangeStatus], bool],
    timeout_s: float,
    progress: Callable[[str], None],
) -> None:
    """Wait until a change has come about. HostError if it does not in time, or is given up."""
    deadline, told = time.monotonic() + timeout_s, ""
    while True:
        change: ChangeStatus = controller.ask("change")
        if done(change):
            return
        parts = [
            change.reason and f"changing the placement ({change.reason})",
            change.loading and f"loading: {', '.join(change.loading)}",
            change.leaving and f"leaving: {', '.join(change.leaving)}",
        ]
        said = "; ".join(part for part in parts if part)
        if said and said != told:
            progress(said)
            told = said
        if time.monotonic() > deadline:
            why = f" ({change.abandoned})" if change.abandoned else ""
            raise HostError(
                f"the change is not done after {timeout_s:g} s{why}", "it goes on; see `expertmesh status`"
            )
        time.sleep(_POLL_S)
