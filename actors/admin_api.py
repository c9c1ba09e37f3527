"""The admin API: versions over HTTP, for those who publish, promote and roll back.

An application over a plain `Controller`; `actors.admin_server` serves it from the controller's process, on a port and
with keys of its own. What it answers is what the commands `expertmesh versions ...` print as JSON.

    GET  /versions, /versions/{version}, /versions/{version}/diff      what the store holds
    POST /versions                                                     publish a file of tensors
    POST /versions/{version}/stage, /promote, /unstage; /rollback      what serves
    GET  /live                                                         what hosts have loaded, and what serves
    POST /gc                                                           take out of the store what nobody needs
    GET  /groups and the rest of `actors.admin_groups`                 hosts and nodes

`{version}` is an alias, a digest, or how one begins.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Annotated, Any, Final

from fastapi import Depends, FastAPI, Query, Request
from fastapi.security import HTTPBearer
from pydantic import FiniteFloat, TypeAdapter, ValidationError
from starlette.concurrency import run_in_threadpool

from actors.admin_errors import NO_KEY, NOT_HERE, handle_errors
from actors.admin_groups import add_groups
from actors.admin_requests import Collect, Promote, Rollback
from actors.api_access import ApiKeys, OwnPagesOnly
from cluster.canary import Trial
from cluster.checkpoint import Checkpoint
from cluster.controller import Controller
from cluster.errors import ExpertmeshError, StoreError, VersionError
from cluster.group_wishes import GroupWishes
from cluster.messages import AdminSettings
from cluster.table import PlacementTable
from cluster.version_changes import Promoted, Staged
from cluster.versions import views
from cluster.versions.collect import Collected, collect
from cluster.versions.growth import ExpertId
from cluster.versions.publish import Published, publish
from cluster.versions.store import Store

_METRICS: Final = TypeAdapter(dict[str, FiniteFloat])
# They tell whether it is up, and what it could be asked, but nothing of the mesh.
_OPEN: Final = frozenset({"/health", "/docs", "/openapi.json"})
_Experts = Annotated[Sequence[str], Query()]
_FILE: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "description": "A *.safetensors file with the tensors that changed, as it is.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
# What is meant where a request has no body.
_COLLECT: Final = Collect()
_PROMOTE: Final = Promote()
_ROLLBACK: Final = Rollback()
# What arrives is written in pieces of this size: each costs a thread's turn.
_PIECE_BYTES: Final = 1 << 20


def admin_app(controller: Controller, settings: AdminSettings, wishes: GroupWishes | None = None) -> FastAPI:
    """The application; requests may come at the same time. Without `wishes` it says nothing of host groups."""
    dependencies = [Depends(HTTPBearer(auto_error=False))] if settings.key_digests else []
    app = FastAPI(title="expertmesh admin", redoc_url=None, dependencies=dependencies)
    handle_errors(app)
    if settings.key_digests:
        app.add_middleware(ApiKeys, digests=settings.key_digests, open_paths=_OPEN, refusal=NO_KEY)
    else:
        app.add_middleware(OwnPagesOnly, refusal=NOT_HERE)
    _add_reading(app, controller)
    _add_store(app, controller, settings)
    _add_serving(app, controller)
    if wishes is not None:
        add_groups(app, wishes)
    return app


def _add_reading(app: FastAPI, controller: Controller) -> None:
    @app.get("/health")
    def health() -> dict[str, str]:
        """Whether this API is up."""
        return {"status": "ok"}

    @app.get("/live")
    def live() -> dict[str, Any]:
        """Versions that the mesh has loaded or is loading, and which one serves."""
        return _live(controller)

    @app.get("/versions")
    def versions() -> dict[str, Any]:
        """All versions in the store, the latest first, where aliases point, and what is live."""
        store, _ = controller.versions.store()
        return {**views.listing(store), "live": _live(controller)}

    @app.get("/versions/{version}")
    def about(version: str) -> dict[str, Any]:
        """One version: where it comes from, what it changes, whether all of it is there and signed."""
        store, deployment = controller.versions.store()
        key = deployment.version_settings.public_key
        return views.about(store, store.find(version), Path(key) if key else None)

    @app.get("/versions/{version}/diff")
    def diff(version: str, other: str | None = None) -> dict[str, Any]:
        """Which experts and tensors differ from `other`, its parent by default."""
        store, _ = controller.versions.store()
        return views.difference(store, store.find(version), store.find(other) if other else None)


def _add_store(app: FastAPI, controller: Controller, settings: AdminSettings) -> None:
    @app.post("/versions", status_code=201, openapi_extra=_FILE)
    async def publish_version(
        request: Request,
        parent: str | None = None,
        author: str = "",
        reason: str = "",
        metrics: str = "{}",
        clone: _Experts = (),
        retire: _Experts = (),
    ) -> Published:
        """Put a version into the store: the body is a *.safetensors file with what changed, which may be missing where
        experts are cloned or retired.

        `parent` is where the production alias points by default; `metrics` is JSON such as {"loss": 1.5}; `clone` and
        `retire` name experts as LAYER:EXPERT.
        """
        clones, retired = ([ExpertId.parse(text) for text in given] for given in (clone, retire))
        try:
            measured = _METRICS.validate_json(metrics)
        except ValidationError as error:
            raise VersionError(
                f"metrics {metrics[:80]} are no JSON object of numbers", 'such as {"loss": 1.25}'
            ) from error
        # It has no name, so that nothing of it is left however this process ends.
        with tempfile.TemporaryFile() as file:
            size = await _receive(request, file)
            place = Path(f"/proc/self/fd/{file.fileno()}")

            def made() -> Published:
                store, deployment = controller.versions.store()
                checkpoint = Checkpoint.open(Path(settings.model_path))
                if checkpoint.digest != PlacementTable.from_json(deployment.table).manifest:
                    raise VersionError(
                        f"{checkpoint.path} is not the model that is served any more", "put that one back"
                    )
                from_ = store.find(parent) if parent else _served(store, deployment.version_settings.alias)
                return publish(
                    store,
                    checkpoint,
                    place if size or not (clones or retired) else None,
                    parent=from_,
                    clones=clones,
                    retired=retired,
                    author=author,
                    reason=reason,
                    metrics=measured,
                )

            try:
                return await run_in_threadpool(made)
            except ExpertmeshError as error:
                raise type(error)(error.message.replace(str(place), "the file"), error.hint) from error

    @app.post("/gc")
    def gc(wanted: Collect = _COLLECT) -> Collected:
        """Take out of the store what no alias points to or pointed to lately, and what the mesh has not loaded."""
        store, deployment = controller.versions.store()
        return collect(
            store,
            controller.versions.status().needed,
            history=wanted.history or deployment.version_settings.history,
            min_age_s=wanted.min_age,
            dry_run=wanted.dry_run,
        )


def _add_serving(app: FastAPI, controller: Controller) -> None:
    @app.post("/versions/{version}/stage", status_code=202)
    def stage(version: str) -> Staged:
        """Have the hosts load a version beside what serves. They load on when this answers: see `/live`."""
        return controller.versions.stage(version)

    @app.post("/versions/{version}/promote")
    def promote(version: str, wanted: Promote = _PROMOTE) -> dict[str, Any]:
        """Give a version that is live to all new requests, or with `canary` to a share of them first."""
        if wanted.canary is not None:
            canary = wanted.canary
            controller.trials.try_out(Trial(version, canary.shares, canary.every, canary.alpha))
            return _live(controller)
        goes_on = None if wanted.running is None else wanted.running == "continue"
        return asdict(
            controller.versions.promote(
                version, author=wanted.author, reason=wanted.reason, continue_running=goes_on
            )
        )

    @app.post("/versions/{version}/unstage")
    def unstage(version: str) -> dict[str, Any]:
        """Let go of a version that does not serve, once no request runs on it."""
        controller.versions.unstage(version)
        return _live(controller)

    @app.post("/rollback")
    def rollback(wanted: Rollback = _ROLLBACK) -> Promoted:
        """Give the version that served before to all new requests again; or end the trial of another one."""
        return controller.trials.rollback(author=wanted.author, reason=wanted.reason)


def _live(controller: Controller) -> dict[str, Any]:
    """What is live, and why what was staged last could not be loaded."""
    status = asdict(controller.versions.status())
    return {**status, "not_loaded": controller.changes.change().abandoned}


def _served(store: Store, alias: str) -> str:
    move = store.aliases.current(alias)
    return move.manifest if move is not None else ""


async def _receive(request: Request, file: IO[bytes]) -> int:
    """Write the request's body; its bytes. StoreError if there is no room for it."""
    piece = bytearray()
    try:
        async for chunk in request.stream():
            piece += chunk
            if len(piece) >= _PIECE_BYTES:
                await run_in_threadpool(file.write, bytes(piece))
                piece.clear()
        await run_in_threadpool(file.write, bytes(piece))
        await run_in_threadpool(file.flush)
        return file.tell()
    except OSError as error:
        raise StoreError(
            f"what was sent can't be kept in {tempfile.gettempdir()}: {error.strerror}",
            "make room there, or start the server with another TMPDIR",
        ) from error
