"""An end that no worker signed, as REST, waits and pages tell it.

Webhooks: tests/kms_core/jobs/test_ends.py.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kms_core.container import Core
from support.core_jobs import run_job
from support.job_stores import forge
from support.service import CONTEXT, Json, Service, b64, core_of

ITEMS = {"kind": "encrypt", "context": CONTEXT, "items": [{"plaintext": b64(b"x")}]}
ERROR = "record_refused"


@pytest.fixture(scope="module")
def core(no_worker: Service) -> Core:
    """What a worker of ``no_worker`` would be made of; none runs."""
    return core_of(no_worker)


@pytest.fixture(params=["queued", "running", "failed", "done"])
def forged(request: pytest.FixtureRequest, no_worker: Service, core: Core) -> str:
    """A job that Redis says succeeded, and what it was before; of a done one the proof was deleted."""
    job_id, store = no_worker.submit(ITEMS), core.worker_context.store
    if request.param == "running":
        assert store.claim(job_id, "w/1")
    elif request.param == "failed":
        forge(store, job_id, state="failed", error="decrypt_failed")
    elif request.param == "done":
        run_job(job_id, core.worker_context, "w/1")
        assert no_worker.job(job_id)["state"] == "succeeded"
        store.redis.hdel(f"kms:job:{job_id}", "end")
    forge(store, job_id, state="succeeded", error="")
    return job_id


def listed(no_worker: Service, query: str = "") -> dict[str, Json]:
    found = no_worker.get(f"/jobs?limit=1000{query}").json()["jobs"]
    return {job["job_id"]: job for job in found}


def test_status_and_list_tell_it_as_refused(no_worker: Service, forged: str) -> None:
    job = no_worker.job(forged)

    assert (job["state"], job["error"]["code"]) == ("failed", ERROR)
    assert listed(no_worker)[forged] == job
    assert forged not in listed(no_worker, "&state=succeeded")


def test_wait_that_sees_it_tells_it_as_refused(no_worker: Service, core: Core) -> None:
    job_id = no_worker.submit(ITEMS)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(no_worker.get, f"/jobs/{job_id}?wait=30")
        time.sleep(0.3)  # longer than the request takes to arrive
        forge(core.worker_context.store, job_id, state="succeeded")
        told = waiting.result().json()

    assert (told["state"], told["error"]["code"]) == ("failed", ERROR)


def test_pages_tell_it_as_refused(no_worker: Service, forged: str) -> None:
    one = no_worker.http.get(f"/ui/jobs/{forged}").text
    rows = no_worker.http.get("/ui/jobs").text

    assert "record_refused" in one
    assert "succeeded" not in one.partition("<main")[2]
    row = rows.partition(forged)[2].partition("</tr>")[0]
    assert "record_refused" in row
    assert "succeeded" not in row
