"""An end that no worker signed, as REST, waits and pages tell it.

Webhooks: tests/kms_core/jobs/test_ends.py.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kms_core.container import Core
from kms_core.jobs.execution.runner import run_job
from support.job_stores import forge
from support.service import CONTEXT, Json, Service, b64, core_of

ITEMS = {"kind": "encrypt", "context": CONTEXT, "items": [{"plaintext": b64(b"x")}]}
ERROR = "record_refused"


@pytest.fixture(scope="module")
def core(idle: Service) -> Core:
    """What a worker of ``idle`` would be made of; none runs."""
    return core_of(idle)


@pytest.fixture(params=["queued", "running", "failed", "done"])
def forged(request: pytest.FixtureRequest, idle: Service, core: Core) -> str:
    """A job that Redis says succeeded, and what it was before; of a done one the proof was deleted."""
    job_id, store = idle.submit(ITEMS), core.worker_context.store
    if request.param == "running":
        assert store.claim(job_id, "w/1")
    elif request.param == "failed":
        forge(store, job_id, state="failed", error="decrypt_failed")
    elif request.param == "done":
        run_job(job_id, core.worker_context, "w/1")
        assert idle.job(job_id)["state"] == "succeeded"
        store.redis.hdel(f"kms:job:{job_id}", "end")
    forge(store, job_id, state="succeeded", error="")
    return job_id


def listed(idle: Service, query: str = "") -> dict[str, Json]:
    found = idle.get(f"/jobs?limit=1000{query}").json()["jobs"]
    return {job["job_id"]: job for job in found}


def test_status_and_list_tell_it_as_refused(idle: Service, forged: str) -> None:
    job = idle.job(forged)

    assert (job["state"], job["error"]["code"]) == ("failed", ERROR)
    assert listed(idle)[forged] == job
    assert forged not in listed(idle, "&state=succeeded")


def test_wait_that_sees_it_tells_it_as_refused(idle: Service, core: Core) -> None:
    job_id = idle.submit(ITEMS)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(idle.get, f"/jobs/{job_id}?wait=30")
        time.sleep(0.3)  # longer than the request takes to arrive
        forge(core.worker_context.store, job_id, state="succeeded")
        told = waiting.result().json()

    assert (told["state"], told["error"]["code"]) == ("failed", ERROR)


def test_pages_tell_it_as_refused(idle: Service, forged: str) -> None:
    one = idle.http.get(f"/ui/jobs/{forged}").text
    rows = idle.http.get("/ui/jobs").text

    assert "record_refused" in one
    assert "succeeded" not in one.partition("<main")[2]
    row = rows.partition(forged)[2].partition("</tr>")[0]
    assert "record_refused" in row
    assert "succeeded" not in row
