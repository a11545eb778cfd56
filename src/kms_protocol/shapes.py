"""Base classes of the JSON shapes of the REST API, types that several share, and Temporal's payloads."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, ClassVar, Final

from msgspec import UNSET, Meta, Struct, UnsetType, field

KEY_ID_PATTERN: Final = "^[A-Za-z0-9_.-]{1,80}(?!\\s)$"
MOST_LABELS: Final = 16

KeyId = Annotated[str, Meta(pattern=KEY_ID_PATTERN)]
Labels = Annotated[
    dict[
        Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9_./-]{0,62}(?!\\s)$")],
        Annotated[str, Meta(pattern="^[A-Za-z0-9_.:/@+-]{0,128}(?!\\s)$")],
    ],
    Meta(max_length=MOST_LABELS),
]
"""Names and values by which jobs are listed."""
GroupName = Annotated[str, Meta(pattern="^[A-Za-z0-9_.:@+-]{1,128}(?!\\s)$")]
Metadata = Annotated[
    dict[Annotated[str, Meta(min_length=1, max_length=64)], Annotated[str, Meta(max_length=512)]],
    Meta(max_length=16),
]
"""Texts of the submitter, which answers and events repeat."""
EndpointName = Annotated[str, Meta(pattern=KEY_ID_PATTERN)]
KeepFor = Annotated[int, Meta(ge=60, le=366 * 24 * 3600)]
"""Seconds for which a result is kept."""
Moment = Annotated[datetime, Meta(tz=True)]
"""An RFC 3339 time with an offset."""


class Shape(Struct, frozen=True, kw_only=True):
    """Base of all shapes: immutable, with no value in ``repr``."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {}
    """A JSON object of this shape for the OpenAPI document; empty for none."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(…)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:  # msgspec's own lists all fields
        return []


class Body(Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request body. Unknown fields are refused."""


class Answer(Shape, frozen=True, kw_only=True):
    """A response body. UNSET fields are left out."""


class Problem(Answer, frozen=True, kw_only=True):
    """An error (RFC 9457, ``application/problem+json``). ``code`` is stable; ``detail`` is for people.

    ``job_id`` is the job that ``durability_unconfirmed`` is about.
    """

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    links: dict[str, str] | UnsetType = UNSET
    job_id: str | UnsetType = UNSET


class Payload(Body, frozen=True, kw_only=True):
    """A value of Temporal (temporal.api.common.v1.Payload, as JSON)."""

    metadata: dict[str, bytes] = field(default_factory=dict)
    data: bytes = b""


class CodecIn(Body, frozen=True, kw_only=True):
    """Payloads for the codec server."""

    EXAMPLE: ClassVar = {"payloads": [{"metadata": {"encoding": "anNvbi9wbGFpbg=="}, "data": "IkhlbGxvIg=="}]}
    payloads: Annotated[list[Payload], Meta(max_length=1000)] = field(default_factory=list)


class CodecOut(Answer, frozen=True, kw_only=True):
    """Payloads of the codec server."""

    EXAMPLE: ClassVar = {
        "payloads": [
            {
                "metadata": {"encoding": "YmluYXJ5L2VuY3J5cHRlZA=="},
                "data": "YWdlLWVuY3J5cHRpb24ub3JnL3YxCg==",
            }
        ]
    }
    payloads: list[Payload]
