"""What a route says of itself on the OpenAPI page: what it takes, what it answers, and how it may refuse.

Knows no route; ``document.py`` makes the page of what routes say here.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final, TypedDict, Unpack

from kms_api.errors import problems
from kms_protocol import errors, wire
from kms_protocol.context import MAX_BYTES
from kms_protocol.errors import KmsError

Json = dict[str, Any]
JSON: Final = "application/json"
NDJSON: Final = "application/x-ndjson"
BINARY: Final = "application/octet-stream"
EVENTS: Final = "text/event-stream"
TEXT: Final = "text/plain"

# -- how calls are refused, as groups that routes share ------------------------------------------------

BODY: Final = (errors.InvalidRequest, errors.TooLarge, errors.BodyTimeout)
SEALING: Final = (
    errors.InvalidContext,
    errors.ContextRequired,
    errors.UnknownKey,
    errors.BackendUnavailable,
)
OPENING: Final = (
    errors.InvalidContext,
    errors.NotACiphertext,
    errors.DecryptFailed,
    errors.ForeignRefused,
    errors.UnknownKey,
    errors.BackendUnavailable,
)
JOBS: Final = (errors.JobsUnavailable,)
ONE_JOB: Final = (*JOBS, errors.UnknownJob)
SUBMITTING: Final = (
    *BODY,
    *JOBS,
    errors.InvalidContext,
    errors.ContextRequired,
    errors.UnknownKey,
    errors.IdempotencyConflict,
    errors.RateLimited,
    errors.SpoolFull,
)


class Parts(TypedDict, total=False):
    """What an operation consists of. ``answers`` are by status; the first is the one of success."""

    body: Json
    parameters: Iterable[Json]
    answers: Mapping[int, Json]
    refuses: Iterable[type[KmsError]]


def described(operation_id: str, **parts: Unpack[Parts]) -> Json:
    """FastAPI's arguments of a route, of which ``openapi_extra`` is for ``document.page``."""
    answers = parts["answers"]
    extra: Json = {
        "responses": {str(status): answer for status, answer in answers.items()},
        "x-kms-refuses": sorted({*parts.get("refuses", ())}, key=lambda kind: kind.code),
    }
    if "parameters" in parts:
        extra["parameters"] = list(parts["parameters"])
    if "body" in parts:
        extra["requestBody"] = parts["body"]
    return {
        "openapi_extra": extra,
        "operation_id": operation_id,
        "response_model": None,
        "status_code": next(iter(answers)),
    }


# -- bodies --------------------------------------------------------------------------------------------


def ref(shape: type[wire.Shape]) -> Json:
    return {"$ref": f"#/components/schemas/{shape.__name__}"}


def takes(shape: type[wire.Body], example: Json, *, required: bool = True) -> Json:
    """A JSON body."""
    return {"required": required, "content": {JSON: {"schema": ref(shape), "example": example}}}


BYTES: Final = {"type": "string", "format": "binary"}
"""Bytes as they are: what OpenAPI 3.0 wrote for them and every generator of clients knows."""
TAKES_BYTES: Final[Json] = {"required": True, "content": {BINARY: {"schema": BYTES}}}


def gives(shape: type[wire.Answer], text: str, *headers: str) -> Json:
    """A JSON answer."""
    return raw(text, {JSON: {"schema": ref(shape)}}, *headers)


def raw(text: str, content: Json, *headers: str) -> Json:
    """An answer of other media types; ``headers`` are names of those in ``HEADERS``."""
    return {"description": text, "headers": {name: header_ref(name) for name in headers}, "content": content}


def accepted() -> Json:
    """The answer to every submission."""
    said = gives(wire.JobAccepted, "The job survives any process from now on", "Location", "Retry-After")
    return {**said, "links": {name: _of_job(name) for name in ("get_job", "job_result", "cancel_job")}}


def _of_job(operation_id: str) -> Json:
    return {"operationId": operation_id, "parameters": {"job_id": "$response.body#/job_id"}}


# -- refusals ------------------------------------------------------------------------------------------


