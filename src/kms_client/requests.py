"""Every request of the API as a value, and the type of its answer; does no I/O.

Contexts are checked here (InvalidContext), so a mistake costs no round trip.
"""

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final, Generic, TypedDict, TypeVar
from urllib.parse import quote

import msgspec

from kms_client.problems import Reply, UnexpectedAnswer, error_of
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import InvalidContext, InvalidRequest
from kms_protocol.wire import PREFIX, ContextIn

T = TypeVar("T")

JSON: Final = "application/json"


class JobOptions(TypedDict, total=False):
    """How the job of an upload is treated: as ``priority`` and ``callback`` of ``JobIn``."""

    priority: wire.Priority | None
    callback: str | None


class UploadOptions(JobOptions, total=False):
    """``idempotency_key`` is one of the caller's, which makes an upload harmless to repeat after a crash."""

    idempotency_key: str | None


@dataclass(frozen=True, slots=True)
class ClientRequest(Generic[T]):
    """One request. ``also`` lists statuses outside 2xx that carry an answer, not a problem.

    A call that is not ``repeatable`` may have had its effect although no answer came.
    """

    method: str
    path: str
    answer: type[T]
    body: bytes | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    also: frozenset[int] = frozenset()
    repeatable: bool = True

    def is_answer(self, status: int) -> bool:
        return HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES or status in self.also

    def read(self, reply: Reply) -> T:
        """The answer. Raises the KmsError of a problem, UnexpectedAnswer if the shape is another."""
        if not self.is_answer(reply.status):
            raise error_of(reply)
        try:
            return msgspec.json.decode(reply.body, type=self.answer)
        except wire.NOT_JSON as exc:
            raise UnexpectedAnswer(f"The answer to {self.path} does not have the shape of this API") from exc


def _post(
    path: str, body: wire.Body, answer: type[T], headers: Mapping[str, str] | None = None
) -> ClientRequest[T]:
    sent = {"Content-Type": JSON, **(headers or {})}
    return ClientRequest("POST", PREFIX + path, answer, body=wire.encode(body), headers=sent)


def encrypt(plaintext: bytes, context: ContextIn, key_id: str | None) -> ClientRequest[wire.EncryptOut]:
    Context.parse(context)
    body = wire.EncryptIn(plaintext=plaintext, context=context, key_id=key_id)
    return _post("/encrypt", body, wire.EncryptOut)


def decrypt(ciphertext: bytes, context: ContextIn, key_id: str | None) -> ClientRequest[wire.DecryptOut]:
    Context.parse(context)
    body = wire.DecryptIn(ciphertext=ciphertext, context=context, key_id=key_id)
    return _post("/decrypt", body, wire.DecryptOut)


def generate_data_key(
    spec: wire.KeySpec, context: ContextIn, key_id: str | None, *, without_plaintext: bool
) -> ClientRequest[wire.GenerateKeyOut]:
    Context.parse(context)
    body = wire.GenerateKeyIn(
        key_spec=spec, context=context, key_id=key_id, without_plaintext=without_plaintext or None
    )
    return _post("/generate-key", body, wire.GenerateKeyOut)


def rewrap(
    ciphertext: bytes, context: ContextIn, new_context: ContextIn, key_id: str | None
) -> ClientRequest[wire.EncryptOut]:
    Context.parse(context)
    Context.parse(new_context)
    body = wire.RewrapIn(ciphertext=ciphertext, context=context, new_context=new_context, key_id=key_id)
    return _post("/rewrap", body, wire.EncryptOut)


def wrap(file_key: bytes, context: ContextIn, key_id: str | None) -> ClientRequest[wire.WrapOut]:
    Context.parse(context)
    return _post("/wrap", wire.WrapIn(file_key=file_key, context=context, key_id=key_id), wire.WrapOut)


def unwrap(stanzas: bytes, context: ContextIn, key_id: str | None) -> ClientRequest[wire.UnwrapOut]:
    Context.parse(context)
    return _post("/unwrap", wire.UnwrapIn(stanzas=stanzas, context=context, key_id=key_id), wire.UnwrapOut)


def batch(operation: wire.JobKind, items: Iterable[wire.BatchItem]) -> ClientRequest[wire.BatchOut]:
    return _post("/batch", wire.BatchIn(operation=operation, items=list(items)), wire.BatchOut)


def health() -> ClientRequest[wire.HealthOut]:
    """503 is an answer here: it says which backend is unhealthy."""
    unhealthy = frozenset({HTTPStatus.SERVICE_UNAVAILABLE.value})
    return ClientRequest("GET", f"{PREFIX}/health", wire.HealthOut, also=unhealthy)


