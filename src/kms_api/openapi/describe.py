"""Parts of the OpenAPI document that several routes share: parameters, bodies, answers and errors.

``scripts/openapi_document.py`` builds the document from them, and from what each route declares.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final, get_args

from kms_protocol import errors, wire
from kms_protocol.context import MAX_BYTES

Json = dict[str, Any]
JSON: Final = "application/json"
NDJSON: Final = "application/x-ndjson"
BINARY: Final = "application/octet-stream"
STRING: Final[Json] = {"type": "string"}
BYTES: Final = {"type": "string", "format": "binary"}
"""Raw bytes, as in OpenAPI 3.0: all client generators know this form."""
TAKES_BYTES: Final[Json] = {"required": True, "content": {BINARY: {"schema": BYTES}}}
WAIT_S: Final = (0, 0, 60)

# -- groups of errors, shared by routes ----------------------------------------------------------------

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
JOBS: Final = (errors.JobsUnavailable, errors.RedisFull, errors.RedisReadOnly)
ONE_JOB: Final = (*JOBS, errors.UnknownJob)
ONE_RESULT: Final = (
    *ONE_JOB,
    errors.JobNotFinished,
    errors.ResultExpired,
    errors.ResultReleased,
    errors.SpoolUnavailable,
)
SUBMITTING: Final = (
    *BODY,
    *JOBS,
    errors.InvalidContext,
    errors.InvalidDeadline,
    errors.ContextRequired,
    errors.UnknownKey,
    errors.GroupComplete,
    errors.IdempotencyConflict,
    errors.DurabilityUnconfirmed,
    errors.RateLimited,
    errors.TenantShare,
    errors.SpoolFull,
    errors.SpoolUnavailable,
    errors.SpoolQuota,
    errors.WrongInstall,
)


# -- bodies --------------------------------------------------------------------------------------------


def header_ref(name: str) -> Json:
    """Return a reference to a response header."""
    return {"$ref": f"#/components/headers/{name}"}


def ref(shape: type[wire.Shape]) -> Json:
    """Return a reference to the schema of a shape."""
    return {"$ref": f"#/components/schemas/{shape.__name__}"}


def gives(shape: type[wire.Answer], text: str, *headers: str) -> Json:
    """A JSON answer."""
    return raw(text, {JSON: {"schema": ref(shape)}}, *headers)


def raw(text: str, content: Json, *headers: str) -> Json:
    """An answer with any media types; ``headers`` are names that ``openapi_document.py`` describes."""
    return {"description": text, "headers": {name: header_ref(name) for name in headers}, "content": content}


def lines(shape: type[wire.Shape]) -> Json:
    """Return the schema of NDJSON whose lines have a shape."""
    return {"type": "string", "contentMediaType": NDJSON, "contentSchema": ref(shape)}


SUBMITTED: Final[Mapping[int, Json]] = {
    202: {
        **gives(
            wire.JobAccepted, "The job is stored durably", "Location", "Retry-After", "Idempotency-Replayed"
        ),
        "links": {
            name: {"operationId": name, "parameters": {"job_id": "$response.body#/job_id"}}
            for name in ("get_job", "job_result", "cancel_job")
        },
    },
    200: {
        **gives(wire.JobAccepted, "The job has ended: a JobOut", "Location", "Idempotency-Replayed"),
        "content": {JSON: {"schema": ref(wire.JobAccepted), "x-kms-shape": ref(wire.JobOut)}},
    },
}
"""The answers to a submission: 200 to one with ``?wait=`` whose job has ended.

Generated clients take all good answers of an operation for one type: it is that of 202.
"""


# -- parameters and headers ----------------------------------------------------------------------------


def query(name: str, schema: Json, text: str) -> Json:
    """Return an optional query parameter."""
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": text}


def header(name: str, schema: Json, text: str) -> Json:
    """Return an optional header parameter."""
    return {"name": name, "in": "header", "required": False, "schema": schema, "description": text}


def whole(default: int, minimum: int, maximum: int) -> Json:
    """Return the schema of an integer with a default and bounds."""
    return {"type": "integer", "minimum": minimum, "maximum": maximum, "default": default}


def choice(values: Iterable[str]) -> Json:
    """Return the schema of a string that is one of some values."""
    return {"type": "string", "enum": list(values)}


def text_of(most: int) -> Json:
    """Return the schema of a string of at most so many characters."""
    return {"type": "string", "maxLength": most}


WAIT: Final = query(
    "wait",
    whole(*WAIT_S),
    "Seconds to wait for the end of the job; the answer comes as soon as it has ended",
)
IDEMPOTENCY: Final = header(
    "Idempotency-Key", text_of(256), "A repeated submission with the same key and body returns the first job"
)
_NAME: Final = {"type": "string", "pattern": wire.KEY_ID_PATTERN}
KEY_ID: Final = header("X-KMS-Key-Id", _NAME, "The key id; absent means the default key")
OPTIONS: Final = (
    header(
        "X-KMS-Context",
        text_of(MAX_BYTES * 3),
        "The encryption context: `k=v,…` or a JSON object, percent-encoded UTF-8",
    ),
    KEY_ID,
    header(
        "X-KMS-Priority",
        choice(wire.PRIORITIES),  # no default: generated clients would always send it
        "Priority among waiting jobs; absent means normal",
    ),
    header("X-KMS-Callback", _NAME, "A webhook endpoint of the settings, called when the job ends"),
    header(
        "X-KMS-Release",
        choice(get_args(wire.Release)),
        "Deletes the result a minute after it was fetched whole; absent keeps it until the job expires",
    ),
    header(
        "X-KMS-Labels",
        text_of(4096),
        "Labels by which jobs are listed: `name=value,…`, percent-encoded UTF-8",
    ),
    header(
        "X-KMS-Metadata",
        text_of(32768),
        "Texts that answers and events repeat: a JSON object of strings, percent-encoded UTF-8",
    ),
    header(
        "X-KMS-Start-By",
        text_of(64),
        "The job fails if it has not started by this RFC 3339 time; absent means the default of the service",
    ),
    header(
        "X-KMS-Run-By",
        text_of(64),
        "The job fails if it has not ended by this RFC 3339 time; absent means the default of the service",
    ),
    header(
        "X-KMS-Keep-For",
        {"type": "integer", "minimum": 60},
        "Seconds for which the result is kept; absent means the default of the service",
    ),
    header("X-KMS-Group", text_of(2048), "The group of the job: `GroupIn` as JSON, percent-encoded UTF-8"),
)
"""Options of streamed bodies. Proxies log query strings, so these are headers."""
STREAMED: Final = (*OPTIONS, IDEMPOTENCY)
LABEL: Final = query(
    "label",
    {"type": "array", "items": STRING, "maxItems": wire.MOST_LABELS},
    "Only jobs with this label, as `name=value`; repeat it for jobs that have them all",
)
