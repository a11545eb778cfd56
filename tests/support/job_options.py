"""Options of submissions in this process."""

from typing import Any

from kms_core.auth.policy import Principal
from kms_core.jobs.submission.submitter import SubmissionOptions
from kms_protocol import wire
from kms_protocol.context import Context


def job_options(
    who: Principal,
    kind: wire.JobKind,
    context: Context | str = "",
    *,
    idempotency: str = "",
    **fields: Any,  # noqa: ANN401 -- of ``JobIn``
) -> SubmissionOptions:
    """A job with these fields."""
    given: dict[str, Any] = {
        name: dict(value.pairs) if isinstance(value, Context) else value
        for name, value in {"context": context, **fields}.items()
    }
    return SubmissionOptions.of(who, wire.JobIn(kind=kind, **given), idempotency=idempotency)