def codes(refuses: Iterable[type[KmsError]]) -> dict[int, dict[str, str]]:
    """The codes of each status, and what each means."""
    found: dict[int, dict[str, str]] = {}
    for kind in refuses:
        found.setdefault(problems.STATUS.get(kind, 500), {})[kind.code] = kind.summary
    return found


def refusal(status: int, means: Mapping[str, str], *headers: str) -> Json:
    """Problems of one status; ``x-kms-codes`` are all that it is answered with."""
    examples = {code: {"summary": text, "value": _problem(status, code)} for code, text in means.items()}
    text = ". ".join(f"`{code}`: {text}" for code, text in means.items())
    content = {problems.MEDIA_TYPE: {"schema": ref(wire.Problem), "examples": examples}}
    return {**raw(text, content, *headers), "x-kms-codes": list(means)}


def _problem(status: int, code: str) -> Json:
    return {
        "type": f"urn:kms-service:problem:{code}",
        "title": "A few words",
        "status": status,
        "detail": "What to do next",
        "code": code,
        "request_id": "5f0d6a9c1b7e4d2f8a3c0e9b7d6f5a41",
    }


# -- parameters and headers ----------------------------------------------------------------------------


def query(name: str, schema: Json, text: str) -> Json:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": text}


def header(name: str, schema: Json, text: str) -> Json:
    return {"name": name, "in": "header", "required": False, "schema": schema, "description": text}


def whole(least: int, most: int, default: int) -> Json:
    return {"type": "integer", "minimum": least, "maximum": most, "default": default}


IDEMPOTENCY: Final = header(
    "Idempotency-Key",
    {"type": "string", "maxLength": 256},
    "A repeated submission with the same key and body is answered with the first one's job",
)
STREAMED: Final = (
    header(
        "X-KMS-Context",
        {"type": "string", "maxLength": MAX_BYTES * 3},
        "The encryption context: `k=v,…` or a JSON object, percent-encoded UTF-8",
    ),
    header(
        "X-KMS-Key-Id",
        {"type": "string", "pattern": wire.KEY_ID_PATTERN},
        "The key id; absent means the default key",
    ),
    header(
        "X-KMS-Priority",
        {"enum": list(wire.PRIORITIES)},  # no default: generated clients would send it with every call
        "Before or after other jobs; absent means normal",
    ),
    header(
        "X-KMS-Callback",
        {"type": "string", "pattern": wire.KEY_ID_PATTERN},
        "An endpoint of the service's settings, which is told how the job ends",
    ),
    IDEMPOTENCY,
)
"""What a streamed body has no room for; never in the query string, which proxies log."""

_SECONDS: Final = {"type": "integer", "minimum": 1}
_TEXT: Final = {"type": "string"}
HEADERS: Final[dict[str, Json]] = {
    "X-Request-Id": {
        "description": "The caller's, if it is 1 to 64 of `A-Za-z0-9_.-`, else a new one",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
    },
    "X-KMS-Audit-Id": {
        "description": "The audit record of this call, if it made one: `kms audit receipt` proves it",
        "schema": _TEXT,
    },
    "Cache-Control": {"description": "Nothing is kept by caches", "required": True, "schema": _TEXT},
    "Retry-After": {"description": "Seconds to wait before asking again", "schema": _SECONDS},
    "Location": {
        "description": "The path of the job",
        "required": True,
        "schema": {"type": "string", "format": "uri-reference"},
    },
    "WWW-Authenticate": {"description": "Always `Bearer`", "required": True, "schema": {"const": "Bearer"}},
    "ETag": {"description": "Changes with the bytes of the result; for `If-Range`", "schema": _TEXT},
    "Accept-Ranges": {"description": "Ranges of bytes", "schema": {"const": "bytes"}},
    "Content-Range": {"description": "Which bytes, of how many", "schema": _TEXT},
    "Content-Disposition": {"description": "A browser saves it", "schema": {"const": "attachment"}},
    "X-Accel-Buffering": {"description": "Proxies pass events on at once", "schema": {"const": "no"}},
}
EVERYWHERE: Final = ("X-Request-Id", "X-KMS-Audit-Id", "Cache-Control")


def header_ref(name: str) -> Json:
    return {"$ref": f"#/components/headers/{name}"}
