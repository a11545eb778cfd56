"""An end that no worker signed, as every place that tells of jobs tells it: REST, waits, pages, webhooks."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest

from kms_core.container import Core
from kms_core.jobs.events.outbox import Outbox, WebhookDispatcher
from kms_core.jobs.execution.runner import run_job
from kms_core.jobs.model import REFUSED
from support.job_stores import accepted, forge
from support.service import CONTEXT, Json, Service, b64, core_of
from support.waiting import until
from support.webhooks import DUE, Authority, Receiver, endpoint, event_entry, make_authority, receiving

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


def test_result_of_it_is_not_given(idle: Service, core: Core) -> None:
    job_id = idle.submit(ITEMS)
    forge(core.worker_context.store, job_id, state="succeeded")

    assert idle.get(f"/jobs/{job_id}/result").status_code >= httpx.codes.BAD_REQUEST


def test_pages_tell_it_as_refused(idle: Service, forged: str) -> None:
    one = idle.http.get(f"/ui/jobs/{forged}").text
    rows = idle.http.get("/ui/jobs").text

    assert "record_refused" in one
    assert "succeeded" not in one.partition("<main")[2]
    row = rows.partition(forged)[2].partition("</tr>")[0]
    assert "record_refused" in row
    assert "succeeded" not in row


def test_it_can_be_retried_and_then_ends(idle: Service, core: Core) -> None:
    job_id = idle.submit(ITEMS)
    forge(core.worker_context.store, job_id, state="succeeded")

    assert idle.post(f"/jobs/{job_id}/retry").json()["state"] == "queued"
    run_job(job_id, core.worker_context, "w/1")
    assert idle.job(job_id)["state"] == "succeeded"
    assert idle.result(job_id)


# -- webhooks ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def receiver(authority: Authority) -> Iterator[Receiver]:
    with receiving(authority) as found:
        yield found


@pytest.mark.parametrize("is_ended", [True, False], ids=["ended", "event-alone"])
def test_webhook_of_it_is_never_a_success(
    core: Core, tmp_path: Path, receiver: Receiver, authority: Authority, *, is_ended: bool
) -> None:
    store, ci = core.worker_context.store, endpoint(tmp_path, receiver.url(), authority)
    job_id = store.submit(accepted(callback="ci")).job_id
    if is_ended:
        forge(store, job_id, state="succeeded")
    store.redis.zadd(DUE, {event_entry(job_id): time.time()})
    outbox, other = Outbox(store, {"ci": ci}), store.submit(accepted(callback="ci")).job_id
    claim = store.claim(other, "w/1")
    assert claim
    store.finish(claim, "succeeded")  # which is told after the forged event
    courier = WebhookDispatcher(outbox, {"ci": ci}, "w1")
    courier.start()
    try:
        until(lambda: other in [body["subject"] for body in bodies(receiver)], "the event of the other job")
        until(lambda: outbox.size() == 0, "the last delivery")
    finally:
        courier.stop()
        courier.join()

    told = [(body["type"], body["data"]["error"]) for body in bodies(receiver) if body["subject"] == job_id]
    assert told == ([("kms.job.failed", {"code": REFUSED})] if is_ended else [])


def bodies(receiver: Receiver) -> list[Json]:
    return [json.loads(request.body) for request in receiver.requests]