def status() -> ClientRequest[wire.StatusOut]:
    return ClientRequest("GET", f"{PREFIX}/status", wire.StatusOut)


def keys() -> ClientRequest[wire.KeysOut]:
    return ClientRequest("GET", f"{PREFIX}/keys", wire.KeysOut)


def key(key_id: str) -> ClientRequest[wire.KeyOut]:
    return ClientRequest("GET", _key_path(key_id), wire.KeyOut)


def rotate(key_id: str) -> ClientRequest[wire.RotateOut]:
    """Every call makes a version."""
    return ClientRequest("POST", f"{_key_path(key_id)}/rotate", wire.RotateOut, repeatable=False)


def _key_path(key_id: str) -> str:
    if not key_id:
        raise InvalidRequest("A key id is needed")
    return f"{PREFIX}/keys/{quote(key_id, safe='')}"


def audit(after: str | None, limit: int | None, filters: Mapping[str, str]) -> ClientRequest[wire.AuditOut]:
    given = {"after": after, "limit": limit, **filters}
    return ClientRequest("GET", f"{PREFIX}/audit{_query(given)}", wire.AuditOut)


def _query(given: Mapping[str, object]) -> str:
    """What is not None, percent-encoded, behind a question mark; empty if nothing is."""
    pairs = [f"{name}={quote(str(value), safe='')}" for name, value in given.items() if value is not None]
    return "?" + "&".join(pairs) if pairs else ""


def submit(job: wire.JobIn, idempotency_key: str | None) -> ClientRequest[wire.JobAccepted]:
    """The same Idempotency-Key on every attempt makes a retry harmless."""
    Context.parse(job.context)
    Context.parse(job.new_context)
    return _post("/jobs", job, wire.JobAccepted, {"Idempotency-Key": idempotency_key or str(uuid.uuid4())})


def job_path(job_id: str, below: str = "") -> str:
    if not job_id:
        raise InvalidRequest("A job id is needed")
    return f"{PREFIX}/jobs/{quote(job_id, safe='')}{below}"


def job(job_id: str) -> ClientRequest[wire.JobOut]:
    return ClientRequest("GET", job_path(job_id), wire.JobOut)


def cancel(job_id: str) -> ClientRequest[wire.JobOut]:
    return ClientRequest("DELETE", job_path(job_id), wire.JobOut)


def retry(job_id: str) -> ClientRequest[wire.JobOut]:
    return ClientRequest("POST", f"{job_path(job_id)}/retry", wire.JobOut)


def dead(limit: int) -> ClientRequest[wire.JobList]:
    return ClientRequest("GET", f"{PREFIX}/jobs/dead?limit={limit}", wire.JobList)


def jobs(state: wire.JobState | None, limit: int | None, cursor: str | None) -> ClientRequest[wire.JobList]:
    given = {"state": state, "limit": limit, "cursor": cursor}
    return ClientRequest("GET", f"{PREFIX}/jobs{_query(given)}", wire.JobList)


def events(job_id: str) -> ClientRequest[bytes]:
    return ClientRequest("GET", job_path(job_id, "/events"), bytes, headers={"Accept": "text/event-stream"})


def result(job_id: str, headers: Mapping[str, str]) -> ClientRequest[bytes]:
    return ClientRequest("GET", job_path(job_id, "/result"), bytes, headers=headers)


def upload(
    kind: wire.JobKind, context: ContextIn, key_id: str | None, options: UploadOptions
) -> ClientRequest[wire.JobAccepted]:
    """The head of a streamed body; context and key id travel in headers, never in the query string."""
    headers = {
        "Content-Type": "application/octet-stream",
        "Idempotency-Key": options.get("idempotency_key") or str(uuid.uuid4()),
    }
    if text := header_text(context):
        headers["X-KMS-Context"] = text
    if key_id:
        headers["X-KMS-Key-Id"] = key_id
    for name in ("priority", "callback"):
        if value := options.get(name):
            headers[f"X-KMS-{name.title()}"] = str(value)
    return ClientRequest("POST", f"{PREFIX}/files/{kind}", wire.JobAccepted, headers=headers)


def header_text(context: ContextIn) -> str:
    """Percent-encoded UTF-8 of ``key=value,…``, or of a JSON object where that form could not say it."""
    if not context:
        return ""
    pairs = Context.parse(context).pairs
    plain = ",".join(f"{key}={value}" for key, value in pairs)
    try:
        says_it = not plain.startswith("{") and Context.parse(plain).pairs == pairs
    except InvalidContext:
        says_it = False
    return quote(plain if says_it else wire.encode(dict(pairs)).decode(), safe="")
