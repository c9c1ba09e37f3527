"""What expertmesh adds to vLLM's application: its own routes, and what every request passes through."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from actors.admission import Admission
from actors.api_access import ApiKeys, KnownRoles, OpenAIErrors, error_response, keep_listed_routes
from actors.capture import Capture
from actors.daemon_thread import in_daemon_thread
from actors.degraded import Degraded, Unavailable
from actors.neighbours import PINNED
from actors.pinning import Pinned
from actors.single_flight import SingleFlight

if TYPE_CHECKING:
    from actors.router import Router

# Anybody may ask /ready, and each answer costs a token: how long one serves all.
_READY_KEPT_S: Final = 1.0


class Feedback(BaseModel):
    """What a user says of an answer."""

    id: str
    """Of the answer, as it says itself."""
    score: float = Field(ge=0, le=1)


def finish(app: FastAPI, router: Router) -> None:
    """Our routes and middleware on vLLM's application."""
    keep_listed_routes(app)
    probe = SingleFlight(lambda: asyncio.wait_for(router.ready(), router.spec.ready_timeout_s), _READY_KEPT_S)

    @app.get("/ready", tags=["expertmesh"])
    async def ready() -> Response:
        """200 once every expert host answers and a token flows; 503 with the reason until then."""
        try:
            return JSONResponse(await probe())
        except Exception as error:
            return JSONResponse({"ready": False, "reason": str(error) or type(error).__name__}, 503)

    @app.get("/v1/models/{name:path}", tags=["expertmesh"])
    async def model(name: str) -> Response:
        """One of the models that `/v1/models` lists; vLLM has no route for it."""
        listed = await app.state.openai_serving_models.show_available_models()
        found = next((card for card in listed.data if card.id == name), None)
        if found is None:
            return error_response(
                404, f"the model {name!r} does not exist", "not_found_error", "model_not_found"
            )
        return JSONResponse(found.model_dump())

    @app.get("/expertmesh/stats", tags=["expertmesh"])
    async def stats(request: Request) -> Response:
        """Counters of this replica's engine process."""
        return JSONResponse(await router.stats())

    @app.post("/expertmesh/feedback", tags=["expertmesh"])
    async def feedback(said: Feedback, request: Request) -> Response:
        """How good an answer was, from 0 to 1: what a version on trial is judged by, among others."""
        kept = router.recorder is not None and router.recorder.liked(said.id, said.score)
        if router.watch.liked(said.id, said.score) or kept:
            return Response(status_code=204)
        if PINNED not in request.scope:
            # The answer may be another replica's.
            for engine in router.others:
                with suppress(httpx.HTTPError):
                    path, shown = request.url.path, request.headers.get("authorization", "")
                    answer = await router.neighbours.post(engine, path, "", said.model_dump(), shown)
                    if answer.is_success:
                        return Response(status_code=204)
        text = f"no answer {said.id!r} is remembered: versions are not on trial, or it is long ago"
        return error_response(404, text, "not_found_error", "answer_not_found")

    @app.get("/expertmesh/experts", tags=["expertmesh"])
    async def experts() -> Response:
        """Where every expert is, and how often it is asked for: the full matrix."""
        if router.experts is None:
            return error_response(503, "there is no controller to ask", "server_error", "no_controller")
        try:
            text = await in_daemon_thread(router.experts)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            return error_response(
                503, f"the controller does not answer: {reason}", "server_error", "no_controller"
            )
        return Response(text, media_type="application/json")

    app.middleware_stack = None
    app.openapi_schema = None
    app.add_middleware(KnownRoles)
    app.add_middleware(Pinned, pins=router.pins, neighbours=router.neighbours)
    app.add_middleware(Degraded, marks=router.engine.degraded)
    app.add_middleware(Unavailable)
    if router.recorder is not None:
        app.add_middleware(Capture, recorder=router.recorder)
    app.add_middleware(Admission, limit=router.spec.max_requests, timeout_s=router.spec.request_timeout_s)
    app.add_middleware(OpenAIErrors)
    if router.spec.api_key_digests:
        app.add_middleware(ApiKeys, digests=router.spec.api_key_digests)
