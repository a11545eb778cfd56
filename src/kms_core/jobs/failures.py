"""The reason why a job failed and what to do, in words for people: of answers and events."""

from collections.abc import Sequence

from msgspec import UNSET

from kms_core.jobs.model import Job
from kms_core.jobs.spec import ITEMS_FAILED, Failure
from kms_protocol import wire
from kms_protocol.error_texts import NO_TEXT, TEXTS


def error_of(job: Job) -> wire.JobError | None:
    """Return the error of a job. Where items failed, it explains the first of them."""
    if not job.error:
        return None
    failures = job.end.failures if job.end else ()
    text = TEXTS.get(job.error, NO_TEXT)
    detail, hint = text.job_detail, text.job_hint
    if job.error == ITEMS_FAILED:
        detail, hint = _items_failed(f"{job.items_failed} of {job.items} items failed", failures)
    return wire.JobError(
        code=job.error,
        detail=detail or UNSET,
        hint=hint or UNSET,
        items=[wire.FailedItem(index=index, code=code) for index, code in failures] or UNSET,
    )


def _items_failed(count: str, failures: Sequence[Failure]) -> tuple[str, str]:
    results = "`kms job result` shows which and why"
    for index, code in failures:
        first = TEXTS.get(code, NO_TEXT)
        if first.job_detail:
            why = f"{first.job_detail[0].lower()}{first.job_detail[1:]}"
            return f"{count}, the first at index {index}: {why}", f"{first.job_hint}; {results}"
    return count, results
