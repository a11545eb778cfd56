"""JSON shapes of groups of jobs."""

from typing import Annotated, ClassVar

from msgspec import Meta

from kms_protocol.shapes import Answer, Body, EndpointName, GroupName


class GroupIn(Body, frozen=True, kw_only=True):
    """A group of ``jobs`` jobs, which all say the same name and number.

    It ends once all have been submitted and have ended. ``callback`` is a webhook endpoint for that event.
    """

    name: GroupName
    jobs: Annotated[int, Meta(ge=1, le=10_000)]
    callback: EndpointName | None = None


class GroupOut(Answer, frozen=True, kw_only=True):
    """A group: the number of its jobs, of those submitted, and of these by state.

    ``ended`` once all have been submitted and have ended. ``failed`` has the ids of the first ten jobs that
    did not succeed.
    """

    EXAMPLE: ClassVar = {
        "name": "payroll-2027-01",
        "jobs": 3,
        "submitted": 3,
        "states": {"succeeded": 2, "failed": 1},
        "ended": True,
        "failed": ["0192f0c1-7a3e-4c55-9d0a-1f2e3d4c5b6a"],
    }
    name: str
    jobs: int
    submitted: int
    states: dict[str, int]
    ended: bool
    failed: list[str]
