"""A small real server that follows docs/contract.md, with faults on order; its jobs are in memory.

It seals with pyrage and puts the context in front of the plaintext, so it knows nothing of the envelope. Its
callers may not wrap or unwrap file keys.
"""

import json
import re
import ssl
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

import pyrage

from kms_protocol import errors
from kms_protocol.context import Context
from kms_protocol.error_texts import TEXTS
from kms_protocol.errors import KmsError
from kms_protocol.wire import ENDED, PREFIX, ContextIn
from support.http_servers import QuietHandler, served

KEY: Final = {"key_id": "default", "key_version": "0a1b2c3d", "backend": "age"}
SYNC_LIMIT_BYTES: Final = 1024 * 1024
FRAME_BYTES: Final = 64 * 1024
STATUS: Final[dict[type[KmsError], int]] = {
    errors.DecryptFailed: 400,
    errors.InvalidContext: 422,
    errors.NotACiphertext: 422,
    errors.TooLarge: 413,
    errors.UnknownJob: 404,
    errors.UnknownKey: 404,
    errors.Unauthenticated: 401,
    errors.JobNotFinished: 409,
    errors.JobCommitting: 409,
    errors.DataKeysUnsupported: 501,
    errors.Forbidden: 403,
    errors.BackendUnavailable: 503,
    errors.JobsUnavailable: 503,
}
Json = dict[str, object]


@dataclass
class Faults:
    """What goes wrong. A count is used up by one request each."""

    busy: int = 0
    busy_with: type[errors.Unavailable] = errors.JobsUnavailable
    retry_after: str | None = "0"
    dropped: int = 0
    cuts: int = 0
    damaged: int = 0
    stalls: bool = False
    changed_result: bool = False
    honours_wait: bool = True
    wait_times_out: bool = False
    unhealthy: bool = False
    token: str = ""
    job_error: str = ""
    foreign_answer: bool = False
    gives_digests: bool = True
    data_keys: bool = True
    steps_s: float = 0.05
    single_bytes: int = SYNC_LIMIT_BYTES


@dataclass
class Job:
    kind: str
    body: bytes = field(repr=False)
    error: str = ""
    began: float = field(default_factory=time.monotonic)
    cancelled: bool = False


@dataclass
class RecordedRequest:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


class ContractServer:
    """What the service knows; ``seen`` lists the requests that came."""

    def __init__(self) -> None:
        self.identity = pyrage.x25519.Identity.generate()
        self.faults = Faults()
        self.jobs: dict[str, Job] = {}
        self.submitted: dict[str, str] = {}
        self.released: list[str] = []
        self.seen: list[RecordedRequest] = []
        self.url = ""

    def headers_to(self, path: str, method: str = "POST") -> list[Mapping[str, str]]:
        """The headers of each request to such a path."""
        return [seen.headers for seen in self.seen if path in seen.path and seen.method == method]

    def seal(self, plaintext: bytes, context: ContextIn) -> bytes:
        bound = Context.parse(context).canonical()
        framed = len(bound).to_bytes(4, "big") + bound + plaintext
        return bytes(pyrage.encrypt(framed, [self.identity.to_public()]))

    def open(self, ciphertext: bytes, context: ContextIn) -> bytes:
        if not ciphertext.startswith(b"age-encryption.org/v1\n"):
            raise errors.NotACiphertext
        try:
            framed = bytes(pyrage.decrypt(ciphertext, [self.identity]))
        except pyrage.DecryptError as exc:
            raise errors.DecryptFailed from exc
        size = int.from_bytes(framed[:4], "big")
        if framed[4 : 4 + size] != Context.parse(context).canonical():
            raise errors.DecryptFailed
        return framed[4 + size :]

    def state(self, job: Job) -> str:
        if job.cancelled:
            return "cancelled"
        steps = int((time.monotonic() - job.began) / self.faults.steps_s) if self.faults.steps_s else 9
        ended = "failed" if job.error else "succeeded"
        return ["queued", "running", "committing", ended][min(steps, 3)]

    def shown(self, job_id: str) -> Json:
        job = self._job(job_id)
        state = self.state(job)
        done = state in {"succeeded", "failed"}
        return {
            "job_id": job_id,
            "kind": job.kind,
            "state": state,
            "attempt": 1,
            "progress": {
                "items": 1,
                "items_done": int(done and not job.error),
                "items_failed": int(done and bool(job.error)),
                "bytes": len(job.body),
                "bytes_done": len(job.body) if done else 0,
            },
            "created_at": "2026-11-24T15:40:00Z",
            "expires_at": "2026-11-25T15:40:00Z",
            "error": error_of(job.error) if job.error and done else None,
            "links": links(job_id),
        }

    def accept(self, job: Job, idempotency_key: str) -> Json:
        job_id = self.submitted.setdefault(idempotency_key, f"job-{len(self.jobs) + 1}")
        self.jobs.setdefault(job_id, job)
        return {"job_id": job_id, "state": "queued", "links": links(job_id)}

    def _job(self, job_id: str) -> Job:
        if job_id not in self.jobs:
            raise errors.UnknownJob
        return self.jobs[job_id]


