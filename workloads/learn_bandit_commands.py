"""`expertmesh learn bandit`: versions share requests by what users say of their answers."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cluster.errors import LearningError
from workloads.console import err
from workloads.learn_loop_commands import learn_app as learn_app
from workloads.learn_parts import StoreUrl, StreamUrl, configured, open_stream, out
from workloads.options import ConfigFile, Json, Model

if TYPE_CHECKING:
    from cluster.learning.bandit import BanditReport
    from cluster.learning.off_policy import Estimate
    from workloads.learn_bandit import BanditState


@learn_app.command()
def bandit(
    arm: Annotated[
        list[str] | None,
        typer.Option(
            "--arm", help="Begin: a loaded version that is to share requests with the one that serves."
        ),
    ] = None,
    end: Annotated[bool, typer.Option("--end", help="All requests get the version that serves.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what is known, and change nothing.")
    ] = False,
    url: Annotated[
        str | None,
        typer.Option("--url", help="Server whose requests they are (default: the one that runs here)."),
    ] = None,
    config: ConfigFile = None,
    model: Model = None,
    stream: StreamUrl = None,
    store: StoreUrl = None,
    json_: Json = False,
) -> None:
    """Share requests out among versions by what users say of their answers, and promote what earns more for sure."""
    from cluster.versions.files import Files
    from cluster.versions.store import Store
    from workloads.learn_bandit import Bandit
    from workloads.learn_serving import Serving
    from workloads.logs import configure
    from workloads.progress import stages
    from workloads.running import running_controller
    from workloads.serve import open_model
    from workloads.version_store import store_address

    if sum((bool(arm), end, dry_run)) > 1:
        raise typer.BadParameter("--arm, --end and --dry-run exclude each other", param_hint="--arm")
    settings = configured(config, model, stream, store)
    learning = settings.learning
    if arm and not learning.capture.on:
        raise LearningError(
            "no requests are kept, so that nothing would be known of what they earn",
            "set learning.capture, and start the server with it",
        )
    checkpoint = None
    if arm or not learning.state:
        with stages(err) as shown:
            checkpoint = open_model(settings, shown)[0]
    state_url = learning.state_url(checkpoint.digest if checkpoint is not None else "")
    files = Files(state_url, **learning.options)
    kept = open_stream(settings)
    with contextlib.ExitStack() as stack:
        server = None
        if not dry_run:
            server = Serving(stack.enter_context(running_controller(settings, url)))
            configure(settings.log_level)
        found = Bandit(files, kept, learning.bandit, server)
        if arm and checkpoint is not None:
            address = store_address(settings, checkpoint)
            versions = Store(address.url, address.options)
            state = found.begin([versions.find(name) for name in arm])
        elif end:
            state = found.end()
        else:
            state = found.state() if dry_run else found.update()
        report = found.report(state)
    if json_:
        print(json.dumps(as_json(state, report), indent=2))
        return
    out.print(as_text(state, report), highlight=False, soft_wrap=True)
    if report is not None:
        out.print(as_table(state, report))


def as_json(state: BanditState, report: BanditReport | None) -> dict[str, Any]:
    """For a program."""
    told = None if report is None else {**asdict(report), "promote": report.promote or None}
    return {**asdict(state), "under_way": state.under_way, "report": told}


def as_text(state: BanditState, report: BanditReport | None) -> str:
    """What is under way, and what the gate says."""
    if not state.arms:
        return "no versions share requests"
    of = ", ".join(name[:12] for name in state.arms)
    lines = [f"{of} share requests" if state.under_way else f"{of} shared requests: {state.ended}"]
    if report is None:
        lines.append("nothing is known yet of what they earn: it takes feedback on answers that are kept")
        return "\n".join(lines)
    lines.append(f"{report.requests} requests of which users said something")
    lines += [f"  {name[:12]}: {why}" for name, why in report.reasons.items()]
    if state.under_way:
        lines.append(
            f"{report.promote[:12]} would be promoted" if report.promote else "none would be promoted"
        )
    return "\n".join(lines)


def as_table(state: BanditState, report: BanditReport) -> Table:
    """One row a version: what it earned, and what it would have if all requests had been its own."""
    table = Table("version", "requests", "share", "mean", "IPS", "SNIPS", "DR", "more than what serves")
    for one in report.arms:
        shares = [of.get(one.manifest, 0.0) for context, of in state.shares.items() if context]
        table.add_row(
            one.manifest[:12],
            str(one.pulls),
            f"{min(shares):.0%} to {max(shares):.0%}" if shares else "",
            "" if one.mean is None else f"{one.mean:.3f}",
            *(_said(estimate) for estimate in (one.ips, one.snips, one.dr)),
            _said(one.gain) if one.manifest != state.arms[0] else "",
        )
    return table


def _said(estimate: Estimate) -> str:
    return f"{estimate.mean:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"
