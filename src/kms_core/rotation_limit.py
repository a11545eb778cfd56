"""Limits how many new versions of a key callers make in an hour.

Counts versions by the creation times that the backend reports, so the limit holds across processes and hosts
without a shared counter. Each process counts for itself where a backend reports none (AWS KMS). Of rotations
at the same moment each process may allow one too many.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import pairwise
from threading import Lock
from typing import Final

from kms_core.auth.policy import INTERNAL, Principal
from kms_core.backends import KeyVersion
from kms_core.keyring import Key
from kms_protocol.errors import BackendUnavailable, RateLimited

WINDOW_S: Final = 3600.0


class RotationLimit:
    """At most ``max_per_hour`` new versions of each key. Safe to call from several threads."""

    def __init__(
        self, max_per_hour: int = 10, every_days: int = 0, clock: Callable[[], float] = time.time
    ) -> None:
        """``every_days``: the schedule's age of a version, 0 for none. ``clock`` returns epoch seconds."""
        self._limit = max_per_hour
        self._due_after_s = timedelta(days=every_days).total_seconds() or float("inf")
        self._clock = clock
        self._lock = Lock()
        self._own: dict[str, list[float]] = {}

    @contextmanager
    def counted(self, key: Key, who: Principal) -> Iterator[None]:
        """Count the rotation in the block unless it fails. Raises RateLimited above the limit.

        Rotations of the schedule are neither limited nor counted. An unreachable backend is left out: it
        cannot rotate either.
        """
        if who.credential == INTERNAL:
            yield
            return
        times: list[list[float]] = []
        for backend in key.sealing:
            with suppress(BackendUnavailable):
                times.append(self._made_by_callers(backend.versions()))
        with self._lock:
            now = self._clock()
            own = [at for at in self._own.get(key.key_id, ()) if at > now - WINDOW_S]
            for made in (own, *times):
                self._check(made, now)
            own.append(now)
            self._own[key.key_id] = own
        try:
            yield
        except BaseException:
            with self._lock:
                self._own[key.key_id].remove(now)
            raise

    def _made_by_callers(self, versions: Sequence[KeyVersion]) -> list[float]:
        """Creation times of these versions, without the first one and those that were due by age.

        A version without a creation time counts as older than the others.
        """
        made = sorted(version.created_at.timestamp() for version in versions if version.created_at)
        first = made[:1] if len(made) < len(versions) else []
        return first + [after for before, after in pairwise(made) if after - before < self._due_after_s]

    def _check(self, made: Sequence[float], now: float) -> None:
        recent = [at for at in made if at > now - WINDOW_S]
        if len(recent) >= self._limit:
            wait_s = min(WINDOW_S, recent[-self._limit] + WINDOW_S - now)
            raise RateLimited(
                f"This key has {self._limit} new versions within an hour: see [kms.rotation] max_per_hour",
                retry_after_s=wait_s,
            )
