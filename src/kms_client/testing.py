"""A stand-in of the service in the memory of one process, for the tests of programs that use the client.

>>> from kms_client.testing import FakeService
>>> with FakeService().client() as kms:
...     sealed = kms.encrypt(b"secret-data", context="env=test")
...     kms.decrypt(sealed.ciphertext, context="env=test").plaintext
b'secret-data'

Its answers and errors are those of the service: tests/kms_client/test_testing.py expects the same of both. It
has no cryptography: a ciphertext is a random name of a plaintext that the FakeService keeps.
"""

import re
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, cast
from urllib.parse import unquote

import msgspec

from kms_client.aio import AsyncClient
from kms_client.http_client import HttpAnswer, HttpRequest
from kms_client.settings import DEFAULT_URL, ClientSettings
from kms_client.sync import Client, SyncTransport
from kms_protocol import errors, wire
from kms_protocol.context import Context
from kms_protocol.errors import KmsError
from kms_protocol.units import MiB, time_text
from kms_protocol.wire import Body

B = TypeVar("B", bound=Body)
Json = dict[str, Any]
_Outcome = tuple[Json, bytes | None]
_FIRST_LINE: Final = b"age-encryption.org/v1\n"
_NAMED: Final = re.compile(r"(?<=^/jobs/)(?!status$)[^/]+|(?<=^/files/)[^/]+")
_SETTINGS: Final = ClientSettings(DEFAULT_URL, retries=0)
_KEPT_S: Final = 24 * 3600
_NOT_FAKED: Final = frozenset({"source", "callback", "group"})
_PRECISION: Final = "milliseconds"
_HEADER: Final = "x-kms-"


@dataclass(frozen=True, slots=True)
class _Sealed:
    """The content of one ciphertext. ``key`` are the fields of the key version."""

    ciphertext: bytes = field(repr=False)
    plaintext: bytes = field(repr=False)
    context: Context
    key: Json
    file_id: str

    def answer(self, kind: str) -> Json:
        """Return the fields of an answer to the operation that made or opened it."""
        used = {**self.key, "file_id": self.file_id}
        if kind == "decrypt":
            return {"plaintext": self.plaintext, "origin": "service", **used}
        return {"ciphertext": self.ciphertext, **used}


@dataclass(slots=True)
class _EndedJob:
    """A job, the submission that it is of, and its result; None if there is none."""

    submission: object = field(repr=False)
    shown: Json
    result: bytes | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class _FakedCall:
    """One request. ``name`` is the job id or the kind in its path; ``waits`` for the end of a job."""

    name: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    waits: bool

    def read(self, shape: type[B]) -> B:
        """Decode the body. Raises InvalidRequest."""
        try:
            return msgspec.json.decode(self.body, type=shape)
        except wire.NOT_JSON as exc:
            raise errors.InvalidRequest(str(exc)) from exc


