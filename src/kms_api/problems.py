"""Answers to errors: RFC 9457 problems, and for the Vault API ``{"errors": […]}``.

Vault's clients retry 412, 429 and 5xx. So they get 400, 403, 404, 405, 408 or 413 for faults of the caller,
and 503 for conditions that may pass.
"""

import http
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import structlog
from fastapi import Response
from msgspec import UNSET
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from kms_core import audit
from kms_core.backends import NotRotated
from kms_protocol import errors, wire
from kms_protocol.errors import KmsError

MEDIA_TYPE: Final = "application/problem+json"
EXPECTED: Final = (KmsError, HTTPException, ClientDisconnect)
"""Errors that are no fault of the service."""
AWAY: Final = "The key backend is not available; the log of the service says why, by this request id"
KEPT: Final = "nothing has changed, and the key keeps its version"
_NO_KEY: Final = "no such key for this caller; encrypting makes none here, the operator adds it to [kms.keys]"
_OF_VAULT: Final = frozenset({"Allow", "Retry-After", "Connection"})
_WRONG_INPUT: Final = "wrong key, version prefix, context or associated_data, or a damaged ciphertext"
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ErrorStatus:
    """The status of an error. ``vault_status`` is that of the Vault API, if another one.

    Some of Vault's clients tell errors apart by Vault's words, which come before the detail.
    """

    status: int
    vault_status: int = 0
    vault_words: str = ""
    vault_detail: str = ""


ANSWERS: Final[Mapping[type[KmsError], ErrorStatus]] = {
    errors.BadInput: ErrorStatus(422, 400),
    errors.NotACiphertext: ErrorStatus(422, 400, "invalid ciphertext"),
    errors.TooLarge: ErrorStatus(413),
    errors.DecryptFailed: ErrorStatus(400, 400, "cipher: message authentication failed", _WRONG_INPUT),
    errors.Unauthenticated: ErrorStatus(401, 403, "permission denied"),
    errors.Refused: ErrorStatus(403),
    errors.Forbidden: ErrorStatus(403, 403, "permission denied"),
    errors.ForeignRefused: ErrorStatus(403, 400, "invalid ciphertext"),
    errors.Missing: ErrorStatus(404),
    errors.UnknownKey: ErrorStatus(404, 400, "encryption key not found", _NO_KEY),
    errors.ResultExpired: ErrorStatus(410),
    errors.RecordRefused: ErrorStatus(410),
    errors.Conflict: ErrorStatus(409),
    errors.RotationRefused: ErrorStatus(409, 400),
    errors.DataKeysUnsupported: ErrorStatus(501, 400),
    errors.BodyTimeout: ErrorStatus(408),
    errors.Unavailable: ErrorStatus(503),
    errors.BackendUnavailable: ErrorStatus(503, 503, "unavailable"),
    errors.RateLimited: ErrorStatus(429),
    errors.SpoolFull: ErrorStatus(507),
    errors.JobCancelled: ErrorStatus(409),
    errors.JobExpired: ErrorStatus(410),
    errors.ItemsFailed: ErrorStatus(409),
    errors.AttemptsExhausted: ErrorStatus(409),
}
"""By kind of error; one that is not here has the answer of its parent."""
_NO_ROUTE: Final = (
    "no handler for route: below a mount there are encrypt, decrypt, rewrap, datakey and keys, and below sys "
    "and auth what docs/vault-api.md lists; keys do not leave this service"
)
_ROUTING: Final = {
    404: ("not_found", "No such endpoint; see /docs", _NO_ROUTE),
    405: ("method_not_allowed", "This endpoint has other methods; see /docs", "unsupported operation"),
}


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """The content of an answer to an error. ``detail`` is ours, never a value of the caller."""

    answer: ErrorStatus
    code: str
    detail: str
    title: str = ""
    links: Mapping[str, str] | None = None
    job_id: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


def answer_of(kind: type[KmsError]) -> ErrorStatus:
    """The answer to a kind of error, which may be one that a backend added; 500 for an unknown one."""
    return next((ANSWERS[each] for each in kind.__mro__ if each in ANSWERS), ErrorStatus(500))


