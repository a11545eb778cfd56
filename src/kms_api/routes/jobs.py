"""Jobs: submission of items and file references, state, waits, events, cancellation and retry."""

from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import suppress
from functools import partial
from typing import Final, get_args

import anyio
from fastapi import Response

from kms_api import json_body
from kms_api.deps import STORE, Service
from kms_api.openapi import describe
from kms_api.routes.files import check_reader, submit_stream
from kms_api.routes.job_answers import POLLS, accepted, awaited, shape, wait_of
from kms_api.routes.job_options import idempotency, labels_of, one_of
from kms_api.routing import LISTS, READ, WRITE, Call, Router, no_body
from kms_api.transport.admission import reservation_of
from kms_api.transport.bodies import WatchedResponse
from kms_api.transport.pace import should_stop_waiting
from kms_core import audit
from kms_core.auth.policy import Principal
from kms_core.envelope.binding import version_of
from kms_core.jobs.events import transitions
from kms_core.jobs.events.transitions import group_of
from kms_core.jobs.execution import results
from kms_core.jobs.model import Job
from kms_core.jobs.submission import celery_intake
from kms_core.jobs.submission.submitter import JSON_BYTES, SubmissionOptions
from kms_protocol import errors, wire
from kms_protocol.errors import BackendUnavailable, InvalidRequest, JobsUnavailable, UnknownKey

router: Final = Router("jobs")


@router.read(
    "/intake", WRITE, STORE, gives="The recipient of messages", refuses=(UnknownKey, BackendUnavailable)
)
def intake(call: Call[None]) -> wire.IntakeOut:
    """The age recipient of ``kms.submit`` messages (Celery); 404 where the service takes none."""
    recipient = celery_intake.recipient(call.service.settings.kms.jobs.intake_identity_path)
    return wire.IntakeOut(
        recipient=str(recipient), key_version=version_of(recipient), version=celery_intake.VERSION
    )


_POLL_S: Final = 0.25
_KEEP_ALIVE_S: Final = 15.0
_PAGE: Final = (100, 1, 1000)
"""The jobs of a page: the default, and the bounds."""
_FEW: Final = 30
"""Records that are read in no more time than a submission takes."""
_LIMIT: Final = describe.query("limit", describe.whole(*_PAGE), "Maximum number of jobs in the answer")
_LISTING: Final = (*describe.JOBS, InvalidRequest)
_CANCELLING: Final = (*describe.ONE_JOB, errors.JobCommitting, errors.DurabilityUnconfirmed)
_SUBMISSION: Final[describe.Json] = {
    "required": True,
    "content": {
        describe.JSON: {"schema": describe.ref(wire.JobIn)},
        describe.NDJSON: {
            "schema": describe.lines(wire.JobItem),
            "example": '{"plaintext": "SGVsbG8=", "context": "row=7"}\n',
        },
    },
}
_EVENT: Final[describe.Json] = {
    "description": "An event. Lines that begin with a colon keep the connection open",
    "type": "object",
    "properties": {
        "id": describe.STRING,
        "event": describe.choice(("job", "gap")),
        "data": {**describe.STRING, "contentMediaType": describe.JSON},
    },
    "required": ["event", "data"],
}
_BODY_FACTOR: Final = 2
"""Bytes of a JSON job's body for each byte of its items, which are base64, with names."""
_read_job: Final = json_body.JsonBody(wire.JobIn, _BODY_FACTOR * JSON_BYTES)


@router.stream(
    "POST",
    "/jobs",
    WRITE,
    body=_SUBMISSION,
    parameters=(
        describe.query(
            "kind",
            describe.choice(get_args(wire.JobKind)),
            "Kind of a stream of items; a JSON body has its own",
        ),
        describe.WAIT,
        *describe.STREAMED,
    ),
    answers=describe.SUBMITTED,
    refuses=(*describe.SUBMITTING, errors.PathRefused, errors.NotACiphertext),
)
async def submit_job(call: Call[None]) -> Response:
    """Bulk items, a file reference, or (as ``application/x-ndjson`` with ``?kind=``) a stream of items."""
    if call.headers.get("content-type", "").startswith(describe.NDJSON):
        return await submit_stream(call)
    if "kind" in call.query or any(each["name"] in call.headers for each in describe.OPTIONS):
        raise InvalidRequest("kind= and X-KMS-… are for a stream of items: a JSON body has fields for these")
    wait_s = wait_of(call)
    body = await _read_job(call.request)
    return await accepted(call, await call.service.run(STORE, _submit, call, body), wait_s)


