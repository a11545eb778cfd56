"""Transitions of jobs as events: read from the stream or from a record, and verified before they are told."""

import re
import uuid
from collections.abc import Mapping
from typing import Annotated, Final

import msgspec
import structlog
from msgspec import Meta

from kms_core.jobs.ends import needs_proof
from kms_core.jobs.model import REFUSED, Job
from kms_protocol import wire

_STREAM_ID: Final = re.compile(rb"([0-9]{1,20})-([0-9]{1,20})")
_IDS: Final = uuid.UUID("0b3f4c1e-7f0e-5d51-9d0e-6b6d73686f6b")  # a namespace of our own (RFC 9562 §5.5)
GROUP_ENDED: Final = "kms.group.ended"
"""The event of a group whose jobs have all ended; its subject in the stream is the last of them."""
_log = structlog.get_logger(__name__)


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a job, as the stream or the job's record tells it."""

    job_id: str
    state: wire.JobState
    event_id: Annotated[str, Meta(max_length=200)] = ""
    generation: Annotated[str, Meta(pattern=r"^g?[0-9]{1,20}\Z")]
    attempt: int
    code: str
    is_group: bool = False
    at: Annotated[float, Meta(ge=0, lt=1e11)]

    @property
    def delivery_id(self) -> str:
        """A job ends once in each generation; other states come again, each with an event id of its own."""
        name = f"{self.generation}/{self.state}" if self.state in wire.ENDED else self.event_id
        return str(uuid.uuid5(_IDS, f"{self.job_id}/{name}"))


def place(raw: bytes) -> tuple[int, int] | None:
    """An id of a stream, to be compared; None for what is none."""
    found = _STREAM_ID.fullmatch(raw)
    if not found or max(place := (int(found[1]), int(found[2]))) >= 2**64:
        return None
    return place


def of_event(fields: Mapping[bytes, bytes]) -> Transition | None:
    """A record of the stream; None, and a line in the log, if a script of ours did not write it."""
    text = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in fields.items()}
    job_id, is_group = text.get("subject", ""), text.get("type") == GROUP_ENDED
    found = read(
        job_id=job_id,
        state="succeeded" if is_group else text.get("type", "").removeprefix("kms.job."),
        event_id=text.get("id", ""),
        generation=_generation(text.get("id", "").removeprefix(f"{job_id}.")),
        attempt=text.get("attempt", ""),
        code=text.get("code", ""),
        at=text.get("time", ""),
    )
    return msgspec.structs.replace(found, is_group=True) if found and is_group else found


def _generation(rest: str) -> str:
    """That of an event id behind the job id; of events of 0.1, which has a time at its end, the fence."""
    generation, *others = rest.split(".")
    return generation if len(others) > 1 else f"g{generation}"


def read(**fields: str) -> Transition | None:
    """A transition of these texts; None, and a line in the log, for values that no script writes."""
    try:
        return msgspec.convert(fields, Transition, strict=False)
    except msgspec.ValidationError:
        _log.warning("webhook.event_unreadable", job_id=fields["job_id"])
        return None


def is_claim(transition: Transition) -> bool:
    """Return whether it is an end that counts only with a proof."""
    return needs_proof(transition.state, transition.code)


def verified(transition: Transition, job: Job) -> Transition | None:
    """An event as it is told; None for an end that the record of the job does not have."""
    if not is_claim(transition):
        return transition
    refused = job.ended and job.error == REFUSED
    if not refused and (job.state, job.error) != (transition.state, transition.code):
        _log.warning("webhook.event_refused", job_id=transition.job_id, state=transition.state)
        return None
    return msgspec.structs.replace(
        transition,
        state=job.state,
        code=job.error,
        generation=_generation_of(job, transition),
        attempt=job.attempt,
    )


def _generation_of(job: Job, transition: Transition) -> str:
    """That of an ended job; the fence if a worker of 0.1 ended it."""
    of_old = not transition.generation.startswith("g") and not (job.end and job.end.attempt_id)
    return str(job.fence) if of_old else f"g{job.generation}"


def as_seen(job: Job, transition: Transition) -> Job:
    """The job as it was at the transition; it may have moved on. Other codes than an end's are no errors."""
    code = transition.code if transition.state in wire.ENDED else ""
    return msgspec.structs.replace(job, state=transition.state, attempt=transition.attempt, error=code)


def group_event_id(transition: Transition) -> str:
    """The id of the end of a group, by the last job to end: the same however often it is read."""
    return str(uuid.uuid5(_IDS, f"{transition.job_id}/{transition.generation}/group"))
