"""Waits for the end of a job, over outages of the service."""

import time
from collections.abc import Callable
from typing import Final

from msgspec import Struct

from kms_client import requests
from kms_client.attempts import Attempts
from kms_client.http_client import Engine
from kms_protocol import wire
from kms_protocol.errors import JobNotFinished, Unavailable

JobProgress = Callable[[wire.JobOut], None]
_LONG_POLL_S: Final = 30.0
_SHORT_POLL_S: Final = 1.0  # of a caller that shows the progress
_WAITED: Final = 0.9  # an answer after this part of its wait is not early
_FIRST_POLL_S: Final = 0.1
_SLOWEST_POLL_S: Final = 2.0


class JobWait(Struct):
    """A wait for the end of a job by requests that wait; ``until`` is a time.monotonic value.

    A service without room for one more wait answers at once and is polled. ``attempts`` limit an outage.
    """

    engine: Engine
    job_id: str
    until: float
    attempts: Attempts
    _pause_s: float = 0.0

    async def end(self, progress: JobProgress | None) -> wire.JobOut:
        """Return the job at its end. ``progress`` receives each change that a poll finds.

        Raises JobNotFinished, UnknownJob, and Unavailable once ``attempts`` end.
        """
        seen: wire.JobOut | None = None
        while True:
            left_s = self.until - time.monotonic()
            try:
                job = await self._poll(min(left_s, _LONG_POLL_S if progress is None else _SHORT_POLL_S))
            except Unavailable as exc:
                self._pause_s = self.attempts.next_wait_s(exc)
            else:
                if progress is not None and job != seen:
                    progress(job)
                if job.state in wire.ENDED:
                    return job
                seen = job
            if left_s <= 0:
                raise JobNotFinished("The job has not finished in the time given")
            await self.engine.transport.sleep(max(0.0, min(self._pause_s, self.until - time.monotonic())))

    async def _poll(self, longest_s: float) -> wire.JobOut:
        """Return the state of the job. After a failure this does not wait: a proxy may cut waits short."""
        wait_s = 0 if self.attempts.failing else max(0, int(longest_s))
        call, begun = requests.job(self.job_id, wait_s), time.monotonic()
        reply = await self.engine.exchange(call, self.until - wait_s)
        job = call.read(reply)
        self.attempts.progressed()
        if wait_s and time.monotonic() - begun > wait_s * _WAITED:
            self._pause_s = 0.0
        else:
            grown_s = min(self._pause_s * 1.5 or _FIRST_POLL_S, _SLOWEST_POLL_S)
            self._pause_s = reply.retry_after_s() or grown_s
        return job
