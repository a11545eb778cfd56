"""Files of any size: a streamed upload becomes a job, a job's result is a streamed download with ranges."""

import re
from base64 import b64encode
from collections.abc import Generator, Iterator
from contextlib import aclosing, nullcontext, suppress
from functools import partial
from hashlib import sha256
from itertools import islice
from typing import Final, TypeVar, get_args

import anyio.from_thread
from fastapi import Response
from starlette.requests import ClientDisconnect

from kms_api.deps import STORE, Pool
from kms_api.openapi import describe
from kms_api.problems import problem
from kms_api.routes.job_answers import accepted, wait_of
from kms_api.routes.job_options import one_of, submission_options
from kms_api.routing import READ, WRITE, Call, Router
from kms_api.transport import bodies
from kms_api.transport.admission import reservation_of
from kms_api.transport.pace import should_stop_waiting
from kms_core import audit
from kms_core.jobs import authorization, bulk_lines
from kms_core.jobs.execution import results
from kms_core.jobs.execution.results import Result
from kms_core.jobs.model import Job
from kms_protocol import wire
from kms_protocol.errors import (
    DecryptFailed,
    JobsUnavailable,
    NotACiphertext,
    RecordRefused,
    UnknownJob,
    UnknownKey,
)
from kms_protocol.units import GiB

T = TypeVar("T")
router: Final = Router("files")
_RESULT: Final = {
    describe.BINARY: {"schema": describe.BYTES},
    describe.NDJSON: {"schema": describe.lines(wire.ItemResult)},
}
_KINDS: Final[tuple[wire.JobKind, ...]] = get_args(wire.JobKind)
_CHUNK_BYTES: Final = 64 * 1024
_OF_RESULT: Final = ("ETag", "Accept-Ranges", "Content-Disposition", "X-KMS-File-Id")
_WANTED: Final = re.compile(r"(?:^|,)\s*sha-256\s*=\s*(?:[1-9]|10)\s*(?:,|$)")
_MOST_HASHED_BYTES: Final = 4 * GiB
"""Of a result whose digest is given: hashing takes longer than callers wait for more."""
_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@router.stream(
    "POST",
    "/files/encrypt",
    WRITE,
    body=describe.TAKES_BYTES,
    parameters=(describe.WAIT, *describe.STREAMED),
    answers=describe.SUBMITTED,
    refuses=describe.SUBMITTING,
)
async def encrypt_file(call: Call[None]) -> Response:
    """Upload plaintext of any size; it is sealed while it arrives. Context in ``X-KMS-Context``."""
    return await _upload(call, "encrypt")


@router.stream(
    "POST",
    "/files/decrypt",
    WRITE,
    body=describe.TAKES_BYTES,
    parameters=(describe.WAIT, *describe.STREAMED),
    answers=describe.SUBMITTED,
    refuses=(*describe.SUBMITTING, NotACiphertext),
)
async def decrypt_file(call: Call[None]) -> Response:
    """Upload an age file of any size. The result exists once every chunk was authenticated."""
    return await _upload(call, "decrypt")


@router.stream(
    "GET",
    "/jobs/{job_id}/result",
    READ,
    parameters=(
        describe.header("Range", describe.STRING, "One range of bytes, as `bytes=0-1023`"),
        describe.header("If-Range", describe.STRING, "The ETag that the range is of"),
        describe.header(
            "Want-Repr-Digest", describe.STRING, "With HEAD: `sha-256=1` asks for Repr-Digest (RFC 9530)"
        ),
    ),
    answers={
        200: describe.raw("The whole result", _RESULT, *_OF_RESULT),
        206: describe.raw("The bytes of the range", _RESULT, *_OF_RESULT, "Content-Range"),
    },
    refuses=(*describe.ONE_RESULT, UnknownKey, DecryptFailed, RecordRefused),
)
async def job_result(call: Call[None]) -> Response:
    """The bytes of a file job (with ``Range``), or one JSON line for each item of a bulk job."""
    service = call.service
    job = await service.run(STORE, service.submitter.store.get, call.path("job_id"), call.caller.tenant)
    reservation_of(call.request.scope).take("downloads")
    made, body = await service.run(STORE, _result, call, job)
    if _wants_digest(call) and body.size <= _MOST_HASHED_BYTES:
        made.headers["Repr-Digest"] = await _digest(call, body)
    return made


async def _upload(call: Call[None], kind: wire.JobKind) -> Response:
    wait_s = wait_of(call)
    sink = call.service.submitter.receive_upload(
        submission_options(call, kind), int(call.headers.get("content-length") or 0)
    )
    reservation_of(call.request.scope).take("uploads")
    job = await bodies.receive(call.request, sink, call.service.threads)
    return await accepted(call, job, wait_s)