def answer(error: Exception) -> Response:
    """The problem for an error, with its headers."""
    return _problem(reply_to(error))


def problem(status: int, code: str, detail: str, headers: Mapping[str, str]) -> Response:
    """A problem that has no error, and is no denial."""
    return _problem(ErrorReply(ErrorStatus(status), code, detail, headers=headers))


def reply_to(error: Exception) -> ErrorReply:
    """The content of the answer to an error, once a denial is recorded; AuditUnavailable if that fails."""
    reply = _refusal(error)
    try:
        audit.record_denial(reply.code)
    except errors.AuditUnavailable as exc:
        return _refusal(exc)
    return reply


def vault_answer(error: Exception, status: int = 0) -> Response:
    """The answer of the Vault API to an error; ``status`` replaces the usual one."""
    reply = reply_to(error)
    body = wire.encode({"errors": [_vault_text(reply.answer, reply.detail)]})
    headers = {name: value for name, value in reply.headers.items() if name in _OF_VAULT}
    status = status or reply.answer.vault_status or reply.answer.status
    return Response(body, status, headers, media_type="application/json")


def vault_text(error: KmsError) -> str:
    """The text for one item of a batch of the Vault API."""
    detail = AWAY if isinstance(error, errors.BackendUnavailable) else error.detail
    return _vault_text(answer_of(type(error)), detail)


def retry_after(error: errors.Unavailable) -> str:
    """The wait in whole seconds, rounded up and at least 1."""
    return str(max(1, math.ceil(error.retry_after_s)))


def _refusal(error: Exception) -> ErrorReply:
    if isinstance(error, HTTPException):
        refused = (errors.InvalidRequest.code, "Refused", "")
        code, detail, vault = _ROUTING.get(error.status_code, refused)
        status = ErrorStatus(error.status_code, vault_detail=vault)
        return ErrorReply(status, code, detail, headers=error.headers or {})
    if isinstance(error, ClientDisconnect):  # the caller is gone and reads no answer
        return ErrorReply(
            ErrorStatus(400), errors.InvalidRequest.code, "The connection ended before the body did"
        )
    if not isinstance(error, KmsError):
        _log.error("request.crashed", error=type(error).__name__)
        return ErrorReply(ErrorStatus(500), KmsError.code, KmsError.summary)
    return _refusal_of(error)


def _refusal_of(known: KmsError) -> ErrorReply:
    _log.debug("request.refused", code=known.code)
    links, headers, detail = None, {}, known.detail
    if isinstance(known, errors.TooLarge):
        links = {"jobs": f"{wire.PREFIX}/jobs", "files": f"{wire.PREFIX}/files/encrypt"}
    if isinstance(known, errors.BackendUnavailable):  # its text names servers and settings of ours
        _log.warning("backend.unavailable", reason=detail)
        detail = f"{AWAY}; {KEPT}" if isinstance(known, NotRotated) else AWAY
    if isinstance(known, errors.Unavailable):
        headers["Retry-After"] = retry_after(known)
    if isinstance(known, errors.Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
        if known.ends_connection:
            headers["Connection"] = "close"
    job_id = known.job_id if isinstance(known, errors.DurabilityUnconfirmed) else ""
    return ErrorReply(answer_of(type(known)), known.code, detail, known.summary, links, job_id, headers)


def body_of(refusal: ErrorReply) -> wire.Problem:
    """The problem of a reply."""
    status = refusal.answer.status
    return wire.Problem(
        type=f"urn:kms-service:problem:{refusal.code}",
        title=refusal.title or http.HTTPStatus(status).phrase,
        status=status,
        detail=refusal.detail,
        code=refusal.code,
        request_id=audit.request_id.get(),
        links=dict(refusal.links) if refusal.links else UNSET,
        job_id=refusal.job_id or UNSET,
    )


def _problem(refusal: ErrorReply) -> Response:
    body = wire.encode(body_of(refusal))
    return Response(body, refusal.answer.status, refusal.headers, media_type=MEDIA_TYPE)


def _vault_text(made: ErrorStatus, detail: str) -> str:
    detail = made.vault_detail or detail
    return f"{made.vault_words}: {detail}" if made.vault_words else detail