class FakeService:
    """Keys, plaintexts and jobs of one service, whose jobs end at once.

    ``keys`` are the ids of its keys, the default one first. Each of ``failures`` is raised by one call, in
    their order, as a client raises it once its retries are used up; ``wait`` survives those that are
    temporary. A call or option that is not faked raises NotImplementedError.
    """

    def __init__(self, keys: Iterable[str] = ("default",)) -> None:
        self.failures: list[KmsError] = []
        made = [{"key_id": key, "key_version": secrets.token_hex(4), "backend": "fake"} for key in keys]
        self._keys: dict[str | None, Json] = {key["key_id"]: key for key in made} | {None: made[0]}
        self._sealed: dict[bytes, _Sealed] = {}
        self._jobs: dict[str, _EndedJob] = {}
        self._submitted: dict[str, _EndedJob] = {}
        self._calls: dict[str, Callable[[_FakedCall], Json | bytes]] = {
            "GET /health": _health,
            "POST /encrypt": lambda call: self._single("encrypt", call.read(wire.EncryptIn)),
            "POST /decrypt": lambda call: self._single("decrypt", call.read(wire.DecryptIn)),
            "POST /rewrap": lambda call: self._single("rewrap", call.read(wire.RewrapIn)),
            "POST /generate-key": self._generate_key,
            "POST /batch": self._batch,
            "POST /jobs": self._submit,
            "POST /files/*": self._upload,
            "POST /jobs/status": self._many,
            "GET /jobs/*": lambda call: self._job(call).shown,
            "GET /jobs/*/result": self._result,
            "HEAD /jobs/*/result": lambda call: self._result(call)[:0],
            "DELETE /jobs/*": lambda call: self._job(call).shown,
            "DELETE /jobs/*/result": self._release,
        }

    def client(self) -> Client:
        """Return a client of this service. All its clients share keys, plaintexts and jobs."""
        return Client.over(_SETTINGS, _InMemory(self))

    def async_client(self) -> AsyncClient:
        """Return an AsyncClient of this service, which works without anyio."""
        return AsyncClient.over(_SETTINGS, _InMemory(self))

    def answer(self, request: HttpRequest) -> bytes:
        """Return the body of the answer to a request of a client. Raises the KmsError of a problem."""
        path, _, query = request.url.removeprefix(DEFAULT_URL + wire.PREFIX).partition("?")
        route = f"{request.method} {_NAMED.sub('*', path)}"
        if route not in self._calls:
            raise NotImplementedError(f"FakeService does not answer {route}")
        if self.failures:
            raise self.failures.pop(0)
        name, sent = _NAMED.search(path), request.body or b""
        headers = {key.lower(): unquote(value) for key, value in request.headers.items()}
        body = sent if isinstance(sent, bytes) else b"".join(cast("Iterable[bytes]", sent))
        call = _FakedCall(name[0] if name else "", headers, body, "wait=" in query)
        found = self._calls[route](call)
        return found if isinstance(found, bytes) else msgspec.json.encode(found)

    # -- single calls ---------------------------------------------------------------------------------

    def _key(self, key_id: str | None) -> Json:
        if key_id not in self._keys:
            raise errors.UnknownKey
        return self._keys[key_id]

    def _seal(self, plaintext: bytes, given: wire.ContextIn, key: Json, file_id: str = "") -> _Sealed:
        context = Context.parse(given)
        context.not_after()
        ciphertext = b"%s-> fake %s\n" % (_FIRST_LINE, secrets.token_hex(32).encode())
        made = _Sealed(ciphertext, plaintext, context, key, file_id or secrets.token_hex(16))
        self._sealed[ciphertext] = made
        return made

    def _open(self, item: wire.BatchItem) -> _Sealed:
        ciphertext, context = item.ciphertext or b"", Context.parse(item.context)
        if not ciphertext.startswith(_FIRST_LINE):
            raise errors.NotACiphertext
        found, until = self._sealed.get(ciphertext), context.not_after()
        if found is None or found.context != context or (until and until.timestamp() < time.time()):
            raise errors.DecryptFailed
        return found

    def _run(self, kind: str, item: wire.BatchItem, new_context: wire.ContextIn = None) -> _Sealed:
        if kind == "encrypt":
            return self._seal(item.plaintext or b"", item.context, self._key(item.key_id))
        found = self._open(item)
        if kind == "decrypt":
            if item.key_id not in {None, found.key["key_id"]}:
                raise errors.DecryptFailed
            return found
        context = item.context if new_context is None else new_context
        key = found.key if item.key_id is None else self._key(item.key_id)
        return self._seal(found.plaintext, context, key, found.file_id if kind == "rewrap" else "")

    def _single(self, kind: str, given: wire.EncryptIn | wire.DecryptIn | wire.RewrapIn) -> Json:
        item = msgspec.convert(given, wire.BatchItem, from_attributes=True)
        if len(item.plaintext or b"") > MiB:
            raise errors.TooLarge
        return self._run(kind, item, getattr(given, "new_context", None)).answer(kind)

    def _generate_key(self, call: _FakedCall) -> Json:
        given = call.read(wire.GenerateKeyIn)
        spec = given.key_spec or "AES_256"
        data_key = secrets.token_bytes(wire.KEY_SPEC_BYTES[spec])
        shown = {} if given.without_plaintext else {"plaintext": data_key}
        sealed = self._seal(data_key, given.context, self._key(given.key_id))
        return {**sealed.answer("encrypt"), **shown, "key_spec": spec}

    def _batch(self, call: _FakedCall) -> Json:
        given = call.read(wire.BatchIn)
        results = [self._line(given.operation, *each) for each in enumerate(given.items)]
        return {"results": results, "failed": sum("error" in each for each in results)}

    def _line(self, kind: str, index: int, item: wire.BatchItem, new_context: wire.ContextIn = None) -> Json:
        named = {"index": index} | ({"reference": item.reference} if item.reference else {})
        try:
            _check_item(kind, index, item)
            return {**named, **self._run(kind, item, new_context).answer(kind)}
        except KmsError as exc:
            return {**named, "error": {"code": exc.code}}

    # -- jobs -----------------------------------------------------------------------------------------

    def _submit(self, call: _FakedCall) -> Json:
        job = call.read(wire.JobIn)
        _check_faked({name for name in _NOT_FAKED if getattr(job, name) is not None})
        items = [self._item_of(job, each) for each in job.items or ()]
        if not items:
            raise errors.InvalidRequest("A bulk job needs at least one item")
        for index, item in enumerate(items):
            _check_item(job.kind, index, item)
        self._key(job.key_id)
        return self._accept(call, job, lambda: self._run_items(job, items))

    @staticmethod
    def _item_of(job: wire.JobIn, item: wire.JobItem) -> wire.BatchItem:
        given = msgspec.convert(item, wire.BatchItem, from_attributes=True)
        context = job.context if given.context is None else given.context
        return msgspec.structs.replace(given, context=context, key_id=job.key_id)

    def _run_items(self, job: wire.JobIn, items: list[wire.BatchItem]) -> _Outcome:
        lines = [self._line(job.kind, *each, job.new_context) for each in enumerate(items)]
        failed = [{"index": each["index"], **each["error"]} for each in lines if "error" in each]
        size_bytes = sum(len(item.plaintext or item.ciphertext or b"") for item in items)
        error = {"code": "items_failed", "items": failed} if failed else None
        more = {name: getattr(job, name) for name in ("key_id", "priority", "labels", "metadata")}
        shown = _ended(job.kind, (len(items), len(failed), size_bytes), error, more)
        return shown, b"".join(msgspec.json.encode(each) + b"\n" for each in lines)

    def _upload(self, call: _FakedCall) -> Json:
        sent = ((name, text) for name, text in call.headers.items() if name.startswith(_HEADER))
        given = {name.removeprefix(_HEADER).replace("-", "_"): text for name, text in sent}
        _check_faked(given.keys() & _NOT_FAKED)
        self._key(given.get("key_id"))
        if call.name == "decrypt" and not call.body.startswith(_FIRST_LINE):
            raise errors.NotACiphertext
        return self._accept(call, (call.name, given, call.body), lambda: self._run_file(call, given))

    def _run_file(self, call: _FakedCall, given: Mapping[str, str]) -> _Outcome:
        context = msgspec.json.decode(given.get("context", "{}"), type=dict[str, str])
        key_id = given.get("key_id")
        item = wire.BatchItem(plaintext=call.body, ciphertext=call.body, context=context, key_id=key_id)
        labels = dict(label.split("=", 1) for label in given.get("labels", "").split(",") if label)
        more: Json = {"key_id": key_id, "priority": given.get("priority"), "labels": labels}
        more["metadata"] = msgspec.json.decode(given.get("metadata", "{}"))
        try:
            made = self._run(call.name, item)
        except KmsError as exc:
            return _ended(call.name, (1, 1, len(call.body)), {"code": exc.code}, more), None
        result = made.plaintext if call.name == "decrypt" else made.ciphertext
        return _ended(call.name, (1, 0, len(call.body)), None, more | {"file_id": made.file_id}), result

    def _accept(self, call: _FakedCall, submission: object, run: Callable[[], _Outcome]) -> Json:
        key = call.headers["idempotency-key"]
        if key not in self._submitted:
            shown, result = run()
            self._submitted[key] = self._jobs[shown["job_id"]] = _EndedJob(submission, shown, result)
        job = self._submitted[key]
        if job.submission != submission:
            raise errors.IdempotencyConflict
        return job.shown if call.waits else {**job.shown, "state": "queued"}

    def _job(self, call: _FakedCall) -> _EndedJob:
        if call.name not in self._jobs:
            raise errors.UnknownJob
        return self._jobs[call.name]

    def _many(self, call: _FakedCall) -> Json:
        asked = call.read(wire.JobsIn).job_ids
        known = [self._jobs[job_id].shown for job_id in asked if job_id in self._jobs]
        return {"jobs": known, "unknown": [job_id for job_id in asked if job_id not in self._jobs]}

    def _result(self, call: _FakedCall) -> bytes:
        job = self._job(call)
        if job.result is None:
            raise errors.ResultReleased if "released_at" in job.shown else errors.ResultExpired
        return job.result

    def _release(self, call: _FakedCall) -> Json:
        job = self._job(call)
        job.shown["released_at"], job.result = time_text(time.time(), _PRECISION), None
        return job.shown


