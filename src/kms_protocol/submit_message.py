"""JSON shapes for the Celery task ``kms.submit`` (docs/celery.md): its message and the recipient."""

from datetime import datetime
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from kms_protocol.shapes import Answer, Body
from kms_protocol.wire import JobIn

# A UUID (RFC 9562) in lower case. Version 5 is reserved for the parts of a job.
JobId = Annotated[
    str,
    Meta(
        pattern="^[0-9a-f]{8}-[0-9a-f]{4}-[1-46-8][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$",
        max_length=36,  # without it, $ accepts a line feed at the end
    ),
]


class Submission(Body, frozen=True, kw_only=True):
    """Content of a ``kms.submit`` message (docs/celery.md): a job, its id and an expiry time.

    The submitter chooses the id; a replayed message starts no second job. ``token`` is an API token or a JWT.
    It is null if requests are not authenticated.
    """

    version: Literal[1]
    token: Annotated[str, Meta(max_length=4096)] | None = None
    job_id: JobId
    expires_at: Annotated[datetime, Meta(tz=True)]
    job: JobIn


class IntakeOut(Answer, frozen=True, kw_only=True):
    """Recipient for the encryption of ``kms.submit`` messages, and the accepted version of the message."""

    EXAMPLE: ClassVar = {
        "recipient": "age1cy0su9fwf3gf9mw868g5yut09p6nytfmmnktexz2ya5uqg9vl9sss4euqm",
        "key_version": "1f0c52b7",
        "version": 1,
    }
    recipient: str
    key_version: str
    version: int
