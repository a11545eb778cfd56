"""Deadlines of a job: by when it must start and end, and for how long its result is kept."""

from dataclasses import dataclass
from datetime import datetime

from kms_protocol.errors import InvalidDeadline
from kms_protocol.units import time_text


@dataclass(frozen=True, slots=True)
class DeadlineRules:
    """Defaults and maxima in seconds, from settings; those of times count from submission."""

    start_within_s: float
    run_within_s: float
    keep_for_s: float
    most_within_s: float
    most_keep_for_s: float


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Deadlines that a submission asks for; None takes the default.

    ``ttl_s`` is how clients of 0.1 say all three: start, end and deletion within so many seconds.
    """

    start_by: datetime | None = None
    run_by: datetime | None = None
    keep_for_s: float | None = None
    ttl_s: float | None = None

    @property
    def text(self) -> str:
        """All of it, to tell one request from another; empty without any, and ``ttl_s`` alone as in 0.1."""
        times = [time_text(at, "microseconds") if at else "" for at in (self.start_by, self.run_by)]
        return " ".join([*times, str(self.keep_for_s or "")]).strip()

    def fields(self, now: float, rules: DeadlineRules) -> dict[str, float]:
        """Times of a ``JobSpec`` submitted at ``now`` (seconds since the epoch). Raises InvalidDeadline."""
        if self.ttl_s:
            if self.text:
                raise InvalidDeadline("ttl_s stands for start_by, run_by and keep_for: give it, or those")
            until = now + self.ttl_s
            return {"start_by": until, "run_by": until, "expires_at": until}
        start_by, run_by = (at.timestamp() if at else None for at in (self.start_by, self.run_by))
        last = now + rules.most_within_s
        for name, at in (("start_by", start_by), ("run_by", run_by)):
            if at is not None and at <= now:
                raise InvalidDeadline(f"{name} is in the past: the service has {time_text(now)}")
            if at is not None and at > last:
                raise InvalidDeadline(f"{name} is after {time_text(last)}: name an earlier one")
        if start_by and run_by and run_by < start_by:
            raise InvalidDeadline("run_by is before start_by: a job cannot end before it starts")
        keep_for_s = self.keep_for_s or rules.keep_for_s
        if keep_for_s > rules.most_keep_for_s:
            raise InvalidDeadline(f"keep_for is above {rules.most_keep_for_s:.0f} s: name a shorter time")
        run_by = run_by or max(now + rules.run_within_s, start_by or 0)
        start_by = start_by or min(now + rules.start_within_s, run_by)
        return {
            "start_by": start_by,
            "run_by": run_by,
            "keep_for_s": keep_for_s,
            "expires_at": run_by + keep_for_s,
        }
