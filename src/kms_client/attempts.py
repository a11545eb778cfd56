"""The attempts of one call: how often, and how long, it is repeated after errors that may pass."""

import math
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final

from kms_client.settings import ClientSettings
from kms_protocol.errors import BackendUnavailable, KmsError

OUTAGE_S: Final = 60.0
"""A job survives a restart of its service, and so do waits for one and transfers of files."""
LONGEST_WAIT_S: Final = 10.0
"""Before an attempt of a call without a deadline."""
SPREAD: Final = 1.5
"""Waits are up to this much longer: callers that were refused together come apart."""
_SLOWEST_WAIT_S: Final = 2.0
_DOUBLINGS: Final = 5


class Attempts:
    """The attempts of one call, which may be repeated until ``until`` (time.monotonic).

    Without a deadline there are ``retries`` after the first; ``lasting``, as for a file, there are as many as
    begin within OUTAGE_S after the last progress. With a deadline there are as many as begin before it.
    """

    def __init__(
        self,
        settings: ClientSettings,
        sleep: Callable[[float], Awaitable[None]],
        *,
        lasting: bool = False,
    ) -> None:
        self._retries, self._report, self._sleep = settings.retries, settings.on_retry, sleep
        self._lasting = lasting
        self._failed = 0
        self._failing_since = 0.0
        deadline_s = settings.deadline_s
        self.until = math.inf if deadline_s is None else time.monotonic() + deadline_s

    def progressed(self) -> None:
        """Forget earlier failures: the call made progress."""
        self._failed = 0

    @property
    def failing(self) -> bool:
        """Whether the last attempt failed."""
        return self._failed > 0

    async def pause(self, error: KmsError, retry_after_s: float | None = None) -> None:
        """Wait for ``next_wait_s``. Raises the error."""
        await self._sleep(self.next_wait_s(error, retry_after_s))

    def next_wait_s(self, error: KmsError, retry_after_s: float | None = None) -> float:
        """Count a failure and return the seconds before the next attempt.

        ``retry_after_s`` is the wait that the service asked for. Raises the error if no attempt is left, or
        if the wait is too long.
        """
        if not self._failed:
            self._failing_since = time.monotonic()
        by_number = self.until == math.inf and not self._lasting
        wait_s, left = (self._by_number if by_number else self._by_time)(error, retry_after_s)
        self._failed += 1
        wait_s *= random.uniform(1, SPREAD)  # noqa: S311 - no secret
        if self._report is not None:
            self._report(error, wait_s, left)
        return wait_s

    def _by_number(self, error: KmsError, retry_after_s: float | None) -> tuple[float, int | None]:
        """Return the wait in seconds and the number of attempts left. Raises the error."""
        left = self._retries - self._failed - isinstance(error, BackendUnavailable)
        if retry_after_s is None:
            retry_after_s = getattr(error, "retry_after_s", 0.0) * 2 ** min(self._failed, _DOUBLINGS)
        if left <= 0 or retry_after_s > LONGEST_WAIT_S:
            raise error
        return retry_after_s, left

    def _by_time(self, error: KmsError, retry_after_s: float | None) -> tuple[float, int | None]:
        """Return the wait in seconds, and None. Raises the error."""
        grown_s = min(0.1 * 2 ** min(self._failed, _DOUBLINGS), _SLOWEST_WAIT_S)
        wait_s = max(grown_s, retry_after_s or 0.0)
        end = self._failing_since + OUTAGE_S if self.until == math.inf else self.until
        if time.monotonic() + wait_s * SPREAD >= end:
            raise error
        return wait_s, None
