"""The API for programs that run many jobs: labels, metadata, waits, states, groups, events."""

import json
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import httpx2 as httpx
import pytest

from kms_core.container import Core
from kms_core.jobs.events import transitions
from kms_core.jobs.events.outbox import Outbox
from kms_core.jobs.events.webhook import WebhookEndpoint
from kms_core.jobs.store.store import JobStore
from kms_core.settings.model import EndpointSection
from kms_protocol.errors import GroupComplete, UnknownJob
from kms_protocol.wire import PREFIX
from support.job_stores import LASTING_LEASES, TENANT, accepted, store_of
from support.service import Json, Service, b64, check_problem
from support.waiting import until

ITEM = {"plaintext": b64(b"x")}


def unique() -> str:
    return uuid.uuid4().hex


def job_of(**more: object) -> Json:
    return {"kind": "encrypt", "items": [ITEM], **more}


def grouped(name: str, jobs: int = 2) -> Json:
    return job_of(group={"name": name, "jobs": jobs})


def listed(service: Service, *labels: str, **more: str) -> list[str]:
    found = service.get("/jobs", params={"label": list(labels), **more})
    assert found.status_code == 200, found.text
    return [job["job_id"] for job in found.json()["jobs"]]


# -- labels and metadata


def test_answers_repeat_labels_and_metadata(service: Service) -> None:
    told = {"labels": {"team": "pay", "run": unique()}, "metadata": {"dag": "nächtlich", "note": "a=b, c"}}
    job_id = service.submit(job_of(**told))

    assert {name: service.job(job_id)[name] for name in told} == told
    assert [job["labels"] for job in service.get("/jobs").json()["jobs"] if job["job_id"] == job_id] == [
        told["labels"]
    ]


def test_streamed_bodies_have_them_in_headers(service: Service) -> None:
    run = unique()
    headers = {"X_KMS_Labels": f"team%3Dpay%2Crun={run}", "X_KMS_Metadata": "%7B%22dag%22%3A%22n%C3%A4%22%7D"}
    job_id = service.upload("encrypt", b"x", **headers)

    found = service.job(job_id)
    assert found["labels"] == {"team": "pay", "run": run}
    assert found["metadata"] == {"dag": "nä"}


def test_jobs_are_listed_by_all_their_labels(service: Service) -> None:
    run, other = unique(), unique()
    first = service.submit(job_of(labels={"run": run, "step": "1"}))
    second = service.submit(job_of(labels={"run": run, "step": "2"}))
    service.submit(job_of(labels={"run": other, "step": "2"}))
    service.submit(job_of())
    service.wait(second, "succeeded")
    service.wait(first, "succeeded")

    assert listed(service, f"run={run}") == [second, first]
    assert listed(service, f"run={run}", "step=2") == [second]
    assert listed(service, f"run={run}", state="succeeded") == [second, first]
    assert listed(service, f"run={run}", state="queued") == []
    assert listed(service, f"run={run}", "step=3") == []


def test_list_by_label_goes_on_at_its_cursor(service: Service) -> None:
    run = unique()
    made = [service.submit(job_of(labels={"run": run, "all": "yes"})) for _ in range(5)]
    seen: list[str] = []
    params: dict[str, str] = {"label": f"run={run}", "limit": "2"}
    while params.get("cursor", "first"):
        page = service.get("/jobs", params=params).json()
        seen += [job["job_id"] for job in page["jobs"]]
        params["cursor"] = page["next"] or ""

    assert seen == made[::-1]


# -- waits


def test_calls_that_wait_answer_with_the_end(service: Service) -> None:
    bulk = service.post("/jobs?wait=30", job_of())
    upload = service.post("/files/encrypt?wait=30", content=b"x")
    later = service.get(f"/jobs/{service.submit(job_of())}?wait=30")

    for answer in (bulk, upload, later):
        assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")
    assert bulk.json()["progress"]["items_done"] == 1
    assert bulk.headers["location"] == bulk.json()["links"]["self"]


def test_wait_is_over_in_time(no_worker: Service) -> None:
    """No worker runs: the job is told as it is."""
    begun = time.monotonic()
    answer = no_worker.post("/jobs?wait=1", job_of())
    job = no_worker.get(f"/jobs/{answer.json()['job_id']}?wait=1")
    took_s = time.monotonic() - begun

    assert (answer.status_code, answer.json()["state"]) == (202, "queued")
    assert (job.status_code, job.json()["state"]) == (200, "queued")
    assert took_s >= 2


@pytest.mark.parametrize("wait", ["61", "-1", "1.5", "x", "9" * 30])
def test_bad_waits_are_refused_before_anything_is_submitted(no_worker: Service, wait: str) -> None:
    run = unique()
    check_problem(no_worker.post(f"/jobs?wait={wait}", job_of(labels={"run": run})), 422, "invalid_request")
    check_problem(no_worker.post(f"/files/encrypt?wait={wait}", content=b"x"), 422, "invalid_request")
    check_problem(no_worker.get(f"/jobs/{uuid.uuid4()}?wait={wait}"), 422, "invalid_request")

    assert listed(no_worker, f"run={run}") == []


