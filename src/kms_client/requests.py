"""Requests of the API as values, with the type of their answers. Does no I/O.

Contexts are checked before a request is sent: each function raises InvalidContext.
"""

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from http import HTTPStatus
from typing import Final, Generic, TypedDict, TypeVar
from urllib.parse import quote

import msgspec

from kms_client.problems import Reply, UnexpectedAnswer, error_of
from kms_protocol import admin, job_groups, shapes, wire
from kms_protocol.context import Context
from kms_protocol.errors import InvalidContext, InvalidRequest
from kms_protocol.units import time_text
from kms_protocol.wire import PREFIX, ContextIn

T = TypeVar("T")

JSON: Final = "application/json"


class JobOptions(TypedDict, total=False):
    """Options of the job of an upload, as in ``JobIn``."""

    priority: wire.Priority | None
    callback: str | None
    start_by: datetime | None
    run_by: datetime | None
    keep_for: int | None


class UploadOptions(JobOptions, total=False):
    """``idempotency_key`` makes it safe to repeat an upload after a crash of the caller.

    ``group``, ``labels``, ``metadata`` and ``release`` are those of ``JobIn``.
    """

    group: job_groups.GroupIn | None
    labels: Mapping[str, str] | None
    metadata: Mapping[str, str] | None
    release: wire.Release | None
    idempotency_key: str | None


@dataclass(frozen=True, slots=True)
class ClientRequest(Generic[T]):
    """One request. ``also`` lists statuses outside 2xx whose body is an answer, not a problem.

    A call that is not ``repeatable`` may have had its effect even if no answer arrives. The service may wait
    for ``wait_s`` seconds before it answers.
    """

    method: str
    path: str
    answer: type[T]
    body: bytes | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    also: frozenset[int] = frozenset()
    repeatable: bool = True
    wait_s: int = 0

    def is_answer(self, status: int) -> bool:
        return HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES or status in self.also

    def read(self, reply: Reply) -> T:
        """Decode the answer. Raises the KmsError of a problem, UnexpectedAnswer for another shape."""
        if not self.is_answer(reply.status):
            raise error_of(reply)
        try:
            return msgspec.json.decode(reply.body, type=self.answer)
        except wire.NOT_JSON as exc:
            raise UnexpectedAnswer(f"The answer to {self.path} does not have the shape of this API") from exc


def _post(
    path: str, body: shapes.Body, answer: type[T], headers: Mapping[str, str] | None = None
) -> ClientRequest[T]:
    sent = {"Content-Type": JSON, **(headers or {})}
    return ClientRequest("POST", PREFIX + path, answer, body=wire.encode(body), headers=sent)


def encrypt(plaintext: bytes, context: ContextIn, key_id: str | None) -> ClientRequest[wire.EncryptOut]:
    """POST /encrypt. Raises InvalidContext."""
    Context.parse(context)
    body = wire.EncryptIn(plaintext=plaintext, context=context, key_id=key_id)
    return _post("/encrypt", body, wire.EncryptOut)


def decrypt(ciphertext: bytes, context: ContextIn, key_id: str | None) -> ClientRequest[wire.DecryptOut]:
    """POST /decrypt. Raises InvalidContext."""
    Context.parse(context)
    body = wire.DecryptIn(ciphertext=ciphertext, context=context, key_id=key_id)
    return _post("/decrypt", body, wire.DecryptOut)


def generate_data_key(
    spec: wire.KeySpec, context: ContextIn, key_id: str | None, *, without_plaintext: bool
) -> ClientRequest[wire.GenerateKeyOut]:
    """POST /generate-key. Raises InvalidContext."""
    Context.parse(context)
    body = wire.GenerateKeyIn(
        key_spec=spec, context=context, key_id=key_id, without_plaintext=without_plaintext or None
    )
    return _post("/generate-key", body, wire.GenerateKeyOut)


