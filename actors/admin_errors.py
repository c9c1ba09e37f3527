"""What the admin API says of mistakes: {"error": {"message": ..., "hint": ...}} with a status that fits."""

from __future__ import annotations

from typing import Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from cluster.errors import (
    ExpertmeshError,
    HostError,
    StoreError,
    UnknownVersionError,
    VersionConflictError,
)

# The first that fits counts; what is left is a mistake in what was sent.
_STATUS: Final[tuple[tuple[type[ExpertmeshError], int], ...]] = (
    (UnknownVersionError, 404),
    (VersionConflictError, 409),
    (HostError, 409),
    (StoreError, 503),
    (ExpertmeshError, 422),
)


def refusal(status: int, message: str, hint: str = "", headers: dict[str, str] | None = None) -> JSONResponse:
    """An answer that says what is wrong, and the way out."""
    return JSONResponse({"error": {"message": message, "hint": hint}}, status, headers)


NO_KEY: Final = refusal(
    401,
    "the admin API wants one of admin.keys",
    "send it as `Authorization: Bearer ...`",
    {"WWW-Authenticate": "Bearer"},
)
NOT_HERE: Final = refusal(
    403,
    "without a key the admin API answers to this machine's own names only, and to no other site's pages",
    "ask 127.0.0.1, or set admin.keys",
)


def handle_errors(app: FastAPI) -> None:
    """Have the application answer so."""

    @app.exception_handler(ExpertmeshError)
    def known(request: Request, error: ExpertmeshError) -> JSONResponse:
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        return refusal(status, error.message, error.hint)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        return refusal(422, "; ".join(wrong), "see /docs")

    @app.exception_handler(HTTPException)
    def other(request: Request, error: HTTPException) -> JSONResponse:
        return refusal(error.status_code, f"{error.detail}: {request.url.path}", "see /docs")

    @app.exception_handler(Exception)
    def unknown(request: Request, error: Exception) -> JSONResponse:
        return refusal(500, f"{type(error).__name__}: {error}", "see the controller's log")
