"""The events of a tenant's jobs as they happen, read from the stream that the scripts write to.

Each event is told as webhooks tell it: an end that needs a proof as it was signed. An id is that of the
stream, so that a reader goes on behind the last one it has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, cast

from kms_core.jobs.events import groups, transitions
from kms_core.jobs.events.webhook import event_body
from kms_core.jobs.store.redis_keys import PREFIX, redis_errors
from kms_core.jobs.store.store import JobStore
from kms_protocol.errors import InvalidRequest, UnknownJob

START: Final = "0-0"
_EVENTS: Final = f"{PREFIX}events"
_AT_ONCE: Final = 500
Fields = Mapping[bytes, bytes]


@dataclass(frozen=True, slots=True)
class FeedBatch:
    """Events of one read as pairs of id and CloudEvent (JSON), and the id to go on behind.

    ``is_gapped``: events behind the id that was asked for are not in the stream any more.
    """

    events: list[tuple[str, bytes]]
    cursor: str
    is_full: bool = False
    is_gapped: bool = False


def newest(store: JobStore) -> str:
    """The id of the last event of all; ``START`` if there was none. Raises JobsUnavailable."""
    with redis_errors():
        last = cast("list[tuple[bytes, Fields]]", store.redis.xrevrange(_EVENTS, count=1))
    return last[0][0].decode() if last else START


def read(store: JobStore, tenant: str, after: str, labels: Mapping[str, str]) -> FeedBatch:
    """The next events of a tenant's jobs with these labels, behind an id of the stream.

    Raises InvalidRequest for what is no such id, JobsUnavailable.
    """
    place = transitions.place(after.encode())
    if place is None:
        raise InvalidRequest("Last-Event-ID is the id of an event of this stream")
    with redis_errors():
        first = cast("list[tuple[bytes, Fields]]", store.redis.xrange(_EVENTS, count=1))
        batch = cast(
            "list[tuple[bytes, Fields]]", store.redis.xrange(_EVENTS, min=f"({after}", count=_AT_ONCE)
        )
    oldest = transitions.place(first[0][0]) if first else None
    is_gapped = after != START and oldest is not None and oldest > place
    found = [
        (raw.decode(), body)
        for raw, fields in batch
        if fields.get(b"tenant") == tenant.encode() and (body := _body(store, tenant, fields, labels))
    ]
    cursor = batch[-1][0].decode() if batch else after
    return FeedBatch(found, cursor, len(batch) == _AT_ONCE, is_gapped)


def _body(store: JobStore, tenant: str, fields: Fields, labels: Mapping[str, str]) -> bytes:
    """An event as JSON; empty for one that is not told."""
    transition = transitions.of_event(fields)
    if transition is None:
        return b""
    try:
        job = store.get(transition.job_id, tenant)
        if transition.is_group:
            found = groups.ended(store, job.accepted, transition) if job.accepted else None
            return found[2] if found and labels.items() <= job.labels.items() else b""
    except UnknownJob:  # its record has expired, or was not sealed by this service
        return b""
    seen = transitions.verified(transition, job)
    if seen is None or not labels.items() <= job.labels.items():
        return b""
    return event_body(seen.delivery_id, transitions.as_seen(job, seen), seen.at)