def rewrap(
    ciphertext: bytes, context: ContextIn, new_context: ContextIn, key_id: str | None
) -> ClientRequest[wire.EncryptOut]:
    """POST /rewrap. Raises InvalidContext."""
    Context.parse(context)
    Context.parse(new_context)
    body = wire.RewrapIn(ciphertext=ciphertext, context=context, new_context=new_context, key_id=key_id)
    return _post("/rewrap", body, wire.EncryptOut)


def wrap(file_key: bytes, context: ContextIn, key_id: str | None) -> ClientRequest[wire.WrapOut]:
    """POST /wrap. Raises InvalidContext."""
    Context.parse(context)
    return _post("/wrap", wire.WrapIn(file_key=file_key, context=context, key_id=key_id), wire.WrapOut)


def unwrap(stanzas: bytes, context: ContextIn, key_id: str | None) -> ClientRequest[wire.UnwrapOut]:
    """POST /unwrap. Raises InvalidContext."""
    Context.parse(context)
    return _post("/unwrap", wire.UnwrapIn(stanzas=stanzas, context=context, key_id=key_id), wire.UnwrapOut)


def batch(operation: wire.JobKind, items: Iterable[wire.BatchItem]) -> ClientRequest[wire.BatchOut]:
    """POST /batch."""
    return _post("/batch", wire.BatchIn(operation=operation, items=list(items)), wire.BatchOut)


def health() -> ClientRequest[admin.HealthOut]:
    """Request the health of the backend. The body of a 503 is an answer that names the unhealthy backend."""
    unhealthy = frozenset({HTTPStatus.SERVICE_UNAVAILABLE.value})
    return ClientRequest("GET", f"{PREFIX}/health", admin.HealthOut, also=unhealthy)


def status() -> ClientRequest[admin.StatusOut]:
    """GET /status."""
    return ClientRequest("GET", f"{PREFIX}/status", admin.StatusOut)


def keys() -> ClientRequest[admin.KeysOut]:
    """GET /keys."""
    return ClientRequest("GET", f"{PREFIX}/keys", admin.KeysOut)


def key(key_id: str) -> ClientRequest[admin.KeyOut]:
    """GET /keys/{key_id}."""
    return ClientRequest("GET", _key_path(key_id), admin.KeyOut)


def rotate(key_id: str) -> ClientRequest[admin.RotateOut]:
    """Request a new key version. Not repeatable: each call creates one."""
    return ClientRequest("POST", f"{_key_path(key_id)}/rotate", admin.RotateOut, repeatable=False)


def _key_path(key_id: str) -> str:
    if not key_id:
        raise InvalidRequest("A key id is needed")
    return f"{PREFIX}/keys/{quote(key_id, safe='')}"


def audit(after: str | None, limit: int | None, filters: Mapping[str, str]) -> ClientRequest[admin.AuditOut]:
    """GET /audit."""
    given = {"after": after, "limit": limit, **filters}
    return ClientRequest("GET", f"{PREFIX}/audit{_query(given)}", admin.AuditOut)


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


def submit(job: wire.JobIn, idempotency_key: str | None, wait_s: int) -> ClientRequest[wire.JobAccepted]:
    """Submit a job. All attempts send the same Idempotency-Key."""
    Context.parse(job.context)
    Context.parse(job.new_context)
    headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
    call = _post(f"/jobs{_query({'wait': wait_s or None})}", job, wire.JobAccepted, headers)
    return replace(call, wait_s=wait_s)


def job_path(job_id: str, below: str = "") -> str:
    """Return the path of a job, or of a resource below it. Raises InvalidRequest without an id."""
    if not job_id:
        raise InvalidRequest("A job id is needed")
    return f"{PREFIX}/jobs/{quote(job_id, safe='')}{below}"


def job(job_id: str, wait_s: int = 0) -> ClientRequest[wire.JobOut]:
    """GET /jobs/{job_id}."""
    path = job_path(job_id) + _query({"wait": wait_s or None})
    return ClientRequest("GET", path, wire.JobOut, wait_s=wait_s)


