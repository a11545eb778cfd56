"""Jobs: submit items or file references, look, follow, cancel."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Final, get_args
from urllib.parse import unquote

import anyio
import anyio.from_thread
import anyio.to_thread
import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from kms_api import json_body
from kms_api.deps import Service, caller, service
from kms_api.openapi import describe_jobs
from kms_api.routing import ScopedRoute
from kms_api.transport import download_writer
from kms_api.transport.admission import reservation_of
from kms_api.transport.transfer_rate import TransferLimits
from kms_api.transport.upload_reader import Pieces
from kms_core import audit
from kms_core.auth.policy import Principal
from kms_core.jobs import bulk_lines
from kms_core.jobs.execution import key_migration
from kms_core.jobs.model import Job
from kms_core.jobs.submission.submitter import SubmissionOptions
from kms_core.settings.validation import JOB_BODY_FACTOR
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import BodyTimeout, InvalidRequest, UnknownJob

router: Final = APIRouter(tags=["jobs"], route_class=ScopedRoute)
KINDS: Final[dict[str, wire.JobKind]] = {kind: kind for kind in get_args(wire.JobKind)}
_NDJSON: Final = "application/x-ndjson"
_LOOK_EVERY_S: Final = 0.25
_LOOK_AT_LEAST_EVERY_S: Final = 1.0
_SLOWING: Final = 8  # a job that did not change for 8 s is looked at each second
_EVENT_THREADS: Final = 2  # of all streams together: more would take the interpreter's lock from other calls
_KEEP_ALIVE_S: Final = 15.0
_DIGITS: Final = 16
_OF_STREAMS: Final = ("x-kms-context", "x-kms-key-id", "x-kms-priority", "x-kms-callback")


@router.post("/jobs", **describe_jobs.SUBMIT)
async def submit(request: Request) -> Response:
    """Bulk items, a file reference, or (as ``application/x-ndjson`` with ``?kind=``) a stream of items."""
    built = service(request)
    if request.headers.get("content-type", "").startswith(_NDJSON):
        job = await _stream_of_items(request, built)
    else:
        _refuse_streamed(request)
        body = await json_body.read(
            request, wire.JobIn, built.settings.kms.limits.json_job_bytes * JOB_BODY_FACTOR
        )
        job = await anyio.to_thread.run_sync(_submit, built, request, body)
    return accepted(job)


@router.get("/jobs", **describe_jobs.LIST)
async def listing(
    request: Request, state: str | None = None, limit: str | None = None, cursor: str | None = None
) -> Response:
    """Jobs of this tenant, newest first; ``next`` is the cursor of the following page."""
    built = service(request)
    size = _number("limit", limit, describe_jobs.PAGE, range(1, describe_jobs.MOST + 1))
    if state is not None and state not in wire.STATES:
        raise InvalidRequest(f"state is one of {', '.join(wire.STATES)}")
    page = built.desk.store.page
    jobs, following = await anyio.to_thread.run_sync(
        lambda: page(caller(request).tenant, state=state, limit=size, before=cursor)
    )
    return json_body.answer(wire.JobList(jobs=[shape(job) for job in jobs], next=following))


@router.get("/jobs/dead", **describe_jobs.DEAD)
async def dead(request: Request, limit: str | None = None) -> Response:
    """Dead letters: jobs that used up their attempts, newest first. ``POST /jobs/{id}/retry`` revives one."""
    size = _number("limit", limit, describe_jobs.PAGE, range(1, describe_jobs.MOST + 1))
    found = await anyio.to_thread.run_sync(service(request).desk.store.dead, caller(request).tenant, size)
    return json_body.answer(wire.JobList(jobs=[shape(job) for job in found]))


@router.post("/jobs/{job_id}/retry", **describe_jobs.RETRY)
async def retry(request: Request, job_id: str) -> Response:
    """Give a dead letter all its attempts again."""
    job = await anyio.to_thread.run_sync(revive, service(request), caller(request), job_id)
    return json_body.answer(shape(job))


@router.get("/jobs/{job_id}", **describe_jobs.ONE)
async def one(request: Request, job_id: str) -> Response:
    """State and progress of one job."""
    job = await found(request, job_id)
    return json_body.answer(shape(job), headers=None if job.ended else {"Retry-After": "1"})


@router.delete("/jobs/{job_id}", **describe_jobs.CANCEL)
async def cancel(request: Request, job_id: str) -> Response:
    """End a queued job now, a running one at its next item or slab."""
    job = await anyio.to_thread.run_sync(withdraw, service(request), caller(request), job_id)
    return json_body.answer(shape(job))


@router.post("/jobs/{job_id}/cancel", **describe_jobs.CANCEL_BY_POST)
async def cancel_by_post(request: Request, job_id: str) -> Response:
    """The same for clients that cannot send DELETE."""
    return await cancel(request, job_id)


@router.get("/jobs/{job_id}/events", **describe_jobs.EVENTS)
async def events(request: Request, job_id: str) -> Response:
    """Server-sent events: one ``progress`` per change, the last with the final state."""
    first = await found(request, job_id)
    held = reservation_of(request.scope)
    held.take(held.admission.streams)
    made = download_writer.WatchedResponse(
        _events(request, first), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
    )
    made.budget = held.admission.streams
    return made


async def _events(request: Request, job: Job) -> AsyncIterator[bytes]:
    """The job each time it changed; it is looked at less often the longer it does not."""
    store, limiter = service(request).desk.store, service(request).limiter("events", _EVENT_THREADS)
    tenant, quiet_s, silent_s = caller(request).tenant, 0.0, 0.0
    yield _event(job)
    while not job.ended and not await request.is_disconnected():
        pause_s = min(max(_LOOK_EVERY_S, quiet_s / _SLOWING), _LOOK_AT_LEAST_EVERY_S)
        await anyio.sleep(pause_s)
        seen = job
        try:
            job = await anyio.to_thread.run_sync(store.get, job.job_id, tenant, limiter=limiter)
        except UnknownJob:  # its record has expired, or was changed by others
            return
        quiet_s, silent_s = quiet_s + pause_s, silent_s + pause_s
        if job != seen:
            yield _event(job)
            quiet_s = silent_s = 0.0
        elif silent_s >= _KEEP_ALIVE_S:
            yield b": still here\n\n"
            silent_s = 0.0


def _event(job: Job) -> bytes:
    return b"event: progress\ndata: " + wire.encode(shape(job)) + b"\n\n"


async def found(request: Request, job_id: str) -> Job:
    """The caller's job of this id; UnknownJob for anybody else's."""
    return await anyio.to_thread.run_sync(service(request).desk.store.get, job_id, caller(request).tenant)


def accepted(job: Job) -> Response:
    """202 with the job's address: from here on it survives any process."""
    answer = wire.JobAccepted(job_id=job.job_id, state=job.state, links=_links(job))
    return json_body.answer(answer, 202, {"Location": answer.links.self_, "Retry-After": "1"})


