"""Groups of jobs: counted by state, waited for, and told by one event once all have ended."""

import json
import uuid
from pathlib import Path
from typing import cast

import pytest

from kms_core.container import Core
from kms_core.jobs.events import transitions
from kms_core.jobs.events.outbox import Outbox
from kms_core.jobs.events.webhook import WebhookEndpoint
from kms_core.jobs.store.store import JobStore
from kms_core.settings.model import EndpointSection
from kms_protocol.errors import GroupComplete, UnknownJob
from kms_protocol.wire import PREFIX
from support.job_stores import LONG, TENANT, accepted, store_of
from support.service import Json, Service, b64, check_problem

ITEM = {"plaintext": b64(b"x")}


def job_of(name: str, jobs: int = 2, **more: object) -> Json:
    return {"kind": "encrypt", "items": [ITEM], "group": {"name": name, "jobs": jobs}, **more}


def unique() -> str:
    return uuid.uuid4().hex


def test_group_ends_with_its_last_job(service: Service) -> None:
    name = unique()
    first = service.submit(job_of(name))
    service.wait(first, "succeeded")
    before = service.get(f"/job-groups/{name}").json()
    bad = {"kind": "decrypt", "items": [{"ciphertext": b64(b"none")}], "group": {"name": name, "jobs": 2}}
    second = service.submit(bad)

    after = service.get(f"/job-groups/{name}?wait=30").json()
    assert before == {
        "name": name,
        "jobs": 2,
        "submitted": 1,
        "states": {"succeeded": 1},
        "ended": False,
        "failed": [],
    }
    assert after == before | {
        "submitted": 2,
        "states": {"succeeded": 1, "failed": 1},
        "ended": True,
        "failed": [second],
    }
    assert service.job(first)["group"] == name


def test_group_that_has_all_its_jobs_takes_no_more(service: Service) -> None:
    name = unique()
    service.submit(job_of(name, 1))
    answer = service.post("/jobs", job_of(name, 1))

    check_problem(answer, 409, "group_complete")
    assert service.get(f"/job-groups/{name}").json()["submitted"] == 1


def test_upload_is_in_a_group_by_its_header(service: Service) -> None:
    name = unique()
    group = f'{{"name":"{name}","jobs":1}}'.replace('"', "%22")
    job_id = service.upload("encrypt", b"x", X_KMS_Group=group)
    service.wait(job_id, "succeeded")

    assert service.get(f"/job-groups/{name}").json()["ended"] is True


def test_unknown_group(service: Service) -> None:
    check_problem(service.get(f"/job-groups/{unique()}"), 404, "unknown_job")


@pytest.mark.parametrize(
    "group",
    [{"name": "", "jobs": 1}, {"name": "a b", "jobs": 1}, {"name": "a", "jobs": 0}, {"name": "a"}, "a"],
)
def test_bad_groups_are_refused(service: Service, group: object) -> None:
    check_problem(service.post("/jobs", job_of("x") | {"group": group}), 422, "invalid_request")


@pytest.mark.parametrize("text", ["x", "%ff", "{}", '{"name":"a","jobs":"x"}'])
def test_bad_groups_in_headers_are_refused(service: Service, text: str) -> None:
    answer = service.http.post(f"{PREFIX}/files/encrypt", content=b"x", headers={"X-KMS-Group": text})
    check_problem(answer, 422, "invalid_request")


# -- the store and the event


def member(name: str, jobs: int, **more: object) -> dict[str, object]:
    return {"group": name, "group_jobs": jobs, "group_callback": "orchestrator", **more}


def end(store: JobStore, job_id: str) -> None:
    claim = store.claim(job_id, "w1")
    assert claim
    store.finish(claim, "failed", "decrypt_failed")


def group_events(store: JobStore) -> list[Json]:
    told = [
        json.loads(body)
        for _, body in transitions.read_feed(store, TENANT, transitions.FEED_START, {}).events
    ]
    return [event for event in told if event["type"] == transitions.GROUP_ENDED]


def test_one_event_says_that_all_have_ended(core: Core) -> None:
    store = store_of(core, LONG)
    jobs = [store.submit(accepted(**member("g", 3))).job_id for _ in range(3)]
    store.submit(accepted(**member("other", 1)))
    store.submit(accepted(tenant="web", **member("g", 3)))
    end(store, jobs[0])
    store.cancel(jobs[1], TENANT)
    assert group_events(store) == []
    end(store, jobs[2])

    (event,) = group_events(store)
    assert event["subject"] == "g"
    assert event["data"]["states"] == {"failed": 2, "cancelled": 1}
    assert event["data"]["failed"] == jobs


def test_group_whose_jobs_others_hide_is_not_told_as_ended(core: Core) -> None:
    """The number of jobs is sealed in each record, so a group cannot be made smaller in Redis."""
    store = store_of(core, LONG)
    jobs = [store.submit(accepted(**member("g", 2))).job_id for _ in range(2)]
    digest = store.group_digest(TENANT, "g")
    store.redis.zrem(f"kms:group:{digest}", jobs[0])
    store.redis.srem(f"kms:group-open:{digest}", jobs[0])
    store.redis.hset(f"kms:job:{jobs[1]}", "group", f"{digest} 1")
    end(store, jobs[1])

    last = cast("list[tuple[bytes, dict[bytes, bytes]]]", store.redis.xrevrange("kms:events", count=1))
    assert last[0][1][b"type"] == b"kms.group.ended"
    assert group_events(store) == []


def test_job_that_others_put_into_a_group_is_none_of_it(core: Core) -> None:
    store = store_of(core, LONG)
    stranger = store.submit(accepted()).job_id
    store.redis.zadd(f"kms:group:{store.group_digest(TENANT, 'g')}", {stranger: 1.0})

    with pytest.raises(UnknownJob):
        store.group(TENANT, "g")


def test_full_group_refuses_and_keeps_nothing(core: Core) -> None:
    store = store_of(core, LONG)
    store.submit(accepted(**member("g", 1)))
    before = store.redis.zcard("kms:open")

    with pytest.raises(GroupComplete):
        store.submit(accepted(**member("g", 1)))
    assert store.redis.zcard("kms:open") == before


def test_end_is_delivered_to_the_endpoint_of_the_group(core: Core) -> None:
    store = store_of(core, LONG)
    section = EndpointSection(url="https://hooks.test/", secret_file=Path("/nonexistent"), events=())
    outbox = Outbox(store, {"orchestrator": WebhookEndpoint(section)})
    jobs = [store.submit(accepted(**member("g", 2))).job_id for _ in range(2)]
    for job_id in jobs:
        end(store, job_id)

    (delivery,) = outbox.due("orchestrator", 10)
    body = json.loads(delivery.body)
    assert (body["type"], body["subject"], body["id"]) == ("kms.group.ended", "g", delivery.delivery_id)
    assert body["data"]["ended"] is True
    assert delivery.state == "failed"


def test_names_of_groups_are_not_in_redis(core: Core) -> None:
    store = store_of(core, LONG)
    job = store.submit(accepted(**member("name-that-redis-must-not-see", 1)))

    raw = cast("dict[bytes, bytes]", store.redis.hgetall(f"kms:job:{job.job_id}"))
    assert b"name-that" not in b"".join(raw.values())
