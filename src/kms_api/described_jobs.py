"""What the routes of jobs say of themselves on the OpenAPI page."""

from typing import Final, get_args

from kms_api import described
from kms_core import wire
from kms_core.errors import InvalidRequest, JobCommitting, JobNotDead, NotACiphertext, PathRefused

PAGE: Final = 100
MOST: Final = 1000

_JOB: Final = {200: described.gives(wire.JobOut, "The job as it stands")}
_LIST: Final = {200: described.gives(wire.JobList, "Jobs, newest first")}
_LIMIT: Final = described.query("limit", described.whole(1, MOST, PAGE), "Jobs of this page at most")
_LISTING: Final = (*described.JOBS, InvalidRequest)
_CANCELLING: Final = (*described.ONE_JOB, JobCommitting)
_SUBMISSION: Final = described.takes(wire.JobIn, {"kind": "encrypt", "items": [{"plaintext": "SGVsbG8="}]})
_SUBMISSION["content"][described.NDJSON] = {
    "schema": {"type": "string"},
    "example": '{"plaintext": "SGVsbG8=", "context": "row=7"}\n',
    "x-kms-line": described.ref(wire.JobItem),
}
_DATA: Final = {
    "type": "string",
    "contentMediaType": described.JSON,
    "contentSchema": described.ref(wire.JobOut),
}
_EVENT: Final = {
    "description": "Each event; lines that begin with a colon keep the connection open",
    "type": "object",
    "properties": {"event": {"const": "progress"}, "data": _DATA},
    "required": ["event", "data"],
}

SUBMIT: Final = described.described(
    "submit_job",
    body=_SUBMISSION,
    parameters=(
        described.query(
            "kind", {"enum": list(get_args(wire.JobKind))}, "Of a stream of items; JSON says it in the body"
        ),
        *described.STREAMED,
    ),
    answers={202: described.accepted()},
    refuses=(*described.SUBMITTING, PathRefused, NotACiphertext),
)
LIST: Final = described.described(
    "list_jobs",
    parameters=(
        described.query("state", {"enum": list(wire.STATES)}, "Jobs in this state alone"),
        _LIMIT,
        described.query("cursor", {"type": "string"}, "`next` of the page before"),
    ),
    answers=_LIST,
    refuses=_LISTING,
)
DEAD: Final = described.described("dead_jobs", parameters=(_LIMIT,), answers=_LIST, refuses=_LISTING)
RETRY: Final = described.described("retry_job", answers=_JOB, refuses=(*described.ONE_JOB, JobNotDead))
ONE: Final = described.described(
    "get_job",
    answers={200: described.gives(wire.JobOut, "The job as it stands", "Retry-After")},
    refuses=described.ONE_JOB,
)
CANCEL: Final = described.described("cancel_job", answers=_JOB, refuses=_CANCELLING)
CANCEL_BY_POST: Final = described.described("cancel_job_by_post", answers=_JOB, refuses=_CANCELLING)
EVENTS: Final = described.described(
    "job_events",
    answers={
        200: described.raw(
            "The stream ends with the job", {described.EVENTS: {"schema": _EVENT}}, "X-Accel-Buffering"
        )
    },
    refuses=described.ONE_JOB,
)
