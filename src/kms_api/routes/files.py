"""Files of any size: a streamed upload becomes a job, a job's result is a streamed download with ranges."""

import re
from collections.abc import Generator
from itertools import islice
from typing import Final, TypeVar

import anyio.to_thread
from fastapi import APIRouter, Request, Response

from kms_api import json_body
from kms_api.deps import Service, caller, service
from kms_api.errors.problems import problem
from kms_api.openapi import describe
from kms_api.routes import jobs
from kms_api.routing import ScopedRoute
from kms_api.transport import download_writer, streaming
from kms_api.transport.admission import reservation_of
from kms_core import audit
from kms_core.jobs import authorization
from kms_core.jobs.execution import results
from kms_core.jobs.execution.results import Result
from kms_core.jobs.model import Job
from kms_core.jobs.storage.spool import UPLOAD, Label
from kms_core.jobs.submission import submitter
from kms_core.jobs.submission.submitter import SubmissionOptions
from kms_protocol import wire
from kms_protocol.errors import (
    DecryptFailed,
    InvalidRequest,
    JobNotFinished,
    NotACiphertext,
    RecordRefused,
    ResultExpired,
    UnknownKey,
)

T = TypeVar("T")
router: Final = APIRouter(tags=["files"], route_class=ScopedRoute)
_RESULT: Final = {
    describe.BINARY: {"schema": describe.BYTES},
    describe.NDJSON: {"schema": {"type": "string"}, "x-kms-line": describe.ref(wire.ItemResult)},
}
_OF_RESULT: Final = ("ETag", "Accept-Ranges", "Content-Disposition")
_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@router.post(
    "/files/encrypt",
    **describe.described(
        "encrypt_file",
        body=describe.TAKES_BYTES,
        parameters=describe.STREAMED,
        answers={202: describe.accepted()},
        refuses=describe.SUBMITTING,
    ),
)
async def encrypt(request: Request) -> Response:
    """Upload plaintext of any size; it is sealed while it arrives. Context in ``X-KMS-Context``."""
    return await _upload(request, "encrypt")


@router.post(
    "/files/decrypt",
    **describe.described(
        "decrypt_file",
        body=describe.TAKES_BYTES,
        parameters=describe.STREAMED,
        answers={202: describe.accepted()},
        refuses=(*describe.SUBMITTING, NotACiphertext),
    ),
)
async def decrypt(request: Request) -> Response:
    """Upload an age file of any size. The result is there once every chunk has proven genuine."""
    return await _upload(request, "decrypt")


@router.get(
    "/jobs/{job_id}/result",
    **describe.described(
        "job_result",
        parameters=(
            describe.header("Range", {"type": "string"}, "One range of bytes, as `bytes=0-1023`"),
            describe.header("If-Range", {"type": "string"}, "The ETag that the range is of"),
        ),
        answers={
            200: describe.raw("The whole result", _RESULT, *_OF_RESULT),
            206: describe.raw("The bytes that were asked for", _RESULT, *_OF_RESULT, "Content-Range"),
            416: describe.refusal(416, {"invalid_request": "No byte in that range"}, "Content-Range"),
        },
        refuses=(*describe.ONE_JOB, UnknownKey, DecryptFailed, JobNotFinished, ResultExpired, RecordRefused),
    ),
)
async def result(request: Request, job_id: str) -> Response:
    """The bytes of a file job (with ``Range``), or one JSON line for each item of a bulk job."""
    job = await jobs.found(request, job_id)
    held = reservation_of(request.scope)
    await held.wait(held.admission.downloads)
    download_writer.unlock(request)
    return await anyio.to_thread.run_sync(_result, service(request), request, job)


async def _upload(request: Request, kind: wire.JobKind) -> Response:
    json_body.refuse_encoding(request)
    built = service(request)
    terms = jobs.terms_of_headers(request, kind)
    declared = int(request.headers.get("content-length") or 0)
    sink = _received(built, terms, declared)
    async with jobs.upload_slot(request) as limits:
        job = await streaming.receive(request, sink, built.threads, limits)
    return jobs.accepted(job)


def _received(
    built: Service, terms: SubmissionOptions, declared: int
) -> Generator[None, streaming.Slab, Job]:
    """Seal and write what arrives, slab by slab; a broken upload leaves nothing."""
    built.desk.check(terms)
    check_room = built.desk.meter(terms, declared)
    job_id = submitter.new_id()
    hasher = built.desk.hasher(terms) if terms.idempotency else None
    label = Label(terms.who.tenant, job_id, UPLOAD)
    with built.desk.spool.writing(label, sealed=terms.kind == "encrypt", declared_bytes=declared) as out:
        more = True
        while more:
            slab, more = yield
            out.write(slab, more=more)
            check_room(out.size)
            if hasher:
                hasher.update(slab)
        if declared and out.size != declared:
            raise InvalidRequest("The upload ended before its Content-Length")
        size = out.size
    return built.desk.upload(terms, job_id, size, hasher.digest() if hasher else b"", out.ref)


# -- results ---------------------------------------------------------------------------------------


def _result(built: Service, request: Request, job: Job) -> Response:
    who = caller(request)
    authorization.check_reader(built.kms, who, built.desk.store.accepted(job.job_id))
    with audit.recorded(built.kms.trail, who, "job.result", job.job_id):
        body = results.of(job, built.desk.store, built.desk.spool)
        return _ranged(request, job, body)


def _ranged(request: Request, job: Job, body: Result) -> Response:
    """200, 206 or 416 (RFC 9110 §14). Several ranges at once are answered with the whole."""
    etag = f'"{job.job_id}.{job.fence}"'
    headers = {"ETag": etag, "Accept-Ranges": "bytes", "Content-Disposition": "attachment"}
    size = body.size
    start, stop, status = 0, size, 200
    asked = _asked(request.headers.get("range", ""))
    if asked and request.headers.get("if-range", etag) == etag:
        start, stop = _bounds(*asked, size=size)
        if start >= stop:
            refusal = problem(416, "invalid_request", f"The result has {size} bytes")
            refusal.headers["Content-Range"] = f"bytes */{size}"
            return refusal
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        status = 206
    media_type = "application/x-ndjson" if body.lines else "application/octet-stream"
    headers["Content-Length"] = str(stop - start)
    sending = streaming.send(_begun(body.slabs(start, stop)), service(request).threads)
    made = download_writer.WatchedResponse(sending, status, headers, media_type)
    made.budget = reservation_of(request.scope).admission.downloads
    return made


def _begun(slabs: Generator[T]) -> Generator[T]:
    """The same, with two slabs made at once: what is wrong with them is answered as a problem.

    The first of a ciphertext is its header.
    """
    first = list(islice(slabs, 2))

    def rest() -> Generator[T]:
        yield from first
        first.clear()
        yield from slabs

    return rest()


def _asked(header: str) -> tuple[str, str] | None:
    """One range that makes sense, or None: anything else is as if it had not been asked for."""
    match = _RANGE.fullmatch(header)
    if not match:
        return None
    first, last = match.groups()
    backwards = first and last and int(last) < int(first)
    return None if backwards or not (first or last) else (first, last)


def _bounds(first: str, last: str, *, size: int) -> tuple[int, int]:
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size
