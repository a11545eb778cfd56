"""Requests of the API as values, with the type of their answers, and the error that an answer means.

Does no I/O. Paths are those below the prefix of the API. Contexts are checked before a request is sent.
"""

import re
import uuid
from base64 import b64decode
from collections.abc import Mapping
from datetime import datetime
from http import HTTPStatus
from typing import Final, Generic, TypedDict, TypeVar
from urllib.parse import quote

import msgspec

from kms_protocol import admin, errors, units, wire
from kms_protocol.context import Context
from kms_protocol.errors import EXIT_OTHER, InvalidRequest, KmsError, Unavailable
from kms_protocol.units import time_text
from kms_protocol.wire import PREFIX, ContextIn, Hidden

T = TypeVar("T")

# Errors from answers outside 2xx.
#
# The ``code`` of a problem selects the class of kms_protocol.errors; if two classes share a code, the one
# deeper in the tree. Subclasses in other modules are ignored. A code that this version does not know keeps
# its text and becomes UnexpectedAnswer, or Unavailable for a retryable status.

START_HINT: Final = "start it with `kms up`, or name its address with --url or KMS_SERVICE_URL"
RETRYABLE: Final = frozenset(
    {
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)
BY_CODE: Final[Mapping[str, type[KmsError]]] = {  # a subclass comes later, and replaces its parent
    kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, KmsError)
}
JSON: Final = "application/json"
_DIGEST: Final = re.compile("sha-256=:([A-Za-z0-9+/]{43}=):")  # RFC 9530 §3
_HASHED_BYTES_PER_S: Final = 50_000_000  # by any service


class ServiceUnreachable(Unavailable):
    """No answer from the address, or a truncated one. ``hint`` says what to do."""

    code = "service_unreachable"
    summary = "The service does not answer"

    def __init__(self, detail: str = "", *, hint: str = START_HINT, retry_after_s: float = 0.1) -> None:
        super().__init__(detail, retry_after_s=retry_after_s)
        self.hint = hint


class UnexpectedAnswer(KmsError):
    """An answer that does not follow this API: from another server, a proxy, or another version."""

    code = "unexpected_answer"
    summary = "The answer is not one of this service"
    exit_code = EXIT_OTHER


class NotThisService(UnexpectedAnswer):
    """Another program has the port of the default address."""

    hint = "start it with `kms up --port 8090`, or name its address with --url or KMS_SERVICE_URL"


