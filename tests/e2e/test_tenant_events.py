"""Events of all jobs of a tenant as server-sent events: as webhooks tell them, resumed by their ids."""

import json
import uuid
from collections.abc import Generator

import httpx2 as httpx
import pytest

from kms_core.container import Core
from kms_core.jobs.events import transitions
from kms_core.jobs.store.store import JobStore
from kms_protocol.wire import PREFIX
from support.job_stores import LONG, TENANT, accepted, store_of
from support.service import Json, Service, b64, check_problem
from support.waiting import until

ITEM = {"plaintext": b64(b"x")}


def job_of(**more: object) -> Json:
    return {"kind": "encrypt", "items": [ITEM], **more}


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

    def until_end(self, job_id: str) -> list[dict[str, str]]:
        """Events up to the end of a job."""
        found = []
        while True:
            found.append(self.next())
            data = json.loads(found[-1]["data"])
            if data["subject"] == job_id and data["data"]["state"] in {"succeeded", "failed", "cancelled"}:
                return found


def reading(service: Service, query: str = "", **headers: str) -> Generator[Reader]:
    with service.http.stream("GET", f"{PREFIX}/jobs/events{query}", headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield Reader(answer)


def test_each_transition_of_each_job_is_told_once(service: Service) -> None:
    run = uuid.uuid4().hex
    stream = reading(service, f"?label=run={run}")
    reader = next(stream)
    labels = {"labels": {"run": run}, "metadata": {"dag": "x"}}
    jobs = [service.submit(job_of(**labels)) for _ in range(2)]
    service.submit(job_of())
    told = [json.loads(event["data"]) for job_id in jobs for event in reader.until_end(job_id)]
    stream.close()

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
    run = uuid.uuid4().hex
    stream = reading(service, f"?label=run={run}")
    reader = next(stream)
    first = service.submit(job_of(labels={"run": run}))
    events = reader.until_end(first)
    stream.close()
    second = service.submit(job_of(labels={"run": run}))
    service.wait(second)

    again = reading(service, f"?label=run={run}", **{"Last-Event-ID": events[0]["id"]})
    told = next(again).until_end(second)
    again.close()
    assert told[: len(events) - 1] == events[1:]


@pytest.mark.parametrize("text", ["x", "1", "-1-1", "1-", f"{10**21}-0"])
def test_bad_ids_are_refused(service: Service, text: str) -> None:
    answer = service.http.get(f"{PREFIX}/jobs/events", headers={"Last-Event-ID": text})
    check_problem(answer, 422, "invalid_request")


def test_stream_holds_a_slot_and_gives_it_back(idle: Service) -> None:
    for _ in range(3):
        stream = reading(idle)
        next(stream)
        stream.close()

    until(lambda: idle.held("streams") == 0, "the slots to be given back")


# -- the feed


def read(store: JobStore, after: str = transitions.FEED_START, tenant: str = TENANT) -> transitions.FeedBatch:
    return transitions.read_feed(store, tenant, after, {})


def test_events_of_other_tenants_are_not_told(core: Core) -> None:
    store = store_of(core, LONG)
    store.submit(accepted(tenant="other"))
    own = store.submit(accepted())

    found = read(store)
    assert [json.loads(body)["subject"] for _, body in found.events] == [own.job_id]
    assert read(store, found.cursor).events == []


def test_unproven_success_is_told_as_refused(core: Core) -> None:
    """As by webhooks: whoever can write to Redis cannot have a success announced."""
    store = store_of(core, LONG)
    job = store.submit(accepted())
    claim = store.claim(job.job_id, "w1")
    assert claim
    store.redis.hset(f"kms:job:{job.job_id}", mapping={"state": "succeeded"})
    fields = {
        "type": "kms.job.succeeded",
        "subject": job.job_id,
        "id": f"{job.job_id}.1.succeeded.1",
        "time": "1800000000",
        "tenant": TENANT,
        "attempt": "1",
        "code": "",
    }
    store.redis.xadd("kms:events", fields)  # type: ignore[arg-type]  # dict is invariant

    last = json.loads(read(store).events[-1][1])
    assert (last["type"], last["data"]["error"]) == ("kms.job.failed", {"code": "record_refused"})


def test_lost_events_are_told(core: Core) -> None:
    store = store_of(core, LONG)
    store.submit(accepted())
    first = read(store)
    store.submit(accepted())
    store.submit(accepted())
    assert not read(store, first.cursor).is_gapped
    store.redis.xtrim("kms:events", maxlen=1, approximate=False)

    assert read(store, first.cursor).is_gapped
