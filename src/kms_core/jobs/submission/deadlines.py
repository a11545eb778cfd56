"""Deadlines of a job: by when it must start and end, and for how long its result is kept."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from kms_protocol.errors import InvalidDeadline
from kms_protocol.units import time_text

WITHIN_S: Final = 86_400
"""Seconds in which a job starts, and in which it ends, unless it names other times."""
_MOST_S: Final = 30 * 86_400  # between now and a time that a job names, and for which its result is kept


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Deadlines that a submission asks for; None takes the default.

    ``ttl_s`` says all three: start, end and deletion within so many seconds.
    """

    start_by: datetime | None = None
    run_by: datetime | None = None
    keep_for_s: float | None = None
    ttl_s: float | None = None

    @property
    def text(self) -> str:
        """All of it, to tell one request from another."""
        times = [time_text(at, "microseconds") if at else "" for at in (self.start_by, self.run_by)]
        return f"{times} {self.keep_for_s} {self.ttl_s}"

    def fields(self, now: float, result_ttl_s: float) -> dict[str, float]:
        """Times of a ``JobSpec`` submitted at ``now`` (seconds since the epoch). Raises InvalidDeadline.

        Without ``keep_for_s`` its result is kept for ``result_ttl_s``.
        """
        if self.ttl_s:
            if self.start_by or self.run_by or self.keep_for_s:
                raise InvalidDeadline("ttl_s stands for start_by, run_by and keep_for: give it, or those")
            until = now + self.ttl_s
            return {"start_by": until, "run_by": until, "expires_at": until}
        start_by, run_by = (at.timestamp() if at else None for at in (self.start_by, self.run_by))
        last = now + _MOST_S
        for name, at in (("start_by", start_by), ("run_by", run_by)):
            if at is not None and at <= now:
                raise InvalidDeadline(f"{name} is in the past: the service has {time_text(now)}")
            if at is not None and at > last:
                raise InvalidDeadline(f"{name} is after {time_text(last)}: name an earlier one")
        if start_by and run_by and run_by < start_by:
            raise InvalidDeadline("run_by is before start_by: a job cannot end before it starts")
        keep_for_s = self.keep_for_s or result_ttl_s
        if keep_for_s > _MOST_S:
            raise InvalidDeadline(f"keep_for is above {_MOST_S} s: name a shorter time")
        run_by = run_by or max(now + WITHIN_S, start_by or 0)
        start_by = start_by or min(now + WITHIN_S, run_by)
        return {
            "start_by": start_by,
            "run_by": run_by,
            "keep_for_s": keep_for_s,
            "expires_at": run_by + keep_for_s,
        }
