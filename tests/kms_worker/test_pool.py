"""Processes of a worker's pool that hang: real processes, and a pool that notes what is asked of it."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import billiard
import pytest
from structlog.testing import capture_logs

from kms_core.container import Core
from kms_core.jobs.execution.attendance import Attendance, Stall
from kms_core.jobs.model import Attempt
from kms_core.jobs.spec import QUEUES
from kms_core.jobs.store import gauges
from kms_core.jobs.store.store import JobStore
from kms_worker.pool import Slots
from support.job_stores import LASTING_LEASES, accepted, connect, store_of

NAS: Final = "root:/srv/nas"
GOES_ON: Final = 9  # the status of a process that ends by itself


class Pool:
    """Celery's pool as far as the watch uses it: the pids of its processes, and how many there are to be."""

    def __init__(self, *pids: int) -> None:
        self.info = {"processes": list(pids)}
        self.num_processes = len(pids)
        self._pool = SimpleNamespace(_pool=[])
        self.is_busy = False
        self.asked: list[str] = []

    def grow(self, count: int) -> None:
        self.num_processes += count
        self.asked.append("grow")

    def shrink(self, count: int) -> None:
        if self.is_busy:
            raise ValueError("all processes are busy")
        self.num_processes -= count
        self.asked.append("shrink")