@router.read(
    "/jobs",
    READ,
    LISTS,
    parameters=(
        describe.query("state", describe.choice(wire.STATES), "Only jobs in this state"),
        describe.LABEL,
        _LIMIT,
        describe.query("cursor", describe.STRING, "`next` of the previous page"),
    ),
    gives="Jobs, newest first",
    refuses=_LISTING,
)
def list_jobs(call: Call[None]) -> wire.JobList:
    """Jobs of this tenant, newest first; ``next`` is the cursor of the following page."""
    jobs, following = call.service.submitter.store.page(
        call.caller.tenant,
        state=one_of("state", call.query.get("state"), (None, *wire.STATES)),
        limit=call.number("limit", *_PAGE),
        before=call.query.get("cursor"),
        labels=labels_of(call.query.getlist("label")),
    )
    return wire.JobList(jobs=[shape(job) for job in jobs], next=following)


@router.read("/jobs/dead", READ, LISTS, parameters=(_LIMIT,), gives="Jobs, newest first", refuses=_LISTING)
def dead_jobs(call: Call[None]) -> wire.JobList:
    """Jobs that used up their attempts, newest first. ``POST /jobs/{id}/retry`` queues one again."""
    found = call.service.submitter.store.dead(call.caller.tenant, call.number("limit", *_PAGE))
    return wire.JobList(jobs=[shape(job) for job in found])


@router.call(
    "POST",
    "/jobs/{job_id}/retry",
    WRITE,
    no_body,
    STORE,
    gives="The job",
    refuses=(*describe.ONE_JOB, errors.JobNotDead, errors.DurabilityUnconfirmed),
)
def retry_job(call: Call[None]) -> wire.JobOut:
    """Queue a dead job again, with all its attempts."""
    return shape(revive(call.service, call.caller, call.path("job_id")))


