"""A job store on a clock that a test moves: for its scripts, for Python, and for keys that expire.

Scripts ask Redis for the time in one line of their library, and for the rest of the life of a key in another.
Here they read a key that the test sets, and go by the time at which a key expires. What a script has expire
at a time of this clock is deleted when the clock gets there; what it has expire after some seconds is about
memory and workers, and stays.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import pytest
import redis

from kms_core.jobs.model import RecordKey
from kms_core.jobs.recovery.reaper import forget
from kms_core.jobs.store.scripts import SCRIPTS
from kms_core.jobs.store.store import JobStore
from kms_core.settings.model import KmsSection
from support.clock import Clock
from support.job_model import RETRY_WITHIN_S

START: Final = 2_000_000_000
"""The first second of the clock: later than the clock of any machine, so that no key expires by that."""
_KEY: Final = "kms:test-clock"
_ON_CLOCK: Final = {
    "redis.call('TIME')": f"{{ redis.call('GET', '{_KEY}'), '0' }}",
    "redis.call('TTL', key)": "(redis.call('EXPIRETIME', key) - now)",
}


class _Counted:
    """A script of redis-py that counts its calls."""

    def __init__(self, script: Any, name: str, called: Counter[str]) -> None:  # noqa: ANN401 -- as redis-py
        self._script, self._name, self._called = script, name, called

    def __call__(self, *given: Any, **options: Any) -> Any:  # noqa: ANN401 -- as above
        self._called[self._name] += 1
        return self._script(*given, **options)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 -- as above
        self._called[self._name] += 1  # sent together with others: its hash is read then
        return getattr(self._script, name)


class ClockedStore(JobStore):
    """A store of a Redis that it empties. ``called`` counts the scripts that are run."""

    retry_within_s = RETRY_WITHIN_S

    def __init__(self, client: redis.Redis, section: KmsSection, clock: Clock, called: Counter[str]) -> None:
        super().__init__(client, RecordKey((bytes(32),)), lambda _: None, section)
        self._test_clock = clock
        self.scripts = {
            name: _Counted(client.register_script(on_clock(text)), name, called)
            for name, text in SCRIPTS.items()
        }
        client.flushdb()
        client.set(_KEY, START)
        clock.now = START

    def now(self) -> float:
        return self._test_clock()

    def ask_clock(self) -> float:
        return self._test_clock()

    def pass_time(self, seconds: int) -> None:
        """Move the clock on: what expires by it is gone, and the reaper forgets its names."""
        self._test_clock.now += seconds
        now = int(self._test_clock())
        self.redis.set(_KEY, now)
        keys = cast("list[bytes]", self.redis.keys())
        pipeline: Any = self.redis.pipeline(transaction=False)
        for key in keys:
            pipeline.expiretime(key)
        expired = [key for key, at in zip(keys, pipeline.execute(), strict=True) if START <= at <= now]
        if expired:
            self.redis.delete(*expired)
        forget(self)

    def members(self, name: str) -> set[str]:
        """The members of a sorted set, by its key without the prefix."""
        found = cast("list[bytes]", self.redis.zrange(f"kms:{name}", 0, -1))
        return {each.decode() for each in found}


def on_clock(text: str) -> str:
    """A script that asks the key for the time."""
    for line, other in _ON_CLOCK.items():
        text = text.replace(line, other)
    assert not {"'TIME'", "'TTL'", "'PTTL'"} & set(text.replace("(", " ").replace(",", " ").split())
    return text


@contextmanager
def python_clock() -> Iterator[Clock]:
    """A clock that Python goes by too, within the block."""
    clock = Clock(START)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.time", clock)
        yield clock
