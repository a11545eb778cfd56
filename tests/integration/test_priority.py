"""Priority: what is taken first, where each job waits, and that no job is forgotten behind others."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import cast

import pytest

from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_core.jobs.bulk_lines import PART_ITEMS
from kms_core.jobs.execution.runner import run_job
from kms_core.jobs.model import BULK, QUEUES, QueuePriority, part_id
from kms_core.jobs.recovery.reaper import Reaper
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.submission.submitter import SubmissionOptions
from kms_protocol.context import Context
from kms_protocol.wire import PRIORITIES, JobItem, Priority
from service import Service, check_problem, core_of, until
from stores import LONG, TENANT, accepted, forge

ONE = {"kind": "encrypt", "items": [{"plaintext": ""}]}
Nudged = list[tuple[str, QueuePriority]]


@pytest.fixture
def nudged() -> Nudged:
    return []


@pytest.fixture
def store(core: Core, nudged: Nudged) -> JobStore:
    def note(job_id: str, queue: str, priority: Priority) -> None:
        nudged.append((job_id, (queue, priority)))

    found = core.shop.store
    return JobStore(found.redis, found.record_key, note, LONG)


def caretaker(core: Core, store: JobStore, waiting: Mapping[QueuePriority, int]) -> Reaper:
    none = dict.fromkeys(product(QUEUES, PRIORITIES), 0)
    return Reaper(store, core.shop.spool, "c1", lambda: {**none, **waiting})


def started(service: Service) -> list[str]:
    """Jobs in the order in which a worker began them."""
    stream = core_of(service).shop.store.redis.xrange("kms:events")
    told = cast("list[tuple[bytes, dict[bytes, bytes]]]", stream)
    return [fields[b"subject"].decode() for _, fields in told if fields[b"type"] == b"kms.job.running"]


def test_high_job_behind_200_low_ones_is_begun_before_them(tmp_path: Path) -> None:
    with Service(tmp_path, "[kms.jobs]\nconcurrency = 2\n") as service:
        service.start("api")
        low = [service.submit(ONE | {"priority": "low"}) for _ in range(200)]
        normal = [service.submit(ONE) for _ in range(5)]
        high = service.submit(ONE | {"priority": "high"})
        service.start("worker")
        for job_id in (*low, *normal, high):
            service.wait(job_id, "succeeded")

        order = started(service)
        assert order.index(high) < 2  # two processes begin at once
        assert max(order.index(job_id) for job_id in normal) < 8
        assert len(order) == 206


def test_depth_counts_every_priority(idle: Service) -> None:
    before = idle.get("/status").json()["queue_depth"]

    jobs = [idle.submit(ONE | {"priority": priority}) for priority in (*PRIORITIES, None)]

    redis = core_of(idle).shop.store.redis
    lists = [redis.llen(f"kms:kms.bulk{end}") for end in ("", "\x06\x163", "\x06\x166")]
    assert all(lists)
    assert idle.get("/status").json()["queue_depth"] == before + 4
    exposed = idle.http.get("/metrics").text
    for priority, waiting in zip(PRIORITIES, lists, strict=True):
        assert f'kms_queue_depth{{priority="{priority}",queue="kms.bulk"}} {waiting}.0' in exposed
    assert [idle.job(job_id)["priority"] for job_id in jobs] == ["high", "normal", "low", "normal"]


@pytest.mark.parametrize("path", ["/files/encrypt", "/jobs?kind=encrypt"])
def test_streamed_job_has_its_priority_in_a_header(idle: Service, path: str) -> None:
    headers = {"Content-Type": "application/x-ndjson", "X-KMS-Priority": "low"}
    body = b'{"plaintext": ""}'

    job_id = idle.post(path, content=body, headers=headers).json()["job_id"]

    assert idle.job(job_id)["priority"] == "low"
    check_problem(
        idle.post(path, content=body, headers=headers | {"X-KMS-Priority": "9"}), 422, "invalid_request"
    )


def test_priority_tells_requests_apart(idle: Service) -> None:
    key = {"Idempotency-Key": "priority"}
    first = idle.post("/jobs", ONE, headers=key).json()["job_id"]

    assert idle.post("/jobs", ONE | {"priority": "normal"}, headers=key).json()["job_id"] == first
    check_problem(idle.post("/jobs", ONE | {"priority": "low"}, headers=key), 409, "idempotency_conflict")


def test_parts_inherit_the_priority_and_so_does_a_retry(core: Core, store: JobStore, nudged: Nudged) -> None:
    core.shop.store._nudge = store._nudge  # noqa: SLF001 -- whom it tells is the question
    items = [JobItem(plaintext=b"x")] * (PART_ITEMS + 1)
    terms = SubmissionOptions(Principal("local"), "encrypt", Context.parse("a=1"), priority="low")
    job_id = core.desk.items(terms, items).job_id

    run_job(job_id, core.shop, "w")

    parts = [part_id(job_id, 0), part_id(job_id, 1)]
    assert nudged == [(name, (BULK, "low")) for name in (job_id, *parts)]
    assert [store.lane_of(part) for part in parts] == [(BULK, "low")] * 2
    forge(store, job_id, state="failed", error="attempts_exhausted")
    store.retry(job_id, TENANT, 60)
    assert nudged[-1] == (job_id, (BULK, "low"))


@pytest.mark.parametrize(("waits", "again"), [("normal", True), ("low", True), ("high", False)], ids=str)
def test_lost_message_is_missed_where_its_job_waits(
    core: Core, store: JobStore, nudged: Nudged, waits: Priority, *, again: bool
) -> None:
    job = store.submit(accepted(items=1, priority="high"))
    nudged.clear()

    caretaker(core, store, {(BULK, waits): 5000}).round()

    assert nudged == ([(job.job_id, (BULK, "high"))] if again else [])


def test_deferred_job_has_its_message_when_its_time_has_come_however_many_wait(
    core: Core, store: JobStore, nudged: Nudged
) -> None:
    job = store.submit(accepted(items=1))
    claim = store.claim(job.job_id, "w")
    assert claim
    store.defer(claim, 0.05, counts=False)
    nudged.clear()
    care = caretaker(core, store, {(BULK, "normal"): 5000})
    until(store.due, "the delay is over")

    care.round()
    care.round()

    assert nudged == [(job.job_id, (BULK, "normal"))]


def test_forged_priority_moves_a_job_and_no_more(core: Core, store: JobStore) -> None:
    job = store.submit(accepted(priority="high"))
    forge(store, job.job_id, priority="highest", queue="celery")

    assert store.lane_of(job.job_id) == (QUEUES[0], "normal")
    assert core.shop.store.accepted(job.job_id).priority == "high"


def test_a_worker_takes_jobs_of_the_queues_that_settings_name(tmp_path: Path, redis_url: str) -> None:
    with Service(tmp_path, '[kms.jobs]\nqueues = ["kms.bulk"]\n', redis_url) as service:
        service.start()
        others = service.upload("encrypt", b"x")
        for _ in range(5):
            service.wait(service.submit({"kind": "encrypt", "items": [{"plaintext": ""}]}), "succeeded")

        assert service.job(others)["state"] == "queued"
