"""Descriptions of the job routes for the OpenAPI document."""

from typing import Final, get_args

from kms_api.openapi import describe
from kms_protocol import wire
from kms_protocol.errors import InvalidRequest, JobCommitting, JobNotDead, NotACiphertext, PathRefused

PAGE: Final = 100
MOST: Final = 1000

_JOB: Final = {200: describe.gives(wire.JobOut, "The job as it stands")}
_LIST: Final = {200: describe.gives(wire.JobList, "Jobs, newest first")}
_LIMIT: Final = describe.query("limit", describe.whole(1, MOST, PAGE), "Jobs of this page at most")
_LISTING: Final = (*describe.JOBS, InvalidRequest)
_CANCELLING: Final = (*describe.ONE_JOB, JobCommitting)
_SUBMISSION: Final = describe.takes(wire.JobIn, {"kind": "encrypt", "items": [{"plaintext": "SGVsbG8="}]})
_SUBMISSION["content"][describe.NDJSON] = {
    "schema": {"type": "string"},
    "example": '{"plaintext": "SGVsbG8=", "context": "row=7"}\n',
    "x-kms-line": describe.ref(wire.JobItem),
}
_DATA: Final = {
    "type": "string",
    "contentMediaType": describe.JSON,
    "contentSchema": describe.ref(wire.JobOut),
}
_EVENT: Final = {
    "description": "Each event; lines that begin with a colon keep the connection open",
    "type": "object",
    "properties": {"event": {"const": "progress"}, "data": _DATA},
    "required": ["event", "data"],
}

SUBMIT: Final = describe.described(
    "submit_job",
    body=_SUBMISSION,
    parameters=(
        describe.query(
            "kind", {"enum": list(get_args(wire.JobKind))}, "Of a stream of items; JSON says it in the body"
        ),
        *describe.STREAMED,
    ),
    answers={202: describe.accepted()},
    refuses=(*describe.SUBMITTING, PathRefused, NotACiphertext),
)
LIST: Final = describe.described(
    "list_jobs",
    parameters=(
        describe.query("state", {"enum": list(wire.STATES)}, "Jobs in this state alone"),
        _LIMIT,
        describe.query("cursor", {"type": "string"}, "`next` of the page before"),
    ),
    answers=_LIST,
    refuses=_LISTING,
)
DEAD: Final = describe.described("dead_jobs", parameters=(_LIMIT,), answers=_LIST, refuses=_LISTING)
RETRY: Final = describe.described("retry_job", answers=_JOB, refuses=(*describe.ONE_JOB, JobNotDead))
ONE: Final = describe.described(
    "get_job",
    answers={200: describe.gives(wire.JobOut, "The job as it stands", "Retry-After")},
    refuses=describe.ONE_JOB,
)
CANCEL: Final = describe.described("cancel_job", answers=_JOB, refuses=_CANCELLING)
CANCEL_BY_POST: Final = describe.described("cancel_job_by_post", answers=_JOB, refuses=_CANCELLING)
EVENTS: Final = describe.described(
    "job_events",
    answers={
        200: describe.raw(
            "The stream ends with the job", {describe.EVENTS: {"schema": _EVENT}}, "X-Accel-Buffering"
        )
    },
    refuses=describe.ONE_JOB,
)
