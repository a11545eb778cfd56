"""Jobs: submission of items and file references, state, waits, events, cancellation and retry."""

from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Final

import anyio
from fastapi import Response

from kms_api import json_body
from kms_api.deps import STORE, Service
from kms_api.openapi import describe
from kms_api.routes.files import OPTION_HEADERS, check_reader, idempotency, labels_of, submit_stream
from kms_api.routes.job_answers import POLLS, accepted, awaited, shape, wait_of
from kms_api.routing import READ, WRITE, Call, Router, no_body
from kms_api.transport.admission import reservation_of
from kms_api.transport.connection import should_end
from kms_api.transport.download import WatchedResponse
from kms_core import audit
from kms_core.age.recipients import version_of
from kms_core.auth.policy import Principal
from kms_core.jobs.events import feed
from kms_core.jobs.events.groups import group_of
from kms_core.jobs.execution import results
from kms_core.jobs.model import Job
from kms_core.jobs.submission import celery_intake
from kms_core.jobs.submission.deadlines import Deadlines
from kms_core.jobs.submission.submitter import SubmissionOptions
from kms_protocol import submit_message, wire
from kms_protocol.context import Context
from kms_protocol.errors import BackendUnavailable, InvalidRequest, JobsUnavailable, UnknownKey

router: Final = Router("jobs")


@router.call(
    "GET",
    "/intake",
    WRITE,
    no_body,
    STORE,
    gives="The recipient of messages",
    refuses=(UnknownKey, BackendUnavailable),
)
def intake(call: Call[None]) -> submit_message.IntakeOut:
    """The age recipient of ``kms.submit`` messages (Celery); 404 where the service takes none."""
    recipient = celery_intake.recipient(call.service.settings.kms.jobs.intake_identity_path)
    return submit_message.IntakeOut(
        recipient=str(recipient), key_version=version_of(recipient), version=celery_intake.VERSION
    )


_NDJSON: Final = "application/x-ndjson"
_POLL_S: Final = 0.25
_MAX_POLL_S: Final = 1.0  # each poll of a group reads all its jobs
_KEEP_ALIVE_S: Final = 15.0
_DIGITS: Final = 16
_BODY_FACTOR: Final = 2
"""Bytes of a JSON job's body for each byte of its items, which are base64, with names."""
_read_job: Final = json_body.JsonBody(wire.JobIn, lambda limits: limits.json_job_bytes * _BODY_FACTOR)


_read_ids: Final = json_body.JsonBody(wire.JobsIn)


@router.stream("POST", "/jobs", WRITE, **describe.SUBMIT)
async def submit(call: Call[None]) -> Response:
    """Bulk items, a file reference, or (as ``application/x-ndjson`` with ``?kind=``) a stream of items."""
    if call.headers.get("content-type", "").startswith(_NDJSON):
        return await submit_stream(call)
    if "kind" in call.query or any(name in call.headers for name in OPTION_HEADERS):
        raise InvalidRequest("kind= and X-KMS-… are for a stream of items: a JSON body has fields for these")
    wait_s = wait_of(call)
    body = await _read_job(call.request)
    return await accepted(call, await call.service.run(STORE, _submit, call, body), wait_s)


@router.call("GET", "/jobs", READ, no_body, STORE, **describe.LIST)
def listing(call: Call[None]) -> wire.JobList:
    """Jobs of this tenant, newest first; ``next`` is the cursor of the following page."""
    state = call.query.get("state")
    if state is not None and state not in wire.STATES:
        raise InvalidRequest(f"state is one of {', '.join(wire.STATES)}")
    jobs, following = call.service.submitter.store.page(
        call.caller.tenant,
        state=state,
        limit=_limit(call),
        before=call.query.get("cursor"),
        labels=labels_of(call.query.getlist("label")),
    )
    return wire.JobList(jobs=[shape(job) for job in jobs], next=following)