@dataclass(frozen=True, slots=True)
class _FakedAnswer:
    body: bytes = field(repr=False)
    headers: Mapping[str, str]
    status: int = 200

    async def chunks(self) -> AsyncGenerator[bytes]:
        yield self.body

    async def close(self) -> None:
        """Nothing is open."""


class _InMemory(SyncTransport):
    """Asks a FakeService instead of a connection pool."""

    def __init__(self, service: FakeService) -> None:
        self._fake = service

    async def open(self, request: HttpRequest) -> HttpAnswer:
        body = self._fake.answer(request)
        return _FakedAnswer(body, {"content-length": str(len(body))})

    async def shut(self) -> None:
        """Leave the service as it is for its other clients."""


def _health(_: _FakedCall) -> Json:
    return {"status": "healthy", "backend": "fake", "checked_at": time_text(time.time(), _PRECISION)}


def _check_item(kind: str, index: int, item: wire.BatchItem) -> None:
    needed, other = ("plaintext", "ciphertext") if kind == "encrypt" else ("ciphertext", "plaintext")
    if getattr(item, needed) is None or getattr(item, other) is not None:
        raise errors.InvalidRequest(f"Item {index} needs {needed}, and nothing else, for {kind}")


def _check_faked(options: set[str]) -> None:
    if options:
        raise NotImplementedError(f"FakeService runs no jobs with {', '.join(sorted(options))}")


def _ended(kind: str, counts: tuple[int, int, int], error: Json | None, more: Json) -> Json:
    """Return a job that ended now. ``counts`` are its items, those that failed, and its bytes."""
    (items, failed, size_bytes), job_id, now = counts, str(uuid.uuid4()), time.time()
    path = f"{wire.PREFIX}/jobs/{job_id}"
    progress = {"items": items, "items_done": items, "items_failed": failed}
    return {
        "job_id": job_id,
        "kind": kind,
        "state": "failed" if error else "succeeded",
        "attempt": 1,
        "progress": {**progress, "bytes": size_bytes, "bytes_done": size_bytes},
        **dict.fromkeys(("created_at", "started_at", "ended_at"), time_text(now, _PRECISION)),
        **dict.fromkeys(("expires_at", "start_by", "run_by"), time_text(now + _KEPT_S, _PRECISION)),
        "submitter": "local",
        "error": error,
        "links": {"self": path, "result": f"{path}/result"},
        **{name: value for name, value in more.items() if value},
    }
