"""The live processes of an install, their versions, and the features of records that each understands.

A record that needs a feature waits for a process that knows it (``spec.FEATURES``), listed or not. By the
list a writer chooses a form that all of them read, so that the version before can be started again, and
people see how far an update has come.
"""

import socket
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal, cast

from kms_core.jobs.spec import FEATURES
from kms_core.jobs.store.errors import redis_errors
from kms_core.jobs.store.heartbeats import live_workers
from kms_core.jobs.store.keys import PREFIX
from kms_core.jobs.store.records import named
from kms_core.jobs.store.store import JobStore
from kms_core.periodic import PeriodicThread
from kms_protocol import __version__
from kms_protocol.errors import JobsUnavailable

Role = Literal["api", "worker"]
EVERY_S: Final = 2.0
LISTED_S: Final = 10.0
"""A process that was killed is listed for so many seconds."""
_KEY: Final = f"{PREFIX}processes"
_MOST: Final = 1_000


@dataclass(frozen=True, slots=True)
class Process:
    """``role`` is ``api`` or ``worker``. ``features`` are those of ``spec.FEATURES`` in its version."""

    role: str
    name: str
    version: str
    features: frozenset[str]


def new_name() -> str:
    """A name for a process that starts: its host and eight random digits."""
    return f"{socket.gethostname()}:{uuid.uuid4().hex[:8]}"


class Presence(PeriodicThread):
    """Lists this process every two seconds, at once at first, and takes it off the list when stopped."""

    def __init__(self, store: JobStore, role: Role, name: str) -> None:
        super().__init__("presence", EVERY_S, failed="process.not_listed")
        self._store = store
        self._entry = " ".join((role, name, __version__, *sorted(FEATURES)))
        self.wake()

    def round(self) -> None:
        with suppress(JobsUnavailable), redis_errors():
            now = self._store.now()
            pipeline = self._store.redis.pipeline(transaction=False)
            pipeline.zadd(_KEY, {self._entry: now})
            pipeline.zremrangebyscore(_KEY, 0, now - LISTED_S)
            pipeline.execute()

    def finish(self) -> None:
        with suppress(JobsUnavailable), redis_errors():
            self._store.redis.zrem(_KEY, self._entry)


def listed(store: JobStore) -> list[Process]:
    """The processes that live, at most a thousand. Raises JobsUnavailable.

    Processes of 0.2 are not on the list; its workers are on that of heartbeats.
    """
    with redis_errors():
        found = store.redis.zrangebyscore(_KEY, store.now() - LISTED_S, "+inf", 0, _MOST)
    processes = []
    for entry in cast("list[bytes]", found):
        match named(entry).split(" "):
            case [role, name, version, *features]:
                processes.append(Process(role, name, version, frozenset(features)))
    return processes


def understood(store: JobStore) -> frozenset[str]:
    """The features that every live process knows: a writer uses no other. Raises JobsUnavailable.

    None while a worker lives that is not listed: it is of a version that knows no feature.
    """
    processes = listed(store)
    if set(live_workers(store)) - {each.name for each in processes}:
        return frozenset()
    return FEATURES.intersection(*(each.features for each in processes))