@router.call("GET", "/jobs/dead", READ, no_body, STORE, **describe.DEAD)
def dead(call: Call[None]) -> wire.JobList:
    """Jobs that used up their attempts, newest first. ``POST /jobs/{id}/retry`` queues one again."""
    found = call.service.submitter.store.dead(call.caller.tenant, _limit(call))
    return wire.JobList(jobs=[shape(job) for job in found])


@router.call("POST", "/jobs/{job_id}/retry", WRITE, no_body, STORE, **describe.RETRY)
def retry(call: Call[None]) -> wire.JobOut:
    """Queue a dead job again, with all its attempts."""
    return shape(revive(call.service, call.caller, call.path("job_id")))


@router.stream("GET", "/jobs/events", READ, **describe.ALL_EVENTS)
async def all_events(call: Call[None]) -> Response:
    """Server-sent events of all jobs of the tenant, as webhooks tell them.

    A stream begins behind the ``Last-Event-ID``, without one at the next event. An event ``gap`` says that
    events behind that id are lost: list the jobs.
    """
    labels, store = labels_of(call.query.getlist("label")), call.service.submitter.store
    after = call.headers.get("last-event-id")
    if after is None:
        batch = feed.FeedBatch([], await call.service.run(STORE, feed.newest, store))
    else:
        batch = await call.service.run(STORE, feed.read, store, call.caller.tenant, after, labels)
    held = reservation_of(call.request.scope)
    held.take(held.admission.streams)
    told = _all_events(call, batch, labels)
    made = WatchedResponse(told, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
    made.budget = held.admission.streams
    return made


async def _all_events(
    call: Call[None], batch: feed.FeedBatch, labels: Mapping[str, str]
) -> AsyncIterator[bytes]:
    """The events of a tenant from a batch on. Ends if Redis does not answer: readers come back."""
    silent_s, store = 0.0, call.service.submitter.store
    yield b": connected\n\n"
    while not should_end(call.request.scope):
        if batch.is_gapped:
            yield b"event: gap\ndata: {}\n\n"
        for event_id, body in batch.events:
            yield b"id: " + event_id.encode() + b"\nevent: job\ndata: " + body + b"\n\n"
            silent_s = 0.0
        if silent_s >= _KEEP_ALIVE_S:
            yield b": still here\n\n"
            silent_s = 0.0
        if not batch.is_full:
            await anyio.sleep(_POLL_S)
            silent_s += _POLL_S
        try:
            batch = await call.service.run(POLLS, feed.read, store, call.caller.tenant, batch.cursor, labels)
        except JobsUnavailable:
            return


@router.stream("GET", "/job-groups/{name}", READ, **describe.GROUP)
async def group(call: Call[None]) -> Response:
    """The jobs of a group by state; with ``?wait=`` (seconds) once all have ended, or after that time."""
    wait_s = wait_of(call)
    look = partial(group_of, call.service.submitter.store, call.caller.tenant, call.path("name"))
    found = await call.service.run(STORE, look)
    if wait_s and not found.ended:
        held = reservation_of(call.request.scope)
        held.take(held.admission.streams)
    until, pause_s = anyio.current_time() + wait_s, _POLL_S
    while not found.ended and (left_s := until - anyio.current_time()) > 0:
        await anyio.sleep(min(pause_s, left_s))
        pause_s = min(pause_s * 1.5, _MAX_POLL_S)
        if should_end(call.request.scope):
            break
        found = await call.service.run(POLLS, look)
    return json_body.answer(found)


@router.call("POST", "/jobs/status", READ, _read_ids, STORE, **describe.MANY)
def many(call: Call[wire.JobsIn]) -> wire.JobsOut:
    """State and progress of up to 1,000 jobs in one call, in the order asked for."""
    wanted = list(dict.fromkeys(call.body.job_ids))
    found = call.service.submitter.store.many(wanted, call.caller.tenant)
    known = {job.job_id for job in found}
    unknown = [job_id for job_id in wanted if job_id not in known]
    return wire.JobsOut(jobs=[shape(job) for job in found], unknown=unknown)


@router.stream("GET", "/jobs/{job_id}", READ, **describe.ONE)
async def one(call: Call[None]) -> Response:
    """State and progress of one job; with ``?wait=`` (seconds) once it has ended, or after that time."""
    wait_s = wait_of(call)
    found = await call.service.run(STORE, job_of, call.service, call.caller, call.path("job_id"))
    job = await awaited(call, found, wait_s)
    return json_body.answer(shape(job), headers=None if job.ended else {"Retry-After": "1"})


@router.call("DELETE", "/jobs/{job_id}", WRITE, no_body, STORE, **describe.CANCEL)
def cancel(call: Call[None]) -> wire.JobOut:
    """End a queued job now, a running one at its next item or slab: until then it is ``cancelling``."""
    return shape(withdraw(call.service, call.caller, call.path("job_id")))


@router.call("DELETE", "/jobs/{job_id}/result", READ, no_body, STORE, **describe.RELEASE)
def release(call: Call[None]) -> wire.JobOut:
    """Delete the result of an ended job now, for those who may fetch it; of a dead job also its input."""
    store, spool = call.service.submitter.store, call.service.submitter.spool
    job = job_of(call.service, call.caller, call.path("job_id"))
    check_reader(call, job)
    with audit.recorded(call.service.kms.audit_log, call.caller, "job.release", job.job_id):
        results.release(job, store, spool)
    return shape(job_of(call.service, call.caller, job.job_id))


@router.call("POST", "/jobs/{job_id}/cancel", WRITE, no_body, STORE, **describe.CANCEL_BY_POST)
def cancel_by_post(call: Call[None]) -> wire.JobOut:
    """Cancel, for clients that cannot send DELETE."""
    return cancel(call)


def job_of(service: Service, who: Principal, job_id: str) -> Job:
    """The caller's job of this id. Raises UnknownJob, also for a job of another tenant."""
    return service.submitter.store.get(job_id, who.tenant)


def revive(service: Service, who: Principal, job_id: str) -> Job:
    """Retry a dead job, on record in the audit log. Raises JobNotDead, UnknownJob."""
    with audit.recorded(service.kms.audit_log, who, "job.retry", job_id):
        return service.submitter.store.retry(job_id, who.tenant, service.settings.kms.jobs.run_within_s)


def withdraw(service: Service, who: Principal, job_id: str) -> Job:
    """Cancel a job, on record in the audit log. Raises JobCommitting, UnknownJob."""
    with audit.recorded(service.kms.audit_log, who, "job.cancel", job_id):
        job = service.submitter.store.cancel(job_id, who.tenant)
    if job.state == "cancelled" and not job.parts:  # else the result says what was done before
        service.submitter.spool.delete(job.job_id)
    return job


def _submit(call: Call[None], body: wire.JobIn) -> Job:
    service, who = call.service, call.caller
    options = SubmissionOptions(
        who,
        body.kind,
        Context.parse(body.context),
        body.key_id,
        None if body.new_context is None else Context.parse(body.new_context),
        Deadlines(body.start_by, body.run_by, body.keep_for, body.ttl_s),
        idempotency(call),
        callback=body.callback or "",
        priority=body.priority or "normal",
        release=body.release or "",
        labels=body.labels or {},
        metadata=body.metadata or {},
        group=body.group,
    )
    most = service.settings.kms.limits.json_job_items
    return service.submitter.submit(options, body, most, partial(service.requests.take_items, who.tenant))


def _limit(call: Call[None]) -> int:
    text = call.query.get("limit", str(describe.PAGE))
    number = int(text) if text.isascii() and text.isdigit() and len(text) < _DIGITS else 0
    if not 1 <= number <= describe.MOST:
        raise InvalidRequest(f"limit is a number from 1 to {describe.MOST}")
    return number