def many(job_ids: Iterable[str]) -> ClientRequest[wire.JobsOut]:
    """POST /jobs/status."""
    return _post("/jobs/status", wire.JobsIn(job_ids=list(job_ids)), wire.JobsOut)


def group(name: str, wait_s: int = 0) -> ClientRequest[job_groups.GroupOut]:
    """GET /job-groups/{name}."""
    path = f"{PREFIX}/job-groups/{quote(name, safe='')}{_query({'wait': wait_s or None})}"
    return ClientRequest("GET", path, job_groups.GroupOut, wait_s=wait_s)


def release(job_id: str) -> ClientRequest[wire.JobOut]:
    """DELETE /jobs/{job_id}/result."""
    return ClientRequest("DELETE", job_path(job_id, "/result"), wire.JobOut)


def cancel(job_id: str) -> ClientRequest[wire.JobOut]:
    """DELETE /jobs/{job_id}."""
    return ClientRequest("DELETE", job_path(job_id), wire.JobOut)


def retry(job_id: str) -> ClientRequest[wire.JobOut]:
    """POST /jobs/{job_id}/retry."""
    return ClientRequest("POST", f"{job_path(job_id)}/retry", wire.JobOut)


def dead(limit: int) -> ClientRequest[wire.JobList]:
    """GET /jobs/dead."""
    return ClientRequest("GET", f"{PREFIX}/jobs/dead?limit={limit}", wire.JobList)


def jobs(
    state: wire.JobState | None, labels: Mapping[str, str] | None, limit: int | None, cursor: str | None
) -> ClientRequest[wire.JobList]:
    """GET /jobs."""
    named = [f"{name}={value}" for name, value in (labels or {}).items()]
    given = {"state": state, "label": named, "limit": limit, "cursor": cursor}
    return ClientRequest("GET", f"{PREFIX}/jobs{_query(given)}", wire.JobList)


def result(job_id: str, headers: Mapping[str, str]) -> ClientRequest[bytes]:
    """GET /jobs/{job_id}/result."""
    return ClientRequest("GET", job_path(job_id, "/result"), bytes, headers=headers)


def upload(
    kind: wire.JobKind, context: ContextIn, key_id: str | None, options: UploadOptions
) -> ClientRequest[wire.JobAccepted]:
    """Begin an upload. Context and key id are sent in headers, never in the query string."""
    headers = {
        "Content-Type": "application/octet-stream",
        "Idempotency-Key": options.get("idempotency_key") or str(uuid.uuid4()),
    }
    if text := header_text(context):
        headers["X-KMS-Context"] = text
    if key_id:
        headers["X-KMS-Key-Id"] = key_id
    for name in ("priority", "callback", "release", "start_by", "run_by", "keep_for"):
        if value := options.get(name):
            text = time_text(value, "microseconds") if isinstance(value, datetime) else str(value)
            headers[f"X-KMS-{name.title().replace('_', '-')}"] = text
    if labels := options.get("labels"):
        text = ",".join(f"{name}={value}" for name, value in labels.items())
        headers["X-KMS-Labels"] = quote(text, safe="")
    if group_in := options.get("group"):
        headers["X-KMS-Group"] = quote(wire.encode(group_in), safe="")
    if metadata := options.get("metadata"):
        headers["X-KMS-Metadata"] = quote(wire.encode(metadata), safe="")
    return ClientRequest("POST", f"{PREFIX}/files/{kind}", wire.JobAccepted, headers=headers)


def header_text(context: ContextIn) -> str:
    """Return a context as percent-encoded ``key=value,…``, or as JSON if that form is ambiguous."""
    if not context:
        return ""
    pairs = Context.parse(context).pairs
    plain = ",".join(f"{key}={value}" for key, value in pairs)
    try:
        is_exact = not plain.startswith("{") and Context.parse(plain).pairs == pairs
    except InvalidContext:
        is_exact = False
    return quote(plain if is_exact else wire.encode(dict(pairs)).decode(), safe="")
