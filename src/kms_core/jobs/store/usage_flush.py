"""The teller: a thread that hands the counts of its process to Redis and the metrics every few seconds."""

import threading
from collections.abc import Mapping
from typing import Final, cast

import redis
import structlog

from kms_core.jobs.store.redis_keys import PREFIX, number, record_errors, redis_errors
from kms_core.jobs.store.scripts import LIBRARY
from kms_core.observability import buffered_metrics
from kms_core.observability.usage import UsageCounters
from kms_protocol.errors import JobsUnavailable, UnknownJob

EVERY_S: Final = 2.0
_KEY: Final = f"{PREFIX}tally"
_ADD: Final = (
    LIBRARY
    + """
-- KEYS: counts   ARGV: name, how many more, ...
for i = 1, #ARGV, 2 do add(KEYS[1], ARGV[i], ARGV[i + 1]) end
"""
)
_log = structlog.get_logger(__name__)


def add(client: redis.Redis, counts: Mapping[str, int]) -> None:
    """Add to the counts that all processes share; they live as long as Redis's data do. JobsUnavailable.

    What others wrote in their place counts as 0.
    """
    if not counts:
        return
    flat = [part for pair in counts.items() for part in pair]
    with redis_errors():
        client.register_script(_ADD)([_KEY], flat)


def shared(client: redis.Redis) -> dict[str, int]:
    """What all processes have counted and handed over. Raises JobsUnavailable."""
    try:
        with record_errors():
            found = cast("dict[bytes, bytes]", client.hgetall(_KEY))
    except UnknownJob:  # no table
        return {}
    return {name.decode(errors="replace"): int(number(count)) for name, count in found.items()}


class UsageFlush(threading.Thread):
    """While Redis is away the counts are kept, and handed over when it is back."""

    def __init__(self, tally: UsageCounters, client: redis.Redis) -> None:
        super().__init__(name="teller", daemon=True)
        self._tally = tally
        self._client = client
        self._stop_asked = threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(EVERY_S):
            self.hand_over()
        self.hand_over()

    def stop(self) -> None:
        """Hand over a last time, waiting a little at most."""
        self._stop_asked.set()
        if self.is_alive():
            self.join(EVERY_S)

    def hand_over(self) -> None:
        """Once; never raises."""
        buffered_metrics.settle()
        counts = self._tally.take()
        try:
            add(self._client, counts)
        except JobsUnavailable:
            self._tally.put_back(counts)
        except Exception as exc:  # noqa: BLE001 -- the counts may be wrong, the thread may not end
            _log.warning("tally.lost", error=type(exc).__name__)
