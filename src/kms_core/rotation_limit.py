"""How many new versions of a key callers may make in an hour.

Versions are counted by the creation times that their backend tells, so the limit holds across processes and
hosts without a counter. A backend that tells none (AWS KMS) is limited by each process. The limit is checked
before the backend is asked to rotate: of calls at the same moment each process may still let one more pass.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
        """``every_days`` is the schedule's age of a version, 0 for none; ``clock`` gives epoch seconds."""
        self._most = max_per_hour
        self._due_after_s = timedelta(days=every_days).total_seconds() or float("inf")
        self._clock = clock
        self._lock = Lock()
        self._own: dict[str, list[float]] = {}

    @contextmanager
    def spent(self, key: Key, who: Principal) -> Iterator[None]:
        """Count one rotation, made within; one that fails does not count. Raises RateLimited.

        The schedule is neither limited nor counted. A backend that cannot be asked is left out: it would not
        rotate either.
        """
        if who.credential == INTERNAL:
            yield
            return
        times = [self._told(versions) for versions in _versions(key)]
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

    def _told(self, versions: Sequence[KeyVersion]) -> list[float]:
        """When callers made these versions; neither the first one nor those that were due by age count.

        A version of unknown age is taken to be older than the others.
        """
        made = sorted(version.created_at.timestamp() for version in versions if version.created_at)
        first = made[:1] if len(made) < len(versions) else []
        return first + [after for before, after in pairwise(made) if after - before < self._due_after_s]

    def _check(self, made: Sequence[float], now: float) -> None:
        recent = [at for at in made if at > now - WINDOW_S]
        if len(recent) >= self._most:
            wait_s = min(WINDOW_S, recent[-self._most] + WINDOW_S - now)
            raise RateLimited(
                f"This key has {self._most} new versions within an hour: see [kms.rotation] max_per_hour",
                retry_after_s=wait_s,
            )


def _versions(key: Key) -> Iterator[Sequence[KeyVersion]]:
    for backend in key.sealing:
        try:
            yield backend.versions()
        except BackendUnavailable:
            continue