class Hanging:
    """Processes that a kill ends only once they are ``let_go``: as if they waited for a disk."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._held: dict[int, subprocess.Popen[bytes]] = {}
        self._kill = os.kill
        patch.setattr(os, "kill", self._hold)

    def _hold(self, pid: int, number: int) -> None:
        if pid not in self._held:
            self._kill(pid, number)

    def start(self) -> int:
        process = subprocess.Popen(["sleep", "600"])
        self._held[process.pid] = process
        return process.pid

    def let_go(self, pid: int) -> None:
        process = self._held.pop(pid)
        process.kill()
        process.wait()

    def end(self) -> None:
        for pid in list(self._held):
            self.let_go(pid)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    found = Hanging(monkeypatch)
    yield found
    found.end()


@pytest.fixture
def store(core: Core) -> JobStore:
    return store_of(core, LASTING_LEASES)


def watch(shared: Attendance, store: JobStore, pool: Pool) -> Slots:
    consumer: Any = SimpleNamespace(pool=pool, hub=SimpleNamespace(call_soon=lambda work: work()))
    return Slots(shared, store, "w", consumer)


def hang(shared: Attendance, *pids: int) -> None:
    for pid in pids:
        shared.announce(Stall(pid, "some job", [NAS]))


def crawl(shared: Attendance, *jobs: tuple[int, str]) -> None:
    """Processes report that they have made no progress in a job for some seconds."""
    for pid, job_id in jobs:
        shared.announce(Stall(pid, job_id, [], is_slow=True))


def stuck(store: JobStore) -> int:
    return gauges.survey_queues(store).stuck


def test_a_report_for_which_its_pipe_has_no_room_stops_nothing() -> None:
    """The process that hangs ends itself next, whether or not its parent reads."""
    hang(Attendance(), *range(10_000))


def test_a_process_that_hangs_is_killed_and_the_pool_replaces_it_by_itself(store: JobStore) -> None:
    process = subprocess.Popen(["sleep", "600"])
    try:
        shared, pool = Attendance(), Pool(process.pid)
        slots = watch(shared, store, pool)
        hang(shared, process.pid)
        slots.round()
        assert process.wait(10) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    for _ in range(3):
        slots.round()

    assert pool.asked == []
    assert stuck(store) == 0


def test_one_that_cannot_be_ended_is_replaced_and_told_until_it_ends(
    store: JobStore, hanging: Hanging
) -> None:
    pid = hanging.start()
    shared, pool = Attendance(), Pool(pid)
    slots = watch(shared, store, pool)
    store.submit(accepted(items=1, source="items"), resources=[NAS])
    hang(shared, pid)
    slots.round()
    assert (pool.asked, stuck(store)) == ([], 0), "it has time to end"

    for _ in range(3):
        slots.round()
    assert (pool.asked, stuck(store)) == (["grow"], 1)
    assert store.next("w/1", QUEUES, woken=False) is None, "its worker leaves the root alone"

    hanging.let_go(pid)
    for _ in range(3):
        slots.round()
    assert (pool.asked, stuck(store)) == (["grow", "shrink"], 0)


def test_no_more_are_replaced_at_a_time_than_the_pool_has(store: JobStore, hanging: Hanging) -> None:
    first, second = hanging.start(), hanging.start()
    shared, pool = Attendance(), Pool(first)
    slots = watch(shared, store, pool)
    hang(shared, first, second)
    for _ in range(4):
        slots.round()
    assert (pool.asked, stuck(store)) == (["grow"], 2)

    hanging.let_go(first)
    slots.round()
    assert sorted(pool.asked) == ["grow", "grow", "shrink"], "the second is replaced in its turn"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: found[0])
    return found


def test_while_all_processes_are_slow_another_one_takes_jobs_elsewhere(
    store: JobStore, clock: list[float]
) -> None:
    """All wait for a mount that hangs: other jobs go on, and none touches it until it answers."""
    on_it = [store.submit(accepted(items=1, source="items"), resources=[NAS]).job_id for _ in range(3)]
    elsewhere = store.submit(accepted(items=1, source="items")).job_id
    taken = [store.next(f"w/{pid}", QUEUES, woken=False) for pid in (1, 2)]
    shared, pool = Attendance(), Pool(1, 2)
    slots = watch(shared, store, pool)
    crawl(shared, (1, on_it[0]))
    slots.round()
    assert (pool.asked, stuck(store)) == ([], 0), "the other one may be idle"

    for _ in range(5):
        clock[0] += 1
        crawl(shared, *zip((1, 2), on_it[:2], strict=True))
        slots.round()
    assert (pool.asked, stuck(store)) == (["grow"], 2)
    assert [attempt.accepted.job_id for attempt in taken] == on_it[:2]  # type: ignore[union-attr]  # they were ready
    third = store.next("w/3", QUEUES, woken=False)
    assert isinstance(third, Attempt)
    assert third.accepted.job_id == elsewhere
    assert store.next("w/3", QUEUES, woken=False) is None

    clock[0] += 3
    slots.round()
    assert (pool.asked, stuck(store)) == (["grow", "shrink"], 0)


def test_processes_that_wait_for_redis_are_not_slow(store: JobStore, tmp_path: Path) -> None:
    """Others in their place would wait for it as well."""
    away = JobStore(connect(f"unix://{tmp_path}/none?db=0"), store.record_key, None, LASTING_LEASES)
    shared, pool = Attendance(), Pool(1, 2)
    crawl(shared, (1, "some job"), (2, "another job"))

    watch(shared, away, pool).round()

    assert pool.asked == []


def test_one_that_is_slow_beside_others_is_told_after_ten_seconds(
    store: JobStore, clock: list[float]
) -> None:
    shared, pool, told = Attendance(), Pool(1, 2), []
    slots = watch(shared, store, pool)
    for _ in range(10):
        crawl(shared, (1, "some job"))
        slots.round()
        told.append(stuck(store))
        clock[0] += 1

    assert told == [0] * 8 + [1] * 2, "it was slow for three seconds before"
    assert pool.asked == []


def test_a_slow_process_that_hangs_at_last_is_replaced_once(
    store: JobStore, hanging: Hanging, clock: list[float]
) -> None:
    pid, shared = hanging.start(), Attendance()
    pool = Pool(pid)
    slots = watch(shared, store, pool)
    with capture_logs() as logs:
        crawl(shared, (pid, "some job"))
        slots.round()
        hang(shared, pid)
        for _ in range(3):
            clock[0] += 1
            slots.round()
    assert (pool.asked, stuck(store)) == (["grow"], 1)
    said = [(line["event"], line["pid"]) for line in logs]
    assert said == [("worker.process_slow", pid), ("worker.process_stuck", pid)], "each once"

    hanging.let_go(pid)
    for _ in range(2):
        slots.round()
    assert (pool.asked, stuck(store)) == (["grow", "shrink"], 0)


def test_how_a_process_of_the_pool_ended_is_noted_for_its_attempt(store: JobStore) -> None:
    """By a signal, or with a status; one that was told to end left no attempt."""
    statuses = {"exit 3": "status_3", "kill -9 $$": "signal_9", "exit 0": None}
    pool = Pool()
    started = [billiard.Process(target=os.execvp, args=("sh", ["sh", "-c", each])) for each in statuses]
    pool._pool = SimpleNamespace(_pool=list(started))  # noqa: SLF001 -- as that of Celery has it
    slots = watch(Attendance(), store, pool)
    for process in started:
        process.start()
    slots.round()
    for process in started:
        process.join()
    pool._pool._pool.clear()  # noqa: SLF001 -- as above
    slots.round()

    noted = [store.redis.get(f"kms:died:w/{process.pid}") for process in started]
    assert noted == [cause and cause.encode() for cause in statuses.values()]


def test_a_surplus_process_waits_for_an_idle_moment(store: JobStore, hanging: Hanging) -> None:
    pid = hanging.start()
    shared, pool = Attendance(), Pool(pid)
    slots = watch(shared, store, pool)
    hang(shared, pid)
    for _ in range(2):
        slots.round()
    pool.info["processes"] = [pid, 1]
    pool.is_busy = True
    hanging.let_go(pid)
    slots.round()
    pool.is_busy = False
    pool.info["processes"] = [pid, 1, 2]  # one is still ending
    slots.round()
    assert pool.asked == ["grow"]

    pool.info["processes"] = [pid, 1]
    slots.round()
    assert pool.asked == ["grow", "shrink"]


@pytest.mark.parametrize(("told_s_ago", "status"), [(11.0, os.EX_OK), (5.0, GOES_ON)])
def test_a_worker_that_stops_leaves_what_hangs(
    store: JobStore, hanging: Hanging, monkeypatch: pytest.MonkeyPatch, told_s_ago: float, status: int
) -> None:
    """Ten seconds after attempts were handed back: its pool would wait for the process."""
    held, shared = hanging.start(), Attendance()
    hang(shared, held)
    monkeypatch.setattr("time.monotonic", lambda: told_s_ago)
    shared.stops_at.set(0.0)
    store.redis.connection_pool.disconnect()
    pid = os.fork()
    if pid == 0:
        try:
            watch(shared, store, Pool(held)).round()
        finally:
            os._exit(GOES_ON)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status


def test_pool_that_has_ended_is_no_failure(store: JobStore) -> None:
    """Celery's pool has no processes to name once the worker stops."""
    pool = Pool(1)
    slots = watch(Attendance(), store, pool)
    del pool.info
    slots.round()
