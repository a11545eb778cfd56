"""Adds the usage counts of a process to those in Redis."""

from typing import Final, cast

import redis

from kms_core.jobs.store.redis_keys import PREFIX, flat, redis_errors
from kms_core.jobs.store.scripts import SCRIPTS
from kms_core.observability.usage import UsageCounters
from kms_core.periodic import PeriodicThread
from kms_protocol.errors import JobsUnavailable

EVERY_S: Final = 2.0
_KEY: Final = f"{PREFIX}tally"


def shared(client: redis.Redis) -> dict[str, int]:
    """The counts that all processes have flushed. Raises JobsUnavailable, RecordRefused."""
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
        if not (counts := self._counters.take()):
            return
        try:
            with redis_errors():
                self._client.register_script(SCRIPTS["add_counts"])([_KEY], flat(counts))
        except JobsUnavailable:
            self._counters.put_back(counts)

    def finish(self) -> None:
        self.round()

    def stop(self, wait_s: float = EVERY_S) -> None:
        super().stop(wait_s)
