"""Requests of the API as values, with the type of their answers. Does no I/O.

Paths are those below the prefix of the API. Contexts are checked before a request is sent.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from http import HTTPStatus
from typing import Final, Generic, TypedDict, TypeVar
from urllib.parse import quote

from kms_client.problems import Reply, decoded, error_of
from kms_protocol import admin, job_groups, shapes, wire
from kms_protocol.context import Context
from kms_protocol.errors import InvalidRequest
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
    """One request. ``also`` is a status outside 2xx whose body is an answer, not a problem.

    A call that is not ``repeatable`` may have had its effect even if no answer arrives. The service may wait
    for ``wait_s`` seconds before it answers.
    """

    method: str
    path: str
    answer: type[T]
    body: bytes | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    also: HTTPStatus | None = None
    repeatable: bool = True
    wait_s: int = 0

    def is_answer(self, status: int) -> bool:
        return HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES or status == self.also

    def read(self, reply: Reply) -> T:
        """Decode the answer. Raises the KmsError of a problem, UnexpectedAnswer for another shape."""
        if not self.is_answer(reply.status):
            raise error_of(reply)
        return decoded(reply.body, self.answer, f"The answer to {self.path}")


def get(
    path: str, answer: type[T], query: Mapping[str, object] | None = None, *, wait_s: int = 0
) -> ClientRequest[T]:
    """GET a resource. Values of the query that are None are left out."""
    given = {**(query or {}), "wait": wait_s or None}
    return ClientRequest("GET", PREFIX + path + _query(given), answer, wait_s=wait_s)


def post(
    path: str,
    body: shapes.Body,
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


def upload(
    kind: wire.JobKind, context: ContextIn, key_id: str | None, options: UploadOptions
) -> ClientRequest[wire.JobAccepted]:
    """Begin an upload. Context and key id are sent in headers, never in the query string."""
    headers = {
        "Content-Type": "application/octet-stream",
        "Idempotency-Key": options.get("idempotency_key") or str(uuid.uuid4()),
    }
    if pairs := Context.parse(context).pairs:
        headers["X-KMS-Context"] = json_header(dict(pairs))
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
        headers["X-KMS-Group"] = json_header(group_in)
    if metadata := options.get("metadata"):
        headers["X-KMS-Metadata"] = json_header(metadata)
    return ClientRequest("POST", f"{PREFIX}/files/{kind}", wire.JobAccepted, headers=headers)


def json_header(value: object) -> str:
    """Return a value as percent-encoded JSON."""
    return quote(wire.encode(value), safe="")
