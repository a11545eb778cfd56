"""Counts of operations of all processes, which each flushes to Redis."""

from typing import Final, cast

import redis

from kms_core.jobs.store.errors import redis_errors
from kms_core.jobs.store.keys import PREFIX
from kms_core.jobs.store.records import named, number
from kms_core.jobs.store.scripts import SCRIPTS, flat
from kms_core.operation import UsageCounters
from kms_core.periodic import PeriodicThread
from kms_protocol.errors import JobsUnavailable

EVERY_S: Final = 2.0
_AT_ONCE: Final = 1_000  # counts: some milliseconds, in which Redis does nothing else
_KEY: Final = f"{PREFIX}tally"


def shared_usage(client: redis.Redis) -> dict[str, int]:
    """The counts that all processes have flushed. Raises JobsUnavailable."""
    with redis_errors():
        found = cast("dict[bytes, bytes]", client.hgetall(_KEY))
        return {named(name): int(number(count)) for name, count in found.items()}


class UsageFlush(PeriodicThread):
    """Flushes the counts every 2 seconds, and a last time when stopped; without Redis they are kept."""

    def __init__(self, counters: UsageCounters, client: redis.Redis) -> None:
        super().__init__("usage-flush", EVERY_S, failed="tally.lost")
        self._counters = counters
        self._client = client

    def round(self) -> None:
        counts = list(self._counters.take().items())
        add = self._client.register_script(SCRIPTS["add_counts"])
        for start in range(0, len(counts), _AT_ONCE):
            try:
                with redis_errors():
                    add([_KEY], flat(dict(counts[start : start + _AT_ONCE])))
            except JobsUnavailable:
                self._counters.put_back(dict(counts[start:]))
                return

    def finish(self) -> None:
        self.round()

    def stop(self, wait_s: float = EVERY_S) -> None:
        super().stop(wait_s)
