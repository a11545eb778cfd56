"""The events of a tenant's jobs as they happen, read from the stream that the scripts write to.

Each event is the one that webhooks send: an end that needs a proof is given as it was signed. An id is that
of the stream, so that a reader goes on behind the last one it has.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, cast

from kms_core.jobs.events import transitions
from kms_core.jobs.store.redis_keys import PREFIX, redis_errors
from kms_core.jobs.store.store import JobStore
from kms_protocol.errors import InvalidRequest, UnknownJob

START: Final = "0-0"
_EVENTS: Final = f"{PREFIX}events"
_AT_ONCE: Final = 500
_STREAM_ID: Final = re.compile(rb"([0-9]{1,20})-([0-9]{1,20})")
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

    Raises InvalidRequest for a malformed id, JobsUnavailable.
    """
    place = _place(after.encode())
    if place is None:
        raise InvalidRequest("Last-Event-ID is the id of an event of this stream")
    with redis_errors():
        first = cast("list[tuple[bytes, Fields]]", store.redis.xrange(_EVENTS, count=1))
        batch = cast(
            "list[tuple[bytes, Fields]]", store.redis.xrange(_EVENTS, min=f"({after}", count=_AT_ONCE)
        )
    oldest = _place(first[0][0]) if first else None
    is_gapped = after != START and oldest is not None and oldest > place
    found = [
        (raw.decode(), body)
        for raw, fields in batch
        if fields.get(b"tenant") == tenant.encode() and (body := _body(store, fields, labels))
    ]
    cursor = batch[-1][0].decode() if batch else after
    return FeedBatch(found, cursor, len(batch) == _AT_ONCE, is_gapped)


def _place(raw: bytes) -> tuple[int, int] | None:
    """An id of a stream as numbers that compare; None for a malformed one."""
    found = _STREAM_ID.fullmatch(raw)
    if not found or max(place := (int(found[1]), int(found[2]))) >= 2**64:
        return None
    return place


def _body(store: JobStore, fields: Fields, labels: Mapping[str, str]) -> bytes:
    """An event as JSON; empty for one that is not published."""
    text = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in fields.items()}
    transition = transitions.of_event(text)
    try:
        found = transition and transitions.told(store, transition)
    except UnknownJob:  # its record has expired, or is not the tenant's
        return b""
    return found.body if found and labels.items() <= found.job.labels.items() else b""