@router.stream(
    "GET",
    "/jobs/events",
    READ,
    parameters=(
        describe.LABEL,
        describe.header("Last-Event-ID", describe.STRING, "The id of an event: the stream begins behind it"),
    ),
    answers={
        200: describe.raw(
            "Events `job` with a CloudEvent (JSON) as data, and `gap` where events were lost",
            {"text/event-stream": {"schema": _EVENT}},
            "X-Accel-Buffering",
        )
    },
    refuses=_LISTING,
)
async def tenant_events(call: Call[None]) -> Response:
    """Server-sent events of all jobs of the tenant, as webhooks tell them.

    A stream begins behind the ``Last-Event-ID``, without one at the next event. An event ``gap`` says that
    events behind that id are lost: list the jobs.
    """
    labels, after = labels_of(call.query.getlist("label")), call.headers.get("last-event-id")
    batch = await _newest(call, 0.0) if after is None else await _read(call, after)
    reservation_of(call.request.scope).take("streams")
    stream = _event_stream(call, batch, labels)
    return WatchedResponse(stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


async def _event_stream(
    call: Call[None], batch: transitions.FeedBatch, labels: Mapping[str, str]
) -> AsyncIterator[bytes]:
    """The events of a tenant from a batch on. Ends if Redis does not answer: readers come back."""
    text, silent_s = b": connected\n\n", 0.0
    with suppress(JobsUnavailable):
        while not should_stop_waiting(call.request.scope):
            text += b"event: gap\ndata: {}\n\n" if batch.is_gapped else b""
            text += b"".join(_lines(each) for each in batch.events if labels.items() <= each.labels.items())
            if text:
                yield text
            text, silent_s = b"", 0.0 if text else silent_s + _POLL_S
            if silent_s >= _KEEP_ALIVE_S:
                text = b": still here\n\n"
            newest = None if batch.is_full else await _newest(call, _POLL_S)
            batch = newest if newest and newest.cursor == batch.cursor else await _read(call, batch.cursor)


def _lines(event: transitions.FeedEvent) -> bytes:
    return b"id: " + event.event_id.encode() + b"\nevent: job\ndata: " + event.body + b"\n\n"


def _newest(call: Call[None], after_s: float) -> Awaitable[transitions.FeedBatch]:
    return call.service.run_shared(POLLS, after_s, transitions.newest, call.service.submitter.store)


def _read(call: Call[None], after: str) -> Awaitable[transitions.FeedBatch]:
    about = call.service.submitter.store, call.caller.tenant, after
    return call.service.run_shared(LISTS(call), 0.0, transitions.read_feed, *about)


@router.stream(
    "GET",
    "/job-groups/{name}",
    READ,
    parameters=(describe.WAIT,),
    answers={200: describe.gives(wire.GroupOut, "The group")},
    refuses=(*describe.ONE_JOB, InvalidRequest),
)
async def get_group(call: Call[None]) -> Response:
    """The jobs of a group by state; with ``?wait=`` (seconds) once all have ended, or after that time."""
    wait_s = wait_of(call)
    found = None if wait_s and (await _counts(call, 0.0))[1] else await _group(call)
    if wait_s and not (found and found.ended):
        reservation_of(call.request.scope).take("streams")
        found = await _group_at_end(call, wait_s, found.jobs if found else 0)
    return json_body.answer(found or await _group(call))


async def _group_at_end(call: Call[None], wait_s: int, jobs: int) -> wire.GroupOut:
    """The group once all its jobs have ended, or as it is after ``wait_s`` seconds.

    It has at least ``jobs``. Its counts are not signed: they say that it has not ended, and else its jobs are
    verified.
    """
    until, seen = anyio.current_time() + wait_s, (0, 0)
    while anyio.current_time() < until and not should_stop_waiting(call.request.scope):
        counts = submitted, still_open = await _counts(call, _POLL_S)
        if not still_open and submitted >= jobs and counts != seen:
            found, seen = await _group(call), counts
            if found.ended:
                return found
            jobs = found.jobs
    return await _group(call)


def _counts(call: Call[None], after_s: float) -> Awaitable[tuple[int, int]]:
    counts = call.service.submitter.store.group_counts
    return call.service.run_shared(POLLS, after_s, counts, call.caller.tenant, call.path("name"))


def _group(call: Call[None]) -> Awaitable[wire.GroupOut]:
    about = call.service.submitter.store, call.caller.tenant, call.path("name")
    return call.service.run_shared(LISTS(call), 0.0, group_of, *about)


@router.call(
    "POST",
    "/jobs/status",
    READ,
    json_body.JsonBody(wire.JobsIn),
    lambda call: LISTS(call) if len(call.body.job_ids) > _FEW else STORE,
    gives="The jobs",
    refuses=describe.JOBS,
)
def get_jobs(call: Call[wire.JobsIn]) -> wire.JobsOut:
    """State and progress of up to 1,000 jobs in one call, in the order asked for."""
    wanted = list(dict.fromkeys(call.body.job_ids))
    found = call.service.submitter.store.many(wanted, call.caller.tenant)
    known = {job.job_id for job in found}
    unknown = [job_id for job_id in wanted if job_id not in known]
    return wire.JobsOut(jobs=[shape(job) for job in found], unknown=unknown)


@router.stream(
    "GET",
    "/jobs/{job_id}",
    READ,
    parameters=(describe.WAIT,),
    answers={200: describe.gives(wire.JobOut, "The job", "Retry-After")},
    refuses=(*describe.ONE_JOB, InvalidRequest),
)
async def get_job(call: Call[None]) -> Response:
    """State and progress of one job; with ``?wait=`` (seconds) once it has ended, or after that time."""
    wait_s = wait_of(call)
    store = call.service.submitter.store
    found = await call.service.run(STORE, store.get, call.path("job_id"), call.caller.tenant)
    job = await awaited(call, found, wait_s)
    return json_body.answer(shape(job), headers=None if job.ended else {"Retry-After": "1"})


@router.call("DELETE", "/jobs/{job_id}", WRITE, no_body, STORE, gives="The job", refuses=_CANCELLING)
def cancel_job(call: Call[None]) -> wire.JobOut:
    """End a queued job now, a running one at its next item or slab: until then it is ``cancelling``."""
    return shape(withdraw(call.service, call.caller, call.path("job_id")))


@router.call(
    "DELETE",
    "/jobs/{job_id}/result",
    READ,
    no_body,
    STORE,
    gives="The job",
    refuses=(*describe.ONE_RESULT, UnknownKey),
)
def release_result(call: Call[None]) -> wire.JobOut:
    """Delete the result of an ended job now, for those who may fetch it; of a dead job also its input."""
    store, spool = call.service.submitter.store, call.service.submitter.spool
    job = store.get(call.path("job_id"), call.caller.tenant)
    check_reader(call, job)
    with audit.recorded(call.service.kms.audit_log, call.caller, "job.release", job.job_id):
        results.delete(job, store, spool)
    return shape(store.get(job.job_id, call.caller.tenant))


@router.call("POST", "/jobs/{job_id}/cancel", WRITE, no_body, STORE, gives="The job", refuses=_CANCELLING)
def cancel_job_by_post(call: Call[None]) -> wire.JobOut:
    """Cancel, for clients that cannot send DELETE."""
    return cancel_job(call)


def revive(service: Service, who: Principal, job_id: str) -> Job:
    """Retry a dead job, on record in the audit log. Raises JobNotDead, UnknownJob."""
    with audit.recorded(service.kms.audit_log, who, "job.retry", job_id):
        return service.submitter.store.retry(job_id, who.tenant)


def withdraw(service: Service, who: Principal, job_id: str) -> Job:
    """Cancel a job, on record in the audit log. Raises JobCommitting, UnknownJob."""
    with audit.recorded(service.kms.audit_log, who, "job.cancel", job_id):
        job = service.submitter.store.cancel(job_id, who.tenant)
    if job.state == "cancelled" and not job.parts:  # else the result says what was done before
        service.submitter.spool.delete(job.job_id)
    return job


def _submit(call: Call[None], body: wire.JobIn) -> Job:
    service, who = call.service, call.caller
    options = SubmissionOptions.of(who, body, idempotency=idempotency(call))
    return service.submitter.submit(options, partial(service.requests.take_items, who.tenant))