def shape(job: Job) -> wire.JobOut:
    return wire.JobOut(
        job_id=job.job_id,
        kind=job.kind,
        state=job.state,
        priority=job.priority,
        attempt=job.attempt,
        progress=wire.JobProgress(
            items=job.items,
            items_done=job.items_done,
            items_failed=job.items_failed,
            bytes=job.bytes,
            bytes_done=job.bytes_done,
        ),
        created_at=_time(job.created_at),
        expires_at=_time(job.expires_at),
        not_before=_time(job.not_before) if job.state == "queued" and job.not_before else UNSET,
        error=wire.ErrorCode(code=job.error) if job.error else None,
        report=key_migration.report(job),
        links=_links(job),
    )


def terms_of_headers(request: Request, kind: wire.JobKind) -> SubmissionOptions:
    """Context and key of a streamed body: in headers, never in the query string, which proxies log."""
    key_id = request.headers.get("x-kms-key-id")
    try:
        text = unquote(request.headers.get("x-kms-context", ""), errors="strict")
        context = msgspec.json.decode(text, type=dict[str, str]) if text.startswith("{") else text
    except (UnicodeDecodeError, msgspec.DecodeError):
        raise InvalidRequest("X-KMS-Context is percent-encoded UTF-8: k=v pairs, or a JSON object") from None
    return SubmissionOptions(
        caller(request),
        kind,
        Context.parse(context),
        key_id,
        idempotency=idempotency(request),
        callback=_callback(request.headers.get("x-kms-callback")),
        priority=_priority(request.headers.get("x-kms-priority", "normal")),
    )