# -- many jobs, replays, the answer


def test_states_of_many_jobs_in_one_call(service: Service) -> None:
    made = [service.submit(job_of()) for _ in range(3)]
    unknown = str(uuid.uuid4())
    for job_id in made:
        service.wait(job_id, "succeeded")

    found = service.post("/jobs/status", {"job_ids": [made[2], unknown, made[0], made[2], "no id"]}).json()

    assert [job["job_id"] for job in found["jobs"]] == [made[2], made[0]]
    assert found["jobs"][0] == service.job(made[2])
    assert found["unknown"] == [unknown, "no id"]


def test_job_tells_who_submitted_it_with_which_key_and_when_it_ran(service: Service) -> None:
    before = time.time()
    job_id = service.submit(job_of(key_id="default"))
    found = service.wait(job_id, "succeeded")

    assert (found["submitter"], found["key_id"]) == ("local", "default")
    assert found["created_at"] <= found["started_at"] <= found["ended_at"]
    assert time.strftime("%Y-%m-%dT%H", time.gmtime(before)) <= found["started_at"]


def test_failed_job_names_its_first_failed_items(service: Service) -> None:
    """Over three parts: each of the first ten, by its place among all items."""
    good, bad = b64(service.encrypt(b"x", "")), b64(b"no age file")
    items = [{"ciphertext": bad if number in range(240, 500, 5) else good} for number in range(600)]
    job_id = service.submit({"kind": "decrypt", "items": items})
    error = service.wait(job_id, "failed")["error"]

    assert error["code"] == "items_failed"
    assert error["items"] == [{"index": number, "code": "not_a_ciphertext"} for number in range(240, 290, 5)]


def test_failed_files_are_named_by_their_line_of_the_result(service: Service) -> None:
    folder = service.files / unique()
    folder.mkdir()
    for name in "abc":
        (folder / name).write_bytes(b"x")
    out = service.files / unique()
    out.mkdir()
    (out / "b.age").write_bytes(b"in the way")
    job = {"kind": "encrypt", "source": f"{folder.as_uri()}/**", "target": f"{out.as_uri()}/"}
    job_id = service.submit(job)

    error = service.wait(job_id, "failed")["error"]
    lines = service.lines(job_id)

    assert error["items"] == [{"index": 1, "code": "target_exists"}]
    assert lines[1]["source"].endswith("/b")


def test_waits_and_event_streams_end_when_the_api_stops(tmp_path: Path, redis_url: str) -> None:
    """A wait is answered with the state of the job: callers need not tell a stop from a broken connection."""
    with Service(tmp_path, redis=redis_url) as service, ThreadPoolExecutor() as pool:
        service.has_test_metrics = True
        job_id = service.start("api").submit(job_of(group={"name": "of-two", "jobs": 2}))
        waits = [
            pool.submit(service.get, f"/{path}?wait=60") for path in (f"jobs/{job_id}", "job-groups/of-two")
        ]
        stream = pool.submit(service.get, "/jobs/events")
        until(lambda: service.held("streams") == 3, "all wait")

        begun = time.monotonic()
        service.stop("api")
        assert time.monotonic() - begun < 10
        assert [answer.result().status_code for answer in waits] == [200, 200]
        assert waits[0].result().json()["state"] == "queued"
        assert stream.result().text.startswith(": connected")


# -- groups


def test_group_ends_with_its_last_job(service: Service) -> None:
    name = unique()
    first = service.submit(grouped(name))
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
    service.submit(grouped(name, 1))
    answer = service.post("/jobs", grouped(name, 1))

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


# -- groups in the store, and their event


@pytest.fixture
def store(core: Core) -> JobStore:
    return store_of(core, LASTING_LEASES)


def member(name: str, jobs: int, **more: object) -> dict[str, object]:
    return {"group": name, "group_jobs": jobs, "group_callback": "orchestrator", **more}


def end(store: JobStore, job_id: str) -> None:
    claim = store.claim(job_id, "w1")
    assert claim
    store.finish(claim, "failed", "decrypt_failed")


def group_events(store: JobStore) -> list[Json]:
    told = [json.loads(event.body) for event in read(store).events]
    return [event for event in told if event["type"] == transitions.GROUP_ENDED]


def test_one_event_says_that_all_have_ended(store: JobStore) -> None:
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


