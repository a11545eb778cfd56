"""The lease of an attempt: renewed by progress, ended with its process, handed back by a stopping worker."""

import os
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Final

import pytest

from kms_core.container import Core
from kms_core.jobs.execution import attendance
from kms_core.jobs.execution import lease as lease_module
from kms_core.jobs.execution.attendance import Attendance, Stall
from kms_core.jobs.execution.lease import Chore, HandedBack, Lease, Renewed
from kms_core.jobs.model import LeaseLost
from kms_core.jobs.store.store import JobStore
from support.job_stores import COMMIT, TENANT, claimed, store_of, with_jobs
from support.waiting import RealTime, until

SHORT_LEASES: Final = with_jobs(lease_s=0.6, stall_s=0.8)


@pytest.fixture
def store(core: Core) -> JobStore:
    return store_of(core, SHORT_LEASES)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Attendance:
    """As a worker's parent shares it; forked children of a test use it too."""
    found = Attendance()
    monkeypatch.setattr(attendance, "_shared", [found])
    return found


def test_an_attempt_without_progress_is_told_to_the_parent(
    shared: Attendance, core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it counts as hanging: another process may have to take the place of this one."""
    store = store_of(core, with_jobs())
    claim = claimed(store)
    lease, job_id, clock = Lease(store, claim), claim.accepted.job_id, [1e9]
    monkeypatch.setattr(lease_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    lease.advance(1)
    clock[0] += attendance.SLOW_S
    lease.renew()
    assert list(shared.stalls()) == []

    clock[0] += 0.1
    lease.renew()

    assert list(shared.stalls()) == [Stall(os.getpid(), job_id, [], is_slow=True)]


def in_child(work: Callable[[], object]) -> int:
    """Run it in a forked process; the status as ``waitpid`` gives it, 0 if it came to its end."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


MOVES: Final[dict[str, Callable[[Lease], None]]] = {
    "bytes": lambda lease: lease.advance(1),
    "an item": lambda lease: lease.item(failed=True),
    "a check": lambda lease: lease.check(),
}


@pytest.mark.parametrize("moves", MOVES.values(), ids=MOVES)
def test_an_attempt_that_advances_keeps_its_lease(store: JobStore, moves: Callable[[Lease], None]) -> None:
    claim = claimed(store)
    with Lease(store, claim) as lease:
        for _ in range(10):
            RealTime.sleep(0.2)
            moves(lease)

    store.finish(claim, "succeeded")


def test_an_attempt_that_advances_nothing_loses_its_lease(store: JobStore) -> None:
    claim = claimed(store)
    with Lease(store, claim):
        until(lambda: store.get(claim.accepted.job_id, TENANT).state == "queued", "it is taken away")
        with pytest.raises(LeaseLost):
            store.finish(claim, "succeeded")
    assert store.get(claim.accepted.job_id, TENANT).attempt == 1


def test_its_process_ends_and_its_parent_is_told(store: JobStore, shared: Attendance) -> None:
    claim = claimed(store)

    def hang() -> None:
        store.redis.connection_pool.disconnect()
        with Lease(store, claim):
            RealTime.sleep(60)

    assert os.WTERMSIG(in_child(hang)) == signal.SIGKILL
    told: list[Stall] = list(shared.stalls())
    assert [stall.job_id for stall in told] == [claim.accepted.job_id]
    assert list(shared.stalls()) == []


class Counted(Renewed):
    """Renewals are counted, and fail with ``error`` if there is one."""

    every_s = 0.05

    def __init__(self, error: Exception | None = None) -> None:
        self.count, self._error = 0, error

    def renew(self) -> None:
        self.count += 1
        if self._error:
            raise self._error


def test_a_renewal_that_fails_stops_no_other() -> None:
    with Counted(ValueError()) as failing, Counted() as other:
        until(lambda: failing.count > 2, "it is renewed all the same")
        before = other.count
        until(lambda: other.count > before, "the other is renewed")


def test_a_chore_that_hangs_ends_its_process(store: JobStore, shared: Attendance) -> None:
    def hang() -> None:
        with Chore(store, "some job"):
            RealTime.sleep(60)

    assert os.WTERMSIG(in_child(hang)) == signal.SIGKILL
    assert [stall.job_id for stall in shared.stalls()] == ["some job"]


def test_a_worker_that_stops_tells_its_attempts(core: Core, shared: Attendance) -> None:
    store = store_of(core, with_jobs(lease_s=0.6))
    with Lease(store, claimed(store)) as lease:
        RealTime.sleep(1)
        lease.check()
        shared.stops_at.note()
        assert attendance.is_stopping()
        with pytest.raises(HandedBack):
            until(lease.check, "it is told")


@pytest.mark.parametrize("commits", [False, True])
def test_an_attempt_that_does_not_hear_it_is_handed_back(
    core: Core, shared: Attendance, monkeypatch: pytest.MonkeyPatch, *, commits: bool
) -> None:
    monkeypatch.setattr("kms_core.jobs.execution.lease._HAND_BACK_AFTER_S", 0.5)
    store = store_of(core, with_jobs(lease_s=5))
    claim = claimed(store)
    if commits:
        store.committing(claim, COMMIT)

    def hang() -> None:
        store.redis.connection_pool.disconnect()
        shared.stops_at.note()
        with Lease(store, claim):
            RealTime.sleep(60)

    assert os.WTERMSIG(in_child(hang)) == signal.SIGKILL
    found = store.get(claim.accepted.job_id, TENANT)
    assert (found.state, found.attempt) == (("committing", 1) if commits else ("queued", 0))
    assert list(shared.stalls()) == [], "it hangs because it was to stop"
