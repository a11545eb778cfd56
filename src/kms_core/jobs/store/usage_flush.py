"""Adds the usage counts of a process to those in Redis."""

from collections.abc import Mapping
from typing import Final, cast

import redis

from kms_core.jobs.store.redis_keys import PREFIX, redis_errors
from kms_core.jobs.store.scripts import SCRIPTS
from kms_core.observability.usage import UsageCounters
from kms_core.periodic import PeriodicThread
from kms_protocol.errors import JobsUnavailable

EVERY_S: Final = 2.0
_KEY: Final = f"{PREFIX}tally"


def add(client: redis.Redis, counts: Mapping[str, int]) -> None:
    """Add to the counts that all processes share; they live as long as Redis's data do. JobsUnavailable."""
    if not counts:
        return
    flat = [part for pair in counts.items() for part in pair]
    with redis_errors():
        client.register_script(SCRIPTS["add_counts"])([_KEY], flat)


def shared(client: redis.Redis) -> dict[str, int]:
    """The counts that all processes have flushed. Raises JobsUnavailable."""
    with redis_errors():
        found = cast("dict[bytes, bytes]", client.hgetall(_KEY))
    return {name.decode(): int(count) for name, count in found.items()}


class UsageFlush(PeriodicThread):
    """Flushes the counts every 2 seconds, and a last time when stopped; without Redis they are kept."""

    def __init__(self, counters: UsageCounters, client: redis.Redis) -> None:
        super().__init__("usage-flush", EVERY_S, failed="tally.lost")
        self._counters = counters
        self._client = client

    def round(self) -> None:
        counts = self._counters.take()
        try:
            add(self._client, counts)
        except JobsUnavailable:
            self._counters.put_back(counts)

    def finish(self) -> None:
        self.round()

    def stop(self, wait_s: float = EVERY_S) -> None:
        super().stop(wait_s)