def test_group_whose_jobs_others_hide_is_not_told_as_ended(store: JobStore) -> None:
    """The number of jobs is sealed in each record, so a group cannot be made smaller in Redis."""
    jobs = [store.submit(accepted(**member("g", 2))).job_id for _ in range(2)]
    digest = store.group_digest(TENANT, "g")
    store.redis.zrem(f"kms:group:{digest}", jobs[0])
    store.redis.srem(f"kms:group-open:{digest}", jobs[0])
    store.redis.hset(f"kms:job:{jobs[1]}", "group", f"{digest} 1")
    end(store, jobs[1])

    last = cast("list[tuple[bytes, dict[bytes, bytes]]]", store.redis.xrevrange("kms:events", count=1))
    assert last[0][1][b"type"] == b"kms.group.ended"
    assert group_events(store) == []


def test_job_that_others_put_into_a_group_is_none_of_it(store: JobStore) -> None:
    stranger = store.submit(accepted()).job_id
    store.redis.zadd(f"kms:group:{store.group_digest(TENANT, 'g')}", {stranger: 1.0})

    with pytest.raises(UnknownJob):
        store.group(TENANT, "g")


def test_full_group_refuses_and_keeps_nothing(store: JobStore) -> None:
    store.submit(accepted(**member("g", 1)))
    before = store.redis.zcard("kms:open")

    with pytest.raises(GroupComplete):
        store.submit(accepted(**member("g", 1)))
    assert store.redis.zcard("kms:open") == before


def test_end_is_delivered_to_the_endpoint_of_the_group(store: JobStore) -> None:
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


# -- events of a tenant


class Reader:
    """A stream of events that is read until enough have come."""

    def __init__(self, answer: httpx.Response) -> None:
        self._lines = answer.iter_lines()

    def next(self) -> dict[str, str]:
        """The next event, with its fields."""
        found: dict[str, str] = {}
        for line in self._lines:
            if not line and found:
                return found
            if line and not line.startswith(":"):
                name, _, value = line.partition(": ")
                found[name] = value
        raise AssertionError("the stream ended")

    def until_end(self, *job_ids: str) -> list[dict[str, str]]:
        """Events up to the end of the last of these jobs, whichever it is."""
        found, left = [], set(job_ids)
        while left:
            found.append(self.next())
            data = json.loads(found[-1]["data"])
            if data["data"]["state"] in {"succeeded", "failed", "cancelled"}:
                left.discard(data["subject"])
        return found


@contextmanager
def reading(service: Service, query: str = "", **headers: str) -> Iterator[Reader]:
    with service.http.stream("GET", f"{PREFIX}/jobs/events{query}", headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield Reader(answer)


def test_each_transition_of_each_job_is_told_once(service: Service) -> None:
    run = unique()
    labels = {"labels": {"run": run}, "metadata": {"dag": "x"}}
    with reading(service, f"?label=run={run}") as reader:
        jobs = [service.submit(job_of(**labels)) for _ in range(2)]
        service.submit(job_of())
        told = [json.loads(event["data"]) for event in reader.until_end(*jobs)]

    for job_id in jobs:
        states = [event["data"]["state"] for event in told if event["subject"] == job_id]
        assert states == ["queued", "running", "succeeded"]
    assert {event["subject"] for event in told} == set(jobs)
    assert all(event["data"]["labels"] == {"run": run} for event in told)
    assert all(event["data"]["metadata"] == {"dag": "x"} for event in told)
    assert {event["type"] for event in told} == {
        "kms.job.queued",
        "kms.job.running",
        "kms.job.succeeded",
    }
    assert len({event["id"] for event in told}) == len(told)


def test_reader_goes_on_behind_its_last_event(service: Service) -> None:
    run = unique()
    with reading(service, f"?label=run={run}") as reader:
        events = reader.until_end(service.submit(job_of(labels={"run": run})))
    second = service.submit(job_of(labels={"run": run}))
    service.wait(second)

    with reading(service, f"?label=run={run}", **{"Last-Event-ID": events[0]["id"]}) as reader:
        told = reader.until_end(second)
    assert told[: len(events) - 1] == events[1:]


@pytest.mark.parametrize("text", ["x", "1", "-1-1", "1-", f"{10**21}-0"])
def test_bad_ids_are_refused(service: Service, text: str) -> None:
    answer = service.http.get(f"{PREFIX}/jobs/events", headers={"Last-Event-ID": text})
    check_problem(answer, 422, "invalid_request")


# -- the feed of events in the store


def read(store: JobStore, after: str = transitions.FEED_START, tenant: str = TENANT) -> transitions.FeedBatch:
    return transitions.read_feed(store, tenant, after)


def test_events_of_other_tenants_are_not_told(store: JobStore) -> None:
    store.submit(accepted(tenant="other"))
    own = store.submit(accepted())

    found = read(store)
    assert [json.loads(event.body)["subject"] for event in found.events] == [own.job_id]
    assert read(store, found.cursor).events == []


def test_lost_events_are_told(store: JobStore) -> None:
    store.submit(accepted())
    first = read(store)
    store.submit(accepted())
    store.submit(accepted())
    assert not read(store, first.cursor).is_gapped
    store.redis.xtrim("kms:events", maxlen=1, approximate=False)

    assert read(store, first.cursor).is_gapped
