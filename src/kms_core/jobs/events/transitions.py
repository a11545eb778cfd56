"""Transitions of jobs as events: read as the scripts wrote them, confirmed by the records of their jobs.

An end that needs a proof (``spec.needs_proof``) is given as it was signed: as ``failed`` with
``record_refused`` if the record claims it without a proof, and not at all before the job has ended.
"""

import re
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Final, NamedTuple, cast

import msgspec
import structlog
from msgspec import Meta

from kms_core.jobs.events.webhook import event_body, group_body
from kms_core.jobs.model import REFUSED, Job
from kms_core.jobs.spec import needs_proof
from kms_core.jobs.store.errors import redis_errors
from kms_core.jobs.store.keys import PREFIX
from kms_core.jobs.store.store import JobStore
from kms_protocol import wire
from kms_protocol.errors import InvalidRequest, UnknownJob

# Groups of jobs: counted for their submitter, and reported once all jobs have ended.
#
# The number of jobs is in the sealed record of each. So write access to Redis can hide jobs, and then the
# group does not end; it cannot have a group reported as ended with fewer jobs, or with other ends than were
# signed.

_MOST_FAILED: Final = 10
_IDS: Final = uuid.UUID("0b3f4c1e-7f0e-5d51-9d0e-6b6d73686f6b")  # a namespace of our own (RFC 9562 §5.5)
GROUP_ENDED: Final = "kms.group.ended"
"""The event of a group whose jobs have all ended; its subject in Redis is the last of them."""
_NOTHING_DONE: Final = {"items_done": 0, "items_failed": 0, "bytes_done": 0}
"""The progress at the beginning of an attempt; the record of the job has that of later."""
FEED_START: Final = "0-0"
_EVENTS: Final = f"{PREFIX}events"
_AT_ONCE: Final = 500
_STREAM_ID: Final = re.compile(rb"([0-9]{1,20})-([0-9]{1,20})")
Fields = Mapping[bytes, bytes]
Entries = list[tuple[bytes, Fields]]
"""Ids and fields of events in the stream."""
_log = structlog.get_logger(__name__)


def group_of(store: JobStore, tenant: str, name: str) -> wire.GroupOut:
    """A group of a tenant, from the verified states of its jobs. Raises UnknownJob, JobsUnavailable."""
    jobs = store.group(tenant, name)
    most = max(job.accepted.group_jobs for job in jobs if job.accepted)
    return wire.GroupOut(
        name=name,
        jobs=most,
        submitted=len(jobs),
        states=dict(Counter(job.state for job in jobs)),
        ended=len(jobs) >= most and all(job.ended for job in jobs),
        failed=[job.job_id for job in jobs if job.ended and job.state != "succeeded"][:_MOST_FAILED],
    )


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """One event as Redis has it. ``at`` is in seconds since the epoch."""

    job_id: str
    tenant: str
    state: wire.JobState
    event_id: Annotated[str, Meta(max_length=200)]
    generation: Annotated[str, Meta(pattern=r"^[0-9]{1,20}\Z")]
    attempt: int
    code: str
    is_group: bool
    at: Annotated[float, Meta(ge=0, lt=1e11)]

    @property
    def delivery_id(self) -> str:
        """A job ends once in each generation; other states come again, each with an event id of its own."""
        name = self.event_id
        if self.is_group:
            name = f"g{self.generation}/group"
        elif self.state in wire.ENDED:
            name = f"g{self.generation}/{self.state}"
        return str(uuid.uuid5(_IDS, f"{self.job_id}/{name}"))

    @property
    def is_claim(self) -> bool:
        """Return whether it is an end that counts only with a proof."""
        return not self.is_group and needs_proof(self.state, self.code)


class ConfirmedEvent(NamedTuple):
    """An event as receivers get it: ``body`` is a CloudEvent. Of a group, ``job`` is the last to end."""

    event_id: str
    job: Job
    state: wire.JobState
    body: bytes


def of_entry(entry: bytes) -> Transition | None:
    """The event of an entry of the outbox, which has names and values in turn, as JSON; None as below."""
    try:
        texts = msgspec.json.decode(entry, type=list[str])
    except msgspec.DecodeError:
        return None
    return of_event(dict(zip(texts[::2], texts[1::2], strict=False)))


def of_event(fields: Mapping[str, str]) -> Transition | None:
    """The event of these fields; None, and a line in the log, if a script of ours did not write them."""
    job_id, event_id, kind = (fields.get(name, "") for name in ("subject", "id", "type"))
    found = {
        "job_id": job_id,
        "tenant": fields.get("tenant", ""),
        "state": "succeeded" if kind == GROUP_ENDED else kind.removeprefix("kms.job."),
        "event_id": event_id,
        "generation": event_id.removeprefix(f"{job_id}.").partition(".")[0],
        "attempt": fields.get("attempt", ""),
        "code": fields.get("code", ""),
        "is_group": kind == GROUP_ENDED,
        "at": fields.get("time", ""),
    }
    try:
        return msgspec.convert(found, Transition, strict=False)
    except msgspec.ValidationError:
        _log.warning("webhook.event_unreadable", job_id=job_id)
        return None