def error_of(code: str) -> dict[str, str]:
    text = TEXTS[code]
    return {"code": code, "detail": text.job_detail, "hint": text.job_hint}


def links(job_id: str) -> dict[str, str]:
    path = f"{PREFIX}/jobs/{job_id}"
    return {"self": path, "result": f"{path}/result"}


class Handler(QuietHandler):
    """Routes one request to a method named for its path."""

    protocol_version = "HTTP/1.1"
    service: ContractServer

    def serve(self) -> None:
        body = self.read_body()
        path = urlsplit(self.path).path.removeprefix(PREFIX)
        seen = RecordedRequest(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body)
        self.service.seen.append(seen)
        faults = self.service.faults
        if faults.dropped:
            faults.dropped -= 1
            self.close_connection = True
            return
        try:
            self.refuse()
            self.route(path, seen)
        except KmsError as exc:
            self.problem(exc)

    do_GET = do_HEAD = do_POST = do_DELETE = serve  # noqa: N815 -- the library's names

    def refuse(self) -> None:
        faults = self.service.faults
        if faults.token and self.headers.get("Authorization") != f"Bearer {faults.token}":
            raise errors.Unauthenticated
        if faults.busy:
            faults.busy -= 1
            raise faults.busy_with

    def route(self, path: str, seen: RecordedRequest) -> None:
        if self.service.faults.foreign_answer:
            self.answer(200, b"<html>welcome to nginx</html>", {"Content-Type": "text/html"})
            return
        if match := re.fullmatch(r"/jobs/([^/]+)(/result)?", path):
            handle: Callable[[str], None] = {
                "/result": {"DELETE": self.release, "HEAD": self.digest}.get(self.command, self.result),
                "": self.cancel if self.command == "DELETE" else self.job,
            }[match[2] or ""]
            handle(unquote(match[1]))
        elif path.startswith("/files/"):
            self.upload(path.removeprefix("/files/"), seen.body)
        else:
            getattr(self, f"{self.command.lower()}_{path[1:].replace('-', '_')}")(seen)

    # -- single calls --------------------------------------------------------------------------------

    def post_encrypt(self, seen: RecordedRequest) -> None:
        given = json.loads(seen.body)
        plaintext = b64decode(given["plaintext"])
        if len(plaintext) > self.service.faults.single_bytes:
            raise errors.TooLarge
        if given.get("key_id") not in {None, "default"}:
            raise errors.UnknownKey
        self.json({"ciphertext": text(self.service.seal(plaintext, given.get("context"))), **KEY})

    def post_decrypt(self, seen: RecordedRequest) -> None:
        given = json.loads(seen.body)
        ciphertext = b64decode(given["ciphertext"])
        if len(ciphertext) > self.service.faults.single_bytes + FRAME_BYTES:
            raise errors.TooLarge
        plaintext = self.service.open(ciphertext, given.get("context"))
        self.json({"plaintext": text(plaintext), "origin": "service", **KEY})

    def post_wrap(self, seen: RecordedRequest) -> None:
        raise errors.Forbidden(f"This token lacks `{seen.path.rpartition('/')[2]}`")

    post_unwrap = post_wrap

    def post_rewrap(self, seen: RecordedRequest) -> None:
        given = json.loads(seen.body)
        plaintext = self.service.open(b64decode(given["ciphertext"]), given.get("context"))
        context = given.get("context") if given.get("new_context") is None else given["new_context"]
        self.json({"ciphertext": text(self.service.seal(plaintext, context)), **KEY})

    def post_generate_key(self, seen: RecordedRequest) -> None:
        if not self.service.faults.data_keys:
            raise errors.DataKeysUnsupported
        given = json.loads(seen.body)
        key = bytes(range({"AES_128": 16, "AES_256": 32}[given["key_spec"]]))
        plain = {} if given.get("without_plaintext") else {"plaintext": text(key)}
        sealed = text(self.service.seal(key, given.get("context")))
        self.json({**plain, "ciphertext": sealed, "key_spec": given["key_spec"], **KEY})

    def post_batch(self, seen: RecordedRequest) -> None:
        results: list[Json] = []
        for index, item in enumerate(json.loads(seen.body)["items"]):
            try:
                plaintext = self.service.open(b64decode(item["ciphertext"]), item.get("context"))
                results.append({"index": index, "plaintext": text(plaintext), **KEY})
            except KmsError as exc:
                results.append({"index": index, "error": {"code": exc.code}})
        self.json({"results": results, "failed": sum("error" in result for result in results)})

    def get_livez(self, seen: RecordedRequest) -> None:
        self.answer(200, b"ok\n", {"X-Request-ID": seen.headers.get("x-request-id", "")})

    def get_health(self, seen: RecordedRequest) -> None:
        del seen
        status, code = ("unhealthy", 503) if self.service.faults.unhealthy else ("healthy", 200)
        self.json({"status": status, "backend": "age", "checked_at": "2026-11-24T15:40:00Z"}, code)

    def get_status(self, seen: RecordedRequest) -> None:
        del seen
        operations = {"total": 3, "by": {"encrypt": {"ok": 2, "failed": 1}}}
        where = {"backend": "age", "environment": "dev", "version": "0.1.0", "uptime_s": 61.5}
        jobs = {"jobs": {"queued": 0, "succeeded": 2}, "queue_depth": 0, "workers": 1, "degraded": []}
        self.json({**where, "operations": operations, **jobs})

    def get_keys(self, seen: RecordedRequest) -> None:
        del seen
        version = {"version": "0a1b2c3d", "created_at": "2026-11-24T15:40:00Z", "operations": 3, "bytes": 42}
        key = {"id": "default", "backend": "age", "current_version": "0a1b2c3d", "versions": [version]}
        self.json({"keys": [{**key, "default": True}]})

    # -- jobs ----------------------------------------------------------------------------------------

    def post_jobs(self, seen: RecordedRequest) -> None:
        given = json.loads(seen.body)
        lines = []
        for index, item in enumerate(given.get("items") or ()):
            sealed = self.service.seal(b64decode(item["plaintext"]), item.get("context"))
            lines.append(json.dumps({"index": index, "ciphertext": text(sealed)}))
        self.accepted(Job(given["kind"], "".join(f"{line}\n" for line in lines).encode()))

    def get_jobs(self, seen: RecordedRequest) -> None:
        asked = parse_qs(urlsplit(seen.path).query)
        shown = [self.service.shown(job_id) for job_id in self.service.jobs]
        wanted = [job for job in shown if job["state"] in asked.get("state", [job["state"]])]
        start, limit = int(asked.get("cursor", ["0"])[0]), int(asked.get("limit", ["100"])[0])
        following = str(start + limit) if start + limit < len(wanted) else None
        self.json({"jobs": wanted[start : start + limit], "next": following})

    def upload(self, kind: str, body: bytes) -> None:
        given = unquote(self.headers.get("X-KMS-Context", ""))
        context: ContextIn = json.loads(given) if given.startswith("{") else given
        job = Job(kind, b"", error=self.service.faults.job_error)
        try:
            work = self.service.seal if kind == "encrypt" else self.service.open
            job.body = work(body, context)
        except KmsError as exc:
            job.error = exc.code
        self.accepted(job)

    def accepted(self, job: Job) -> None:
        self.json(self.service.accept(job, self.headers["Idempotency-Key"]), 202)

    def job(self, job_id: str) -> None:
        faults, wait_s = self.service.faults, int(parse_qs(urlsplit(self.path).query).get("wait", "0")[0])
        if wait_s and faults.wait_times_out:
            self.answer(504, b"", {})
            return
        until = time.monotonic() + (wait_s if faults.honours_wait else 0)
        while time.monotonic() < until and self.service.shown(job_id)["state"] not in ENDED:
            time.sleep(0.01)
        self.json(self.service.shown(job_id))

    def cancel(self, job_id: str) -> None:
        shown = self.service.shown(job_id)
        if shown["state"] == "committing":
            raise errors.JobCommitting
        self.service.jobs[job_id].cancelled = shown["state"] not in {"succeeded", "failed"}
        self.json(self.service.shown(job_id), 202)

    def digest(self, job_id: str) -> None:
        body, faults = self.service.jobs[job_id].body, self.service.faults
        digest = f"sha-256=:{text(sha256(body).digest())}:" if faults.gives_digests else ""
        self.answer(200, b"", {"Repr-Digest": digest, "Content-Length": str(len(body))})

    def release(self, job_id: str) -> None:
        self.service.released.append(job_id)
        self.json(self.service.shown(job_id))

    def result(self, job_id: str) -> None:
        if self.service.shown(job_id)["state"] != "succeeded":
            raise errors.JobNotFinished
        body, faults = self.damaged(self.service.jobs[job_id].body), self.service.faults
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        etag = f'"{sha256(body).hexdigest()[:16]}"'
        start = int(asked[1]) if asked and self.headers.get("If-Range", etag) == etag else 0
        head = {"ETag": etag, "Content-Length": str(len(body) - start)}
        if start:
            head["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if faults.stalls:
            self.answer(200, body[: len(body) // 2], head)
            while faults.stalls:
                time.sleep(0.02)
            self.close_connection = True
            return
        if faults.cuts:
            faults.cuts -= 1
            self.answer(206 if start else 200, body[start : start + (len(body) - start) // 2], head)
            self.close_connection = True
            if faults.changed_result:
                self.service.jobs[job_id].body = body[::-1]
            return
        self.answer(206 if start else 200, body[start:], head)

    def damaged(self, body: bytes) -> bytes:
        if not self.service.faults.damaged:
            return body
        self.service.faults.damaged -= 1
        return b"\0" + body[1:]

    # -- bytes ---------------------------------------------------------------------------------------

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def json(self, shape: Json, status: int = 200) -> None:
        self.answer(status, json.dumps(shape).encode(), {"Content-Type": "application/json"})

    def problem(self, exc: KmsError) -> None:
        shape = {"type": f"urn:kms-service:problem:{exc.code}", "title": exc.summary, "detail": exc.detail}
        body = json.dumps({**shape, "status": STATUS[type(exc)], "code": exc.code, "request_id": "r-1"})
        headers = {"Content-Type": "application/problem+json"}
        if isinstance(exc, errors.Unavailable) and self.service.faults.retry_after is not None:
            headers["Retry-After"] = self.service.faults.retry_after
        self.answer(STATUS[type(exc)], body.encode(), headers)

    def answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers and "Connection" not in headers:
            self.send_header("Content-Length", str(len(body)))
        with suppress(ConnectionError):  # the caller may be gone
            self.end_headers()
            self.wfile.write(body)


def text(data: bytes) -> str:
    return b64encode(data).decode("ascii")


@contextmanager
def running(tls: ssl.SSLContext | None = None) -> Iterator[ContractServer]:
    """The server on a free port of 127.0.0.1, over HTTPS if ``tls`` is given."""
    service = ContractServer()
    handler = type("BoundHandler", (Handler,), {"service": service})
    with served(handler, tls=tls) as port:
        service.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        yield service