class Reply(Hidden, frozen=True):
    """A whole answer. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def retry_after_s(self) -> float | None:
        """Return the seconds of Retry-After; None if unusable."""
        return units.retry_after_s(self.headers.get("retry-after", "").strip())


def decoded(data: bytes, shape: type[T], what: str) -> T:
    """Decode an answer. Raises UnexpectedAnswer, which begins with ``what``, for another shape."""
    try:
        return msgspec.json.decode(data, type=shape)
    except wire.NOT_JSON as exc:
        raise UnexpectedAnswer(f"{what} does not have the shape of this API") from exc


def coded_error(code: str) -> KmsError:
    """Return the error of a code, as in a failed item, with its hint."""
    kind = BY_CODE.get(code)
    return _with_hint(kind() if kind else UnexpectedAnswer(f"The service answered with code {code}"), code)


def _with_hint(error: KmsError, code: str) -> KmsError:
    from kms_protocol.error_texts import NO_TEXT, TEXTS  # noqa: PLC0415 -- for an error alone

    error.hint = error.hint or TEXTS.get(code, NO_TEXT).hint
    return error


def job_error(job: wire.JobOut) -> KmsError | None:
    """Return the error of a failed or cancelled job, with detail and hint of the service, else None."""
    if job.state not in {"failed", "cancelled"}:
        return None
    reason = job.error or wire.JobError(code="cancelled" if job.state == "cancelled" else "internal")
    error = coded_error(reason.code)
    error.detail = reason.detail or error.detail
    error.args = (error.detail,)
    error.hint = reason.hint or error.hint
    return error


def answer_error(reply: Reply) -> KmsError:
    """Return the error of an answer outside 2xx, with the request id as a note."""
    try:
        problem = msgspec.json.decode(reply.body, type=wire.Problem)
    except wire.NOT_JSON:
        return _foreign_error(reply)
    unknown: type[KmsError] = Unavailable if reply.status in RETRYABLE else UnexpectedAnswer
    error = BY_CODE.get(problem.code, unknown)(problem.detail)
    if isinstance(error, Unavailable):
        error.retry_after_s = reply.retry_after_s() or error.retry_after_s
    error.add_note(f"request id {problem.request_id}")
    return _with_hint(error, problem.code)


def _foreign_error(reply: Reply) -> KmsError:
    if reply.status in RETRYABLE:
        return Unavailable(f"A proxy answered {reply.status}: is the service running")
    return UnexpectedAnswer(f"The address answered {reply.status} without a problem document of this service")


class JobOptions(TypedDict, total=False):
    """Options of the job of an upload, as in ``JobIn``."""

    priority: wire.Priority | None
    callback: str | None
    start_by: datetime | None
    run_by: datetime | None
    keep_for: int | None


class UploadOptions(JobOptions, total=False):
    """``idempotency_key`` makes it safe to repeat an upload after a crash of the caller.

    All others are those of ``JobIn``.
    """

    context: ContextIn
    key_id: str | None
    group: wire.GroupIn | None
    labels: Mapping[str, str] | None
    metadata: Mapping[str, str] | None
    release: wire.Release | None
    idempotency_key: str | None


class RewrapOptions(TypedDict, total=False):
    """``new_context`` replaces the context, ``key_id`` the key."""

    context: ContextIn
    new_context: ContextIn
    key_id: str | None


class ClientRequest(Hidden, Generic[T], frozen=True):
    """One request. ``also`` is a status outside 2xx whose body is an answer, not a problem.

    A call that is not ``repeatable`` may have had its effect even if no answer arrives. The service may wait
    for ``wait_s`` seconds before it answers.
    """

    method: str
    path: str
    answer: type[T]
    body: bytes | None = None
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)
    also: HTTPStatus | None = None
    repeatable: bool = True
    wait_s: int = 0

    def is_answer(self, status: int) -> bool:
        return HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES or status == self.also

    def read(self, reply: Reply) -> T:
        """Decode the answer. Raises the KmsError of a problem, UnexpectedAnswer for another shape."""
        if not self.is_answer(reply.status):
            raise answer_error(reply)
        return decoded(reply.body, self.answer, f"The answer to {self.path}")


def get(
    path: str, answer: type[T], query: Mapping[str, object] | None = None, *, wait_s: int = 0
) -> ClientRequest[T]:
    """GET a resource. Values of the query that are None are left out."""
    given = {**(query or {}), "wait": wait_s or None}
    return ClientRequest("GET", PREFIX + path + _query(given), answer, wait_s=wait_s)


def post(
    path: str,
    body: wire.Body,
    answer: type[T],
    headers: Mapping[str, str] | None = None,
    *,
    wait_s: int = 0,
) -> ClientRequest[T]:
    """POST a body, whose contexts are checked. Raises InvalidContext."""
    for name in ("context", "new_context"):
        Context.parse(getattr(body, name, None))
    url = PREFIX + path + _query({"wait": wait_s or None})
    sent = {"Content-Type": JSON, **(headers or {})}
    return ClientRequest("POST", url, answer, body=wire.encode(body), headers=sent, wait_s=wait_s)


def _query(given: Mapping[str, object]) -> str:
    """Return a query string of the values that are not None, with its question mark; empty without any.

    A list gives its name once for each value.
    """
    pairs = [
        f"{name}={quote(str(each), safe='')}"
        for name, value in given.items()
        for each in (value if isinstance(value, list) else [value])
        if each is not None
    ]
    return "?" + "&".join(pairs) if pairs else ""


def health() -> ClientRequest[admin.HealthOut]:
    """Request the health of the backend. The body of a 503 is an answer that names the unhealthy backend."""
    unhealthy = HTTPStatus.SERVICE_UNAVAILABLE
    return ClientRequest("GET", f"{PREFIX}/health", admin.HealthOut, also=unhealthy)


def path_of(collection: str, name: str, below: str = "") -> str:
    """Return the path of a resource, or of one below it. Raises InvalidRequest for an empty name."""
    if not name:
        raise InvalidRequest(f"A name or an id is needed for {collection}")
    return f"{collection}/{quote(name, safe='')}{below}"


def rotate(key_id: str) -> ClientRequest[admin.RotateOut]:
    """Request a new key version. Not repeatable: each call creates one."""
    path = path_of("/keys", key_id, "/rotate")
    return ClientRequest("POST", PREFIX + path, admin.RotateOut, repeatable=False)


def job(job_id: str, wait_s: int) -> ClientRequest[wire.JobOut]:
    """GET /jobs/{job_id}: now, or at its end if that comes within ``wait_s`` seconds."""
    return get(path_of("/jobs", job_id), wire.JobOut, wait_s=wait_s)


def change_job(method: str, job_id: str, below: str = "") -> ClientRequest[wire.JobOut]:
    """Request a change of a job, without a body. Raises InvalidRequest without an id."""
    return ClientRequest(method, PREFIX + path_of("/jobs", job_id, below), wire.JobOut)


def result(job_id: str, headers: Mapping[str, str] | None = None) -> ClientRequest[bytes]:
    """GET /jobs/{job_id}/result."""
    path = path_of("/jobs", job_id, "/result")
    return ClientRequest("GET", PREFIX + path, bytes, headers=headers or {})


class DigestRequest(ClientRequest[bytes], frozen=True):
    """HEAD of a result, whose answer has its SHA-256: 32 bytes, or none where the service gives none."""

    def read(self, reply: Reply) -> bytes:
        if not self.is_answer(reply.status):
            raise answer_error(reply)
        match = _DIGEST.search(reply.headers.get("repr-digest", ""))
        return b64decode(match[1]) if match else b""


def result_digest(job_id: str, size_bytes: int) -> ClientRequest[bytes]:
    """Request the digest of a result of this size. The service reads all of it before it answers."""
    path, wanted = path_of("/jobs", job_id, "/result"), {"Want-Repr-Digest": "sha-256=1"}
    wait_s = size_bytes // _HASHED_BYTES_PER_S
    return DigestRequest("HEAD", PREFIX + path, bytes, headers=wanted, wait_s=wait_s)


def upload(kind: wire.JobKind, options: UploadOptions) -> ClientRequest[wire.JobAccepted]:
    """Begin an upload. Context and key id are sent in headers, never in the query string."""
    headers = {
        "Content-Type": "application/octet-stream",
        "Idempotency-Key": options.get("idempotency_key") or str(uuid.uuid4()),
    }
    if pairs := Context.parse(options.get("context")).pairs:
        headers["X-KMS-Context"] = json_header(dict(pairs))
    for name in ("key_id", "priority", "callback", "release", "start_by", "run_by", "keep_for"):
        if value := options.get(name):
            text = time_text(value, "microseconds") if isinstance(value, datetime) else str(value)
            headers[f"X-KMS-{name.title().replace('_', '-')}"] = text
    if labels := options.get("labels"):
        text = ",".join(f"{name}={value}" for name, value in labels.items())
        headers["X-KMS-Labels"] = quote(text, safe="")
    for name in ("group", "metadata"):
        if value := options.get(name):
            headers[f"X-KMS-{name.title()}"] = json_header(value)
    return ClientRequest("POST", f"{PREFIX}/files/{kind}", wire.JobAccepted, headers=headers)


def json_header(value: object) -> str:
    """Return a value as percent-encoded JSON."""
    return quote(wire.encode(value), safe="")