def idempotency(request: Request) -> str:
    key = request.headers.get("idempotency-key", "")
    if len(key) > 256:  # noqa: PLR2004 -- a UUID fits seven times
        raise InvalidRequest("Idempotency-Key is above 256 characters")
    return key


def revive(built: Service, who: Principal, job_id: str) -> Job:
    with audit.recorded(built.kms.trail, who, "job.retry", job_id):
        return built.desk.store.retry(job_id, who.tenant, built.settings.kms.jobs.result_ttl_s)


def withdraw(built: Service, who: Principal, job_id: str) -> Job:
    with audit.recorded(built.kms.trail, who, "job.cancel", job_id):
        job = built.desk.store.cancel(job_id, who.tenant)
    if job.state == "cancelled":
        built.desk.spool.delete(job.job_id)
    return job


def _submit(built: Service, request: Request, body: wire.JobIn) -> Job:
    new_context = None if body.new_context is None else Context.parse(body.new_context)
    terms = SubmissionOptions(
        caller(request),
        body.kind,
        Context.parse(body.context),
        body.key_id,
        new_context,
        body.ttl_s,
        idempotency(request),
        callback=body.callback or "",
        priority=body.priority or "normal",
    )
    most = built.settings.kms.limits.json_job_items
    return built.desk.submit(terms, body, most, partial(built.requests.take_items, terms.who.tenant))


async def _stream_of_items(request: Request, built: Service) -> Job:
    """NDJSON of any length: parsed and sealed in a thread, piece by piece, while it arrives."""
    json_body.refuse_encoding(request)
    kind = KINDS.get(request.query_params.get("kind", ""))
    if kind is None:
        raise InvalidRequest(f"POST /jobs?kind= needs one of {', '.join(KINDS)} for a stream of items")
    terms = terms_of_headers(request, kind)
    async with upload_slot(request) as limits:
        pieces = Pieces(request, limits)

        def arriving() -> Iterator[bytes]:
            while piece := anyio.from_thread.run(pieces.next):
                yield piece

        def work() -> Job:
            built.desk.check(terms, bulk=True)
            parsed = (
                bulk_lines.parse_line(index, line) for index, line in enumerate(bulk_lines.lines(arriving()))
            )
            return built.desk.items(terms, built.requests.counted(terms.who.tenant, parsed))

        return await anyio.to_thread.run_sync(work, limiter=built.upload_limiter)


@asynccontextmanager
async def upload_slot(request: Request) -> AsyncIterator[TransferLimits]:
    """A slot for a streamed body, until the request ends, and the pace that its sender must keep.

    Raises RateLimited, Unavailable if none is free in time.
    """
    held = reservation_of(request.scope)
    uploads = held.admission.uploads
    await held.wait(uploads)
    try:
        yield held.admission.transfer
    except BodyTimeout:
        uploads.too_slow()
        raise


def _refuse_streamed(request: Request) -> None:
    """What a body says is never said elsewhere: a context in a header would not be bound to anything."""
    if "kind" in request.query_params or any(name in request.headers for name in _OF_STREAMS):
        raise InvalidRequest("kind= and X-KMS-… are for a stream of items: a JSON body says these itself")


def _callback(name: str | None) -> str:
    if name == "":
        raise InvalidRequest("X-KMS-Callback names an endpoint of the settings: leave it out for none")
    return name or ""


def _priority(text: str) -> wire.Priority:
    for known in wire.PRIORITIES:
        if text == known:
            return known
    raise InvalidRequest(f"X-KMS-Priority is one of {', '.join(wire.PRIORITIES)}")


def _links(job: Job) -> wire.JobLinks:
    base = f"{wire.PREFIX}/jobs/{job.job_id}"
    return wire.JobLinks(self_=base, result=f"{base}/result", events=f"{base}/events")


def _number(name: str, text: str | None, default: int, allowed: range) -> int:
    if text is None:
        return default
    number = int(text) if text.isascii() and text.isdigit() and len(text) < _DIGITS else -1
    if number not in allowed:
        raise InvalidRequest(f"{name} is a number from {allowed[0]} to {allowed[-1]}")
    return number


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
