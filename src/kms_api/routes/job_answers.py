"""Answers about jobs: their wire form, the answer to a submission, and long polls (``?wait=``)."""

from contextlib import suppress
from typing import Final

import anyio
from fastapi import Response
from msgspec import UNSET, UnsetType

from kms_api import json_body
from kms_api.deps import Pool
from kms_api.openapi import describe
from kms_api.routing import Call
from kms_api.transport.admission import reservation_of
from kms_api.transport.pace import should_stop_waiting
from kms_core.jobs import failures
from kms_core.jobs.execution import tree
from kms_core.jobs.model import Job
from kms_protocol import wire
from kms_protocol.errors import Unavailable, UnknownJob
from kms_protocol.units import time_text

POLLS: Final = Pool("events", 2)
"""Polls of all streams and waits: more threads would take the interpreter's lock from other calls."""
_PAUSES_S: Final = (0.01, 0.5)


def wait_of(call: Call[None]) -> int:
    """The seconds of ``?wait=``, 0 without it. Raises InvalidRequest."""
    return call.number("wait", *describe.WAIT_S)


async def awaited(call: Call[None], job: Job, wait_s: int) -> Job:
    """The job at its end, or as it is after ``wait_s`` seconds.

    A wait holds the slot of an event stream and nothing else of the request. It ends early if there is none,
    if the caller goes away, if the server stops, or while Redis does not answer.
    """
    if job.ended or not wait_s:
        return job
    held = reservation_of(call.request.scope)
    held.release()
    with suppress(Unavailable, UnknownJob):
        held.take("streams")
        get = call.service.submitter.store.get
        until, (pause_s, longest_s) = anyio.current_time() + wait_s, _PAUSES_S
        while (left_s := until - anyio.current_time()) > 0 and not job.ended:
            if should_stop_waiting(call.request.scope):
                break
            job = await call.service.run_shared(POLLS, min(pause_s, left_s), get, job.job_id, job.tenant)
            pause_s = min(pause_s * 1.5, longest_s)
    return job


async def accepted(call: Call[None], job: Job, wait_s: int) -> Response:
    """202 with the job's address, or after a wait 200 with the job that has ended.

    The job survives the death of any process from here on.
    """
    headers = {"Location": links(job).self_}
    if job.is_replayed:
        headers["Idempotency-Replayed"] = "true"
    job = await awaited(call, job, wait_s)
    if wait_s and job.ended:
        return json_body.answer(shape(job), 200, headers)
    answer = wire.JobAccepted(job_id=job.job_id, state=job.state, links=links(job))
    return json_body.answer(answer, 202, headers | {"Retry-After": "1"})


def links(job: Job) -> wire.JobLinks:
    """Return the links of a job."""
    base = f"{wire.PREFIX}/jobs/{job.job_id}"
    return wire.JobLinks(self_=base, result=f"{base}/result")


def shape(job: Job) -> wire.JobOut:
    """Return the wire form of a job."""
    spec = job.accepted
    return wire.JobOut(
        job_id=job.job_id,
        kind=job.kind,
        state=job.state,
        priority=job.priority,
        attempt=job.attempt,
        progress=job.progress,
        created_at=time_text(job.created_at, "milliseconds"),
        expires_at=time_text(job.expires_at, "milliseconds"),
        start_by=_time(job.start_by),
        run_by=_time(job.run_by),
        cancelling=True if job.cancel and not job.ended else UNSET,
        not_before=_time(job.not_before if job.state == "queued" else 0.0),
        waits_for=job.waits_for if job.waits_for and not job.ended else UNSET,
        started_at=_time(job.started_at),
        ended_at=_time(job.ended_at if job.ended else 0.0),
        released_at=_time(job.released),
        submitter=spec.principal if spec else UNSET,
        key_id=(spec.key_id if spec else None) or UNSET,
        file_id=(job.end.file_id if job.end else "") or UNSET,
        labels=(spec.labels if spec else None) or UNSET,
        metadata=(spec.metadata if spec else None) or UNSET,
        group=(spec.group if spec else None) or UNSET,
        error=failures.error_of(job),
        report=tree.migration_report(job),
        links=links(job),
    )


def _time(at: float) -> str | UnsetType:
    return time_text(at, "milliseconds") if at else UNSET
