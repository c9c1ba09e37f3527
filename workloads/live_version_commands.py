"""`expertmesh versions stage`, `promote`, `rollback`, `unstage`: the versions of a mesh that serves."""

from __future__ import annotations

import getpass
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from cluster.config_mistakes import BadValue
from cluster.config_values import parse_duration
from cluster.errors import HostError, VersionError
from workloads.console import console
from workloads.options import ConfigFile, Json
from workloads.running import RunningController, running_controller
from workloads.version_commands import Version, configured
from workloads.version_commands import versions_app as versions_app

out = console()

_POLL_S: Final = 0.05
Url = Annotated[
    str | None, typer.Option("--url", help="Server whose mesh it is (default: the one that runs here).")
]
Reason = Annotated[str, typer.Option(help="What for.")]
Author = Annotated[str | None, typer.Option(help="Who does it (default: your login).")]


@versions_app.command()
def stage(
    version: Version,
    timeout: Annotated[float, typer.Option(help="Seconds that loading may take.")] = 600.0,
    config: ConfigFile = None,
    url: Url = None,
    json_: Json = False,
) -> None:
    """Have the hosts load a version beside the one that serves, so that it can be promoted."""
    started = time.monotonic()
    with running_controller(configured(config), url) as controller:
        staged = stage_when_free(controller, version, timeout)
        wait_until_live(controller, staged.manifest, timeout)
    found = {**asdict(staged), "seconds": time.monotonic() - started}
    loaded = sum(staged.bytes_by_host.values())
    _tell(
        found,
        f"{staged.manifest}\n  loaded beside what serves: {loaded / 1e6:.1f} MB on {len(staged.bytes_by_host)} hosts, "
        f"{found['seconds']:.2f} s",
        json_,
    )


@versions_app.command()
def promote(
    version: Version,
    reason: Reason = "",
    author: Author = None,
    running: Annotated[
        str | None,
        typer.Option(help="Whether running requests `finish` on their version or `continue` on this one."),
    ] = None,
    canary: Annotated[
        str | None,
        typer.Option(
            metavar="SHARES",
            help="Only to a share of requests, such as 5% or 1%,5%,25%,100% one after the other, until it is clear "
            "whether it is good enough: then it is promoted, or rolled back, by itself.",
        ),
    ] = None,
    every: Annotated[str, typer.Option(help="How long each share lasts at least.")] = "10m",
    alpha: Annotated[
        float, typer.Option(min=1e-9, max=0.5, help="How probable a wrong verdict may be.")
    ] = 0.01,
    config: ConfigFile = None,
    url: Url = None,
    json_: Json = False,
) -> None:
    """Give a version that was staged to all new requests, or first to a share of them."""
    if canary is not None:
        _try_out(version, canary, every, alpha, config, url, json_)
        return
    if running not in (None, "finish", "continue"):
        raise typer.BadParameter(f"{running!r} is neither finish nor continue", param_hint="--running")
    goes_on = None if running is None else running == "continue"
    with running_controller(configured(config), url) as controller:
        _tell_promoted(controller.ask("promote", version, _who(author), reason, goes_on), json_)


@versions_app.command()
def rollback(
    reason: Reason = "",
    author: Author = None,
    config: ConfigFile = None,
    url: Url = None,
    json_: Json = False,
) -> None:
    """Give the version that served before to all new requests again; or end the trial of another one."""
    with running_controller(configured(config), url) as controller:
        _tell_promoted(controller.ask("rollback", _who(author), reason), json_)


@versions_app.command()
def unstage(version: Version, config: ConfigFile = None, url: Url = None, json_: Json = False) -> None:
    """Let go of a version that does not serve, once no request runs on it."""
    with running_controller(configured(config), url) as controller:
        controller.ask("unstage", version)
        status = controller.ask("versions")
    _tell(asdict(status), "it is let go once no request runs on it; see `expertmesh versions live`", json_)


@versions_app.command()
def live(config: ConfigFile = None, url: Url = None, json_: Json = False) -> None:
    """Versions that the running mesh has loaded, and the one that serves."""
    with running_controller(configured(config), url) as controller:
        status = controller.ask("versions")
    if status.candidate:
        trial = f"on trial with {status.share:.3g} of new requests: {status.verdict}"
    states = {
        **dict.fromkeys(status.live, "loaded"),
        **dict.fromkeys(status.retiring, "served before; let go when nobody needs it"),
        **dict.fromkeys(status.coming, "loading"),
        **{
            name: "shares requests, see `expertmesh learn bandit`"
            for of in status.shares.values()
            for name in of
        },
        status.serving: "serves" if not status.shares else "serves, and shares requests",
        **({status.candidate: trial} if status.candidate else {}),
        **({status.promoting: "is being promoted"} if status.promoting else {}),
    }
    lines = [f"{name[:12]}  {state}" for name, state in states.items()]
    if status.verdict and not status.candidate:
        lines.append(f"last trial: {status.verdict}")
    _tell(asdict(status), "\n".join(lines), json_)


def wait_until_live(controller: RunningController, manifest: str, timeout_s: float) -> None:
    """Until all hosts have a version that is being staged. VersionError with the reason if they can't."""
    deadline = time.monotonic() + timeout_s
    while True:
        status = controller.ask("versions")
        if manifest in status.live:
            return
        if manifest not in status.coming:
            # It may have come to be live between the two questions, or was given up.
            if manifest in controller.ask("versions").live:
                return
            why = controller.ask("change").abandoned or "another change took its place"
            raise VersionError(
                f"version {manifest[:12]} was not loaded: {why}", "what serves was not touched"
            )
        if time.monotonic() > deadline:
            raise VersionError(
                f"version {manifest[:12]} is not loaded after {timeout_s:g} s",
                "it goes on; see `expertmesh status`",
            )
        time.sleep(_POLL_S)


def stage_when_free(controller: RunningController, version: str, timeout_s: float) -> Any:
    """What staging says; waits for a change of the placement that is under way."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return controller.ask("stage", version)
        except HostError as error:
            if "being changed already" not in error.message or time.monotonic() > deadline:
                raise
        time.sleep(_POLL_S)


def _try_out(
    version: str, shares: str, every: str, alpha: float, config: Path | None, url: str | None, json_: bool
) -> None:
    from cluster.canary import Trial

    try:
        given = tuple(float(share.strip().removesuffix("%")) / 100 for share in shares.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{shares!r} is no list of shares such as 1%,5%", param_hint="--canary"
        ) from None
    try:
        step_s = parse_duration(every)
    except BadValue as error:
        raise typer.BadParameter(str(error), param_hint="--every") from None
    with running_controller(configured(config), url) as controller:
        controller.ask("try_out", Trial(version, given, step_s, alpha))
        status = controller.ask("versions")
    text = f"{status.candidate}\n  gets {status.share:.3g} of new requests; see `expertmesh versions live`"
    _tell(asdict(status), text, json_)


def _tell_promoted(promoted: Any, json_: bool) -> None:
    late = "" if promoted.everywhere else "; not every engine has said so yet"
    took = f"{promoted.seconds * 1e3:.0f} ms{late}"
    _tell(
        asdict(promoted),
        f"{promoted.manifest}\n  serves since table epoch {promoted.epoch}, after {took}; "
        f"before it {promoted.before[:12]}",
        json_,
    )


def _tell(found: dict[str, Any], text: str, json_: bool) -> None:
    if json_:
        print(json.dumps(found, indent=2))
    else:
        out.print(text, highlight=False, soft_wrap=True)


def _who(author: str | None) -> str:
    return getpass.getuser() if author is None else author