def confirmed(store: JobStore, transition: Transition) -> ConfirmedEvent | None:
    """An event as the verified record of its job has it; None for one that the record does not confirm.

    Raises UnknownJob if there is no such record, JobsUnavailable.
    """
    return _confirmed(store, store.get(transition.job_id, transition.tenant), transition)


def _confirmed(store: JobStore, job: Job, transition: Transition) -> ConfirmedEvent | None:
    if transition.is_group:
        return _confirmed_group(store, job, transition)
    is_refused = job.ended and job.error == REFUSED
    if not transition.is_claim:
        code = transition.code if transition.state in wire.ENDED else ""  # other codes are no errors
        changed = {"state": transition.state, "attempt": transition.attempt, "error": code}
        begun = _NOTHING_DONE if transition.state in {"queued", "running"} else {}
        job = msgspec.structs.replace(job, **changed, **begun)
    elif is_refused or (job.state, job.error) == (transition.state, transition.code):
        transition = msgspec.structs.replace(transition, state=job.state, generation=str(job.generation))
    else:
        _log.warning("webhook.event_refused", job_id=transition.job_id, state=transition.state)
        return None
    event_id = transition.delivery_id
    return ConfirmedEvent(event_id, job, job.state, event_body(event_id, job, transition.at))


def _confirmed_group(store: JobStore, job: Job, transition: Transition) -> ConfirmedEvent | None:
    """The end of the group of a job; None if not all of its jobs have ended."""
    if not job.accepted or not job.accepted.group:
        return None
    group = group_of(store, job.tenant, job.accepted.group)
    if not group.ended:
        return None
    state: wire.JobState = "failed" if group.failed else "succeeded"
    event_id = transition.delivery_id
    return ConfirmedEvent(event_id, job, state, group_body(event_id, group, transition.at))


# The events of a tenant's jobs as they happen, read from the stream that the scripts write to.
#
# Each event is the one that webhooks send: an end that needs a proof is given as it was signed. An id is
# that of the stream, so that a reader goes on behind the last one it has.


class FeedEvent(NamedTuple):
    """An event and its id in the stream: ``body`` is a CloudEvent (JSON), ``labels`` are those of its job."""

    event_id: str
    body: bytes
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class FeedBatch:
    """Events of one read, and the id to go on behind.

    ``is_gapped``: events behind the id that was asked for are not in the stream any more.
    """

    events: list[FeedEvent]
    cursor: str
    is_full: bool = False
    is_gapped: bool = False


def newest(store: JobStore) -> FeedBatch:
    """No event, and the id of the last of all to go on behind. Raises JobsUnavailable."""
    with redis_errors():
        last = cast("Entries", store.redis.xrevrange(_EVENTS, count=1))
    return FeedBatch([], last[0][0].decode() if last else FEED_START)


def read_feed(store: JobStore, tenant: str, after: str) -> FeedBatch:
    """The next events of a tenant's jobs behind an id of the stream.

    Raises InvalidRequest for a malformed id, JobsUnavailable.
    """
    place = _place(after.encode())
    if place is None:
        raise InvalidRequest("Last-Event-ID is the id of an event of this stream")
    with redis_errors():
        pipeline = store.redis.pipeline(transaction=False)
        pipeline.xrange(_EVENTS, count=1)
        pipeline.xrange(_EVENTS, min=f"({after}", count=_AT_ONCE)
        first, batch = cast("list[Entries]", pipeline.execute())
    oldest = _place(first[0][0]) if first else None
    is_gapped = after != FEED_START and oldest is not None and oldest > place
    cursor = batch[-1][0].decode() if batch else after
    return FeedBatch(list(_events(store, tenant, batch)), cursor, len(batch) == _AT_ONCE, is_gapped)


def _place(raw: bytes) -> tuple[int, int] | None:
    """An id of a stream as numbers that compare; None for a malformed one."""
    found = _STREAM_ID.fullmatch(raw)
    if not found or max(place := (int(found[1]), int(found[2]))) >= 2**64:
        return None
    return place


def _events(store: JobStore, tenant: str, batch: Entries) -> Iterator[FeedEvent]:
    """The events of a tenant among these that are published. Reads the record of each job once."""
    rows = [(raw.decode(), fields) for raw, fields in batch if fields.get(b"tenant") == tenant.encode()]
    texts = ((row, {_text(name): _text(value) for name, value in fields.items()}) for row, fields in rows)
    own = [(row, seen) for row, text in texts if (seen := of_event(text))]
    jobs = {job.job_id: job for job in store.many([*{seen.job_id for _, seen in own}], tenant)}
    for event_id, seen in own:
        try:
            event = _confirmed(store, jobs[seen.job_id], seen) if seen.job_id in jobs else None
        except UnknownJob:  # the records of its group have expired
            continue
        if event:
            yield FeedEvent(event_id, event.body, event.job.labels)


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")