async def submit_stream(call: Call[None]) -> Response:
    """Submit NDJSON of any length, parsed and sealed in a thread while it arrives."""
    kind = one_of("kind", call.query.get("kind", ""), _KINDS)
    service, options, wait_s = call.service, submission_options(call, kind), wait_of(call)
    bodies.refuse_encoding(call.request)
    reservation_of(call.request.scope).take("uploads")
    reader = bodies.UploadReader(call.request)

    def arriving() -> Iterator[memoryview]:
        slab, more = memoryview(bytearray(_CHUNK_BYTES)), True
        while more:
            size, more = anyio.from_thread.run(reader.fill, slab)
            yield slab[:size]

    def submit_items() -> Job:
        service.submitter.check(options, bulk=True)
        parsed = (
            bulk_lines.parse_line(index, line) for index, line in enumerate(bulk_lines.lines(arriving()))
        )
        return service.submitter.items(options, service.requests.counted(options.who.tenant, parsed))

    job = await service.run(Pool("items", service.settings.kms.server.uploads), submit_items)
    return await accepted(call, job, wait_s)


def _result(call: Call[None], job: Job) -> tuple[Response, Result]:
    log, submitter = call.service.kms.audit_log, call.service.submitter
    check_reader(call, job)
    is_read = call.request.method != "HEAD" or _wants_digest(call)
    with audit.recorded(log, call.caller, "job.result", job.job_id) if is_read else nullcontext():
        body = results.of(job, submitter.store, submitter.spool)
        return _ranged(call, job, body), body


def _wants_digest(call: Call[None]) -> bool:
    """Return whether a HEAD request asks for the SHA-256 of the whole result (RFC 9530 §4)."""
    wanted = call.headers.get("want-repr-digest", "")
    return call.request.method == "HEAD" and _WANTED.search(wanted) is not None


async def _digest(call: Call[None], body: Result) -> str:
    """Return the value of Repr-Digest (RFC 9530 §3) of a result, which is read for it.

    Raises what reading it raises; ClientDisconnect once its caller is gone.
    """
    hasher = sha256()
    slabs = body.slabs(0, body.size)

    def hashed() -> Generator[bool]:
        for slab in slabs:
            hasher.update(slab)
            yield True

    async with aclosing(bodies.send(hashed(), call.service.threads)) as steps:
        async for _ in steps:
            if should_stop_waiting(call.request.scope):
                raise ClientDisconnect
    return f"sha-256=:{b64encode(hasher.digest()).decode()}:"


def check_reader(call: Call[None], job: Job) -> None:
    """Raise Forbidden unless the caller may fetch, or release, the result of a job."""
    accepted = job.accepted or call.service.submitter.store.accepted(job.job_id)
    authorization.check_reader(call.service.kms, call.caller, accepted)


def _ranged(call: Call[None], job: Job, body: Result) -> Response:
    """200, 206 or 416 (RFC 9110 §14). Several ranges are answered with the whole result."""
    etag = f'"{job.job_id}.{job.result_attempt}"'
    headers = {"ETag": etag, "Accept-Ranges": "bytes", "Content-Disposition": "attachment"}
    if body.file_id:
        headers["X-KMS-File-Id"] = body.file_id
    size = body.size
    start, stop, status = 0, size, 200
    wanted = _range_of(call.headers.get("range", ""), size)
    if wanted and call.headers.get("if-range", etag) == etag:
        start, stop = wanted
        if start >= stop:
            found = f"The result has {size} bytes"
            return problem(416, "invalid_request", found, {"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        status = 206
    media_type = describe.NDJSON if body.lines else describe.BINARY
    headers["Content-Length"] = str(stop - start)
    slabs = body.slabs(start, stop)
    begun = slabs if call.request.method == "HEAD" else _begun(slabs)
    sending = bodies.send(begun, call.service.threads)
    made = bodies.WatchedResponse(sending, status, headers, media_type)
    if job.accepted and job.accepted.release and (stop > start or not size):
        made.on_end = partial(_fetched, call, job, start, size)
    return made


async def _fetched(call: Call[None], job: Job, start: int, size: int, sent: int) -> None:
    """Note that a reader was sent so many bytes. ``sent`` is below all of them if the answer broke off."""
    with suppress(JobsUnavailable, UnknownJob):  # then the result stays until it expires
        await call.service.run(STORE, call.service.submitter.store.fetched, job, start, start + sent, size)


def _begun(slabs: Generator[T]) -> Generator[T]:
    """Yield slabs after the first two are made, so that an error in those is answered as a problem.

    The first slab of a ciphertext is its header.
    """
    first = list(islice(slabs, 2))

    def rest() -> Generator[T]:
        yield from first
        first.clear()
        yield from slabs

    return rest()


def _range_of(header: str, size: int) -> tuple[int, int] | None:
    """Start and stop of the range of a valid header; None for any other, which is ignored."""
    match = _RANGE.fullmatch(header)
    first, last = match.groups() if match else ("", "")
    if not first:
        return (max(0, size - int(last)), size) if last else None
    if last and int(last) < int(first):
        return None
    return int(first), min(size, int(last) + 1) if last else size
