"""Errors as RFC 9457 problems: the one place where an error meets an HTTP status."""

import http
import math
from typing import Final

import structlog
from fastapi import FastAPI, Request, Response
from msgspec import UNSET
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from kms_core import audit
from kms_protocol import errors, wire
from kms_protocol.errors import KmsError

MEDIA_TYPE: Final = "application/problem+json"
STATUS: Final[dict[type[KmsError], int]] = {
    errors.BadInput: 422,
    errors.InvalidRequest: 422,
    errors.InvalidContext: 422,
    errors.ContextRequired: 422,
    errors.NotACiphertext: 422,
    errors.TooLarge: 413,
    errors.DecryptFailed: 400,
    errors.Unauthenticated: 401,
    errors.Refused: 403,
    errors.Forbidden: 403,
    errors.PathRefused: 403,
    errors.ForeignRefused: 403,
    errors.Missing: 404,
    errors.UnknownKey: 404,
    errors.UnknownJob: 404,
    errors.ResultExpired: 410,
    errors.RecordRefused: 410,
    errors.Conflict: 409,
    errors.IdempotencyConflict: 409,
    errors.JobNotFinished: 409,
    errors.JobCommitting: 409,
    errors.JobNotDead: 409,
    errors.TargetExists: 409,
    errors.DataKeysUnsupported: 501,
    errors.BodyTimeout: 408,
    errors.Unavailable: 503,
    errors.BackendUnavailable: 503,
    errors.JobsUnavailable: 503,
    errors.AuditUnavailable: 503,
    errors.RateLimited: 429,
    errors.SpoolFull: 507,
    errors.JobCancelled: 409,
    errors.JobExpired: 410,
    errors.ConfigurationError: 500,
}
AWAY: Final = "The key backend is not available; the log of the service says why, by this request id"
_ROUTING_CODES: Final = {404: "not_found", 405: "method_not_allowed"}
_log = structlog.get_logger(__name__)


def install(app: FastAPI) -> None:
    """Answer every error of the application as a problem."""
    for kind in (KmsError, HTTPException, ClientDisconnect):
        app.add_exception_handler(kind, _expected)
    app.add_exception_handler(Exception, unknown)


def status_of(error: KmsError) -> int:
    """The status of an error; subclasses that a backend adds inherit their parent's."""
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def problem(
    status: int, code: str, detail: str, *, title: str = "", links: dict[str, str] | None = None
) -> Response:
    """A problem response. ``detail`` is ours, never a value that the caller sent.

    A denial is on record before it is answered; where that fails, that is the answer.
    """
    try:
        audit.turned_away(code)
    except errors.AuditUnavailable as exc:
        return answer(exc)
    body = wire.Problem(
        type=f"urn:kms-service:problem:{code}",
        title=title or http.HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code,
        request_id=audit.request_id.get(),
        links=links or UNSET,
    )
    return Response(wire.encode(body), status, media_type=MEDIA_TYPE)


def answer(error: KmsError) -> Response:
    """An error as the problem that it is, with the headers that go with it."""
    links = None
    if isinstance(error, errors.TooLarge):
        links = {"jobs": f"{wire.PREFIX}/jobs", "files": f"{wire.PREFIX}/files/encrypt"}
    detail = error.detail
    if isinstance(error, errors.BackendUnavailable):  # its text names servers and settings of ours
        _log.warning("backend.unavailable", reason=detail)
        detail = AWAY
    made = problem(status_of(error), error.code, detail, title=error.summary, links=links)
    if isinstance(error, errors.Unavailable):
        made.headers["Retry-After"] = retry_after(error)
    if isinstance(error, errors.Unauthenticated):
        made.headers["WWW-Authenticate"] = "Bearer"
    return made


def retry_after(error: errors.Unavailable) -> str:
    """Whole seconds, never fewer than there are: who comes back then must not come too early."""
    return str(max(1, math.ceil(error.retry_after_s)))


def expected(error: Exception) -> Response:
    """What is no fault of the service: a KmsError, a path that is not there, a caller who hung up."""
    if isinstance(error, HTTPException):
        return _routing(error)
    if isinstance(error, ClientDisconnect):  # nobody reads this
        return problem(400, errors.InvalidRequest.code, "The connection ended before the body did")
    known = error if isinstance(error, KmsError) else KmsError()
    _log.debug("request.refused", code=known.code)
    return answer(known)


async def unknown(request: Request, exc: Exception) -> Response:
    """A fault of the service: told as that, and logged."""
    del request
    _log.error("request.crashed", error=type(exc).__name__)
    return problem(500, KmsError.code, KmsError.summary)


async def _expected(request: Request, exc: Exception) -> Response:
    del request
    return expected(exc)


def _routing(error: HTTPException) -> Response:
    status = error.status_code
    detail = {404: "No such endpoint; see /docs", 405: "This endpoint has other methods; see /docs"}
    answer = problem(status, _ROUTING_CODES.get(status, "invalid_request"), detail.get(status, "Refused"))
    if error.headers:
        answer.headers.update(error.headers)
    return answer
