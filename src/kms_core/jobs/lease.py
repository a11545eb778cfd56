"""The lease of one attempt: a thread that renews it, tells progress, and notices loss and cancellation."""

import threading
import time
from types import TracebackType
from typing import Final, Self

from kms_core import metrics
from kms_core.errors import JobsUnavailable, KmsError
from kms_core.jobs.model import Claim, LeaseLost
from kms_core.jobs.store import JobStore

_TELL_EVERY_S: Final = 0.5


class Lease:
    """Held while a job runs. ``check`` raises LeaseLost or JobCancelled, from whichever thread asks."""

    def __init__(self, store: JobStore, claim: Claim) -> None:
        self.claim = claim
        self._store = store
        self._lock = threading.Lock()
        self._bytes = self._items = self._failed = 0
        self._trouble: KmsError | None = None
        self._held_until = time.monotonic() + store.rules.lease_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        done = self.claim.accepted.kind
        metrics.JOB_BYTES.labels(done).inc(self._bytes)
        if self._items:
            metrics.JOB_ITEMS.labels(done, "ok").inc(self._items - self._failed)
            metrics.JOB_ITEMS.labels(done, "failed").inc(self._failed)

    def check(self) -> None:
        """Raise if this attempt must stop: another worker took over, or the owner cancelled."""
        if self._trouble is not None:
            raise self._trouble
        if time.monotonic() > self._held_until:
            raise LeaseLost

    def advance(self, size_bytes: int) -> None:
        with self._lock:
            self._bytes += size_bytes

    def item(self, *, failed: bool) -> None:
        with self._lock:
            self._items += 1
            self._failed += failed

    @property
    def failed_items(self) -> int:
        return self._failed

    @property
    def progress(self) -> dict[str, int]:
        return {"bytes_done": self._bytes, "items_done": self._items, "items_failed": self._failed}

    def _renew(self) -> None:
        every = min(_TELL_EVERY_S, self._store.rules.lease_s / 3)
        while not self._stop.wait(every):
            try:
                self._store.renew(self.claim, self.progress)
                self._held_until = time.monotonic() + self._store.rules.lease_s
            except JobsUnavailable:  # Redis may come back before the lease is over
                continue
            except KmsError as exc:
                self._trouble = exc
                return
