"""Priority: what is taken first, where each job waits, and that no job is forgotten behind others."""

from pathlib import Path

import pytest

from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_core.jobs.bulk_lines import RUN_ITEMS
from kms_core.jobs.spec import BULK
from kms_core.jobs.store.store import JobStore
from kms_protocol.wire import PRIORITIES, JobItem
from support.core_jobs import run_job
from support.job_options import job_options
from support.job_stores import TENANT, accepted, attempt, depths, forge
from support.service import Service, check_problem, core_of

ONE = {"kind": "encrypt", "items": [{"plaintext": ""}]}


def test_depth_counts_every_priority(no_worker: Service) -> None:
    before = no_worker.get("/status").json()["queue_depth"]

    jobs = [no_worker.submit(ONE | {"priority": priority}) for priority in (*PRIORITIES, None)]

    assert no_worker.get("/status").json()["queue_depth"] == before + 4
    exposed = no_worker.http.get("/metrics").text
    found = depths(core_of(no_worker).worker_context.store)
    assert found[BULK, "normal"] >= 2
    for priority in PRIORITIES:
        assert (
            f'kms_queue_depth{{priority="{priority}",queue="kms.bulk"}} {found[BULK, priority]}.0' in exposed
        )
    assert [no_worker.job(job_id)["priority"] for job_id in jobs] == ["high", "normal", "low", "normal"]


@pytest.mark.parametrize("path", ["/files/encrypt", "/jobs?kind=encrypt"])
def test_streamed_job_has_its_priority_in_a_header(no_worker: Service, path: str) -> None:
    headers = {"Content-Type": "application/x-ndjson", "X-KMS-Priority": "low"}
    body = b'{"plaintext": ""}'

    job_id = no_worker.post(path, content=body, headers=headers).json()["job_id"]

    assert no_worker.job(job_id)["priority"] == "low"
    check_problem(
        no_worker.post(path, content=body, headers=headers | {"X-KMS-Priority": "9"}), 422, "invalid_request"
    )


def test_parts_inherit_the_priority_and_so_does_a_retry(core: Core, store: JobStore) -> None:
    items = [JobItem(plaintext=b"x")] * (RUN_ITEMS + 1)
    terms = job_options(Principal("local"), "encrypt", "a=1", priority="low")
    job_id = core.submitter.items(terms, items).job_id
    assert depths(store)[BULK, "low"] == 1

    run_job(job_id, core.worker_context, "w")

    assert depths(store)[BULK, "low"] == sum(depths(store).values()) == 2
    forge(store, job_id, state="failed", error="attempts_exhausted")
    store.retry(job_id, TENANT)
    assert depths(store)[BULK, "low"] == 3


def test_forged_priority_and_queue_of_a_queued_job_change_nothing(store: JobStore) -> None:
    job = store.submit(accepted(priority="high", source="items", items=1))
    forge(store, job.job_id, priority="highest", queue="celery")

    assert depths(store)[BULK, "high"] == 1
    assert attempt(store).accepted.priority == "high"


def test_a_worker_takes_jobs_of_the_queues_that_settings_name(tmp_path: Path, redis_url: str) -> None:
    with Service(tmp_path, '[kms.jobs]\nqueues = ["kms.bulk"]\n', redis_url) as service:
        service.start()
        others = service.upload("encrypt", b"x")
        redis = core_of(service).worker_context.store.redis
        redis.rpush("kms:kms.files", b"the next one")  # for a worker that serves this queue
        for _ in range(5):
            service.wait(service.submit({"kind": "encrypt", "items": [{"plaintext": ""}]}), "succeeded")

        assert service.job(others)["state"] == "queued"
        assert redis.lrange("kms:kms.files", -1, -1) == [b"the next one"]
