"""Webhooks of jobs, from the event in Redis to a real HTTPS receiver: told at the end, and never lost."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import httpx2 as httpx
import msgspec
import pytest
from prometheus_client import REGISTRY

from kms_core.container import Core
from kms_core.jobs.events.outbox import Delivery, Outbox, WebhookDispatcher
from kms_core.jobs.events.webhook import WebhookEndpoint, post
from kms_core.jobs.store.store import JobStore
from kms_protocol.wire import JobState
from support.credentials import REQUIRED, SecuredService
from support.job_stores import LASTING_LEASES, TENANT, claimed, store_of
from support.service import CANARY, CONTEXT, Service, b64, check_problem, core_of
from support.waiting import until
from support.webhooks import (
    DUE,
    LocalhostTls,
    Receiver,
    changed,
    ended_job,
    endpoint,
    every,
    make_localhost_tls,
    receiving,
    secret_file,
    toml,
    waiting,
)

ITEMS = {"kind": "encrypt", "context": CONTEXT, "items": [{"plaintext": b64(CANARY.encode())}]}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> LocalhostTls:
    return make_localhost_tls(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def receiver(authority: LocalhostTls) -> Iterator[Receiver]:
    with receiving(authority) as found:
        yield found


@pytest.fixture
def store(core: Core) -> JobStore:
    return store_of(core, LASTING_LEASES)


@pytest.fixture
def webhook_endpoint(tmp_path: Path, receiver: Receiver, authority: LocalhostTls) -> WebhookEndpoint:
    return endpoint(tmp_path, receiver.url(), authority)


@contextmanager
def running_dispatcher(
    store: JobStore, endpoints: Mapping[str, WebhookEndpoint], name: str = "w1"
) -> Iterator[None]:
    running = WebhookDispatcher(Outbox(store, endpoints), endpoints, name)
    running.start()
    try:
        yield
    finally:
        running.stop()
        running.join()


def ids(receiver: Receiver) -> list[str]:
    return [request.headers["X-KMS-Delivery"] for request in receiver.requests]


def subjects(receiver: Receiver) -> list[str]:
    return [json.loads(request.body)["subject"] for request in receiver.requests]


def settled(outbox: Outbox) -> bool:
    """Return whether every delivery was answered."""
    return outbox.waiting().total() == 0


def deliver(store: JobStore, endpoints: Mapping[str, WebhookEndpoint], name: str = "w1") -> None:
    """Have a worker send until every delivery was answered."""
    with running_dispatcher(store, endpoints, name):
        until(lambda: settled(Outbox(store, endpoints)), "the deliveries")


# -- told at the end -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "code"), [("succeeded", ""), ("failed", "items_failed"), ("cancelled", "cancelled")]
)
def test_each_end_is_told_once(
    store: JobStore, webhook_endpoint: WebhookEndpoint, receiver: Receiver, state: JobState, code: str
) -> None:
    job_id = ended_job(store, state, code)
    with (
        running_dispatcher(store, {"ci": webhook_endpoint}),
        running_dispatcher(store, {"ci": webhook_endpoint}, "w2"),
    ):
        until(lambda: settled(Outbox(store, {"ci": webhook_endpoint})), "the delivery")

    [request] = receiver.requests
    event = json.loads(request.body)
    assert (event["type"], event["subject"]) == (f"kms.job.{state}", job_id)
    assert event["id"] == request.headers["webhook-id"] == request.headers["X-KMS-Delivery"]
    assert (event["data"]["error"] or {}).get("code", "") == code
    assert event["data"]["progress"]["bytes_done"] == 5
    assert CANARY.encode() not in request.body


def test_only_the_endpoints_states_are_told(
    store: JobStore, webhook_endpoint: WebhookEndpoint, receiver: Receiver
) -> None:
    chatty = changed(webhook_endpoint, events=("queued", "running", "failed"))
    ended_job(store)
    deliver(store, {"ci": chatty})

    told = {json.loads(request.body)["type"] for request in receiver.requests}
    assert told == {"kms.job.queued", "kms.job.running"}


def test_a_queued_event_of_a_deferred_job_is_no_error(
    store: JobStore, webhook_endpoint: WebhookEndpoint, receiver: Receiver
) -> None:
    chatty = changed(webhook_endpoint, events=("queued",))
    claim = claimed(store, callback="ci")
    store.defer(claim, 60)
    deliver(store, {"ci": chatty})

    assert len(set(ids(receiver))) == 2
    assert [json.loads(request.body)["data"]["error"] for request in receiver.requests] == [None, None]


def test_more_events_than_one_batch(
    store: JobStore, webhook_endpoint: WebhookEndpoint, receiver: Receiver
) -> None:
    for _ in range(260):
        ended_job(store, callback="")
    job_id = ended_job(store)
    with running_dispatcher(store, {"ci": webhook_endpoint}):
        until(lambda: receiver.requests, "the delivery")

    assert set(subjects(receiver)) == {job_id}
    assert len(set(ids(receiver))) == 1, "read twice, as a record and as an event, it is one delivery"


# -- sent again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [500, (307, "/elsewhere"), 404], ids=["500", "redirect", "404"])
def test_a_refusal_is_tried_again_with_the_same_id_and_body(
    store: JobStore, webhook_endpoint: WebhookEndpoint, receiver: Receiver, answer: int | tuple[int, str]
) -> None:
    receiver.answers = [answer]
    ended_job(store)
    deliver(store, {"ci": webhook_endpoint})

    first, second = receiver.requests
    assert (first.path, first.body) == (second.path, second.body)
    assert first.headers["X-KMS-Delivery"] == second.headers["X-KMS-Delivery"]


def test_an_endpoint_that_this_worker_does_not_know_yet_waits(
    store: JobStore, webhook_endpoint: WebhookEndpoint, receiver: Receiver
) -> None:
    job_id = ended_job(store)
    with running_dispatcher(store, {}):
        until(lambda: any(found.attempts for found in every(Outbox(store, {}))), "a failed attempt")
    with running_dispatcher(store, {"ci": webhook_endpoint}, "w2"):
        until(lambda: receiver.requests, "the delivery")

    assert subjects(receiver) == [job_id]


def test_a_slow_receiver_does_not_hold_up_another(
    store: JobStore,
    webhook_endpoint: WebhookEndpoint,
    receiver: Receiver,
    authority: LocalhostTls,
    tmp_path: Path,
) -> None:
    released = Event()
    with receiving(authority) as slow:
        slow.slowly = released.wait
        (tmp_path / "slow").mkdir()
        endpoints = {"ci": webhook_endpoint, "slow": endpoint(tmp_path / "slow", slow.url(), authority)}
        stuck = [ended_job(store, callback="slow") for _ in range(9)]
        job_id = ended_job(store)
        with running_dispatcher(store, endpoints):
            until(lambda: receiver.requests, "the delivery to the quick one")
            assert len(slow.requests) <= 4
            released.set()
            until(lambda: settled(Outbox(store, endpoints)), "the others")

    assert subjects(receiver) == [job_id]
    assert sorted(subjects(slow)) == sorted(stuck)


def test_deliveries_are_counted(
    store: JobStore, webhook_endpoint: WebhookEndpoint, receiver: Receiver
) -> None:
    def counts() -> list[float]:
        name, results = "kms_webhook_deliveries_total", ("delivered", "retried", "gone")
        found = [REGISTRY.get_sample_value(name, {"endpoint": "ci", "result": result}) for result in results]
        return [value or 0.0 for value in found]

    before = counts()
    receiver.answers = [503, 204, 410]
    for _ in range(2):
        ended_job(store)
        deliver(store, {"ci": webhook_endpoint})

    assert len(receiver.requests) == 3
    assert [after - then for after, then in zip(counts(), before, strict=True)] == [1, 1, 1]


# -- never lost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [0, 1], ids=["before sending", "before settling"])
def test_what_a_killed_worker_did_not_settle_is_sent_again_as_the_same(
    store: JobStore, webhook_endpoint: WebhookEndpoint, receiver: Receiver, sent: int
) -> None:
    ended_job(store)
    _, delivery = waiting(store, {"ci": webhook_endpoint})
    for _ in range(sent):
        post(webhook_endpoint, delivery)
    deliver(store, {"ci": webhook_endpoint}, "w2")

    assert ids(receiver) == [delivery.delivery_id] * (sent + 1)
    assert len({request.body for request in receiver.requests}) == 1


def given_up(store: JobStore, endpoints: Mapping[str, WebhookEndpoint]) -> tuple[Outbox, Delivery]:
    """A delivery that has failed for a day."""
    outbox, delivery = waiting(store, endpoints)
    assert outbox.put_off(msgspec.structs.replace(delivery, attempts=19)) is None
    [dead] = outbox.dead()
    return outbox, dead


def test_delivery_that_was_given_up_is_sent_again_when_asked_and_once(
    store: JobStore, webhook_endpoint: WebhookEndpoint, receiver: Receiver
) -> None:
    ended_job(store)
    outbox, dead = given_up(store, {"ci": webhook_endpoint})

    assert [outbox.resend(dead), outbox.resend(dead)] == [True, False]
    with running_dispatcher(store, {"ci": webhook_endpoint}):
        until(lambda: settled(outbox), "the delivery")

    assert ids(receiver) == [dead.delivery_id]
    assert outbox.dead() == []


def test_delivery_that_is_sent_again_has_all_its_attempts(
    store: JobStore, webhook_endpoint: WebhookEndpoint
) -> None:
    ended_job(store)
    outbox, dead = given_up(store, {"ci": webhook_endpoint})
    outbox.resend(msgspec.structs.replace(dead))

    [again] = outbox.due("ci", 10)

    assert (again.attempts, again.delivery_id, again.body) == (0, dead.delivery_id, dead.body)
    assert outbox.put_off(again) is not None


# -- the whole service -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(
    tmp_path_factory: pytest.TempPathFactory, module_redis: str, authority: LocalhostTls
) -> Iterator[tuple[Service, Receiver]]:
    """API and worker, and a receiver that they know as ``ci``."""
    folder = tmp_path_factory.mktemp("told")
    with receiving(authority) as receiver:
        section = toml("ci", receiver, authority, secret_file(folder))
        with Service(folder / "install", section, module_redis) as service:
            yield service.start(), receiver


def test_submitted_jobs_are_told_by_the_worker(told: tuple[Service, Receiver]) -> None:
    service, receiver = told
    jobs = [
        service.submit(ITEMS | {"callback": "ci"}),
        service.upload("encrypt", b"secret", CONTEXT, X_KMS_Callback="ci"),
    ]
    silent = service.submit(ITEMS)
    for job_id in (*jobs, silent):
        service.wait(job_id, "succeeded")
    until(lambda: set(jobs) <= set(subjects(receiver)), "both deliveries")

    assert sorted(found for found in subjects(receiver) if found in {*jobs, silent}) == sorted(jobs)
    assert (
        'kms_webhook_deliveries_total{endpoint="ci",result="delivered"}'
        in service.http.get(f"http://127.0.0.1:{service.port + 1}/metrics").text
    )


def test_a_killed_worker_loses_no_delivery(told: tuple[Service, Receiver]) -> None:
    service, receiver = told
    released = Event()
    receiver.slowly = released.wait
    try:
        job_id = service.submit(ITEMS | {"callback": "ci"})
        until(lambda: job_id in subjects(receiver), "the first request")
        service.kill("worker")
    finally:
        released.set()
        service.start("worker")
    until(lambda: subjects(receiver).count(job_id) == 2, "the second request")

    assert len({ids(receiver)[at] for at, found in enumerate(subjects(receiver)) if found == job_id}) == 1


def test_dead_deliveries_are_listed_and_sent_again_by_the_api(
    told: tuple[Service, Receiver], authority: LocalhostTls, tmp_path: Path
) -> None:
    service, receiver = told
    store = core_of(service).worker_context.store
    job_id = service.submit(ITEMS | {"callback": "ci"})
    service.wait(job_id, "succeeded")
    outbox = Outbox(store, {"ci": endpoint(tmp_path, receiver.url(), authority)})
    until(lambda: job_id in subjects(receiver) and settled(outbox), "the first delivery")
    first = ids(receiver)[subjects(receiver).index(job_id)]
    lost = Delivery(
        delivery_id=first,
        endpoint="ci",
        job_id=job_id,
        tenant=TENANT,
        state="succeeded",
        body=receiver.requests[subjects(receiver).index(job_id)].body,
        created_at=0.0,
        attempts=19,
        entry=b"one",
    )
    stranger = msgspec.structs.replace(lost, tenant="theirs", delivery_id="stranger", entry=b"two")
    for each in (lost, stranger):
        store.redis.zadd(DUE, {each.entry: time.time() + 3600})
        outbox.put_off(each)

    listed = service.get("/webhooks/dead").json()["deliveries"]
    answer = service.post(f"/webhooks/dead/{first}/resend")
    until(lambda: subjects(receiver).count(job_id) == 2, "the second delivery")

    assert [(found["delivery_id"], found["job_id"], found["attempts"]) for found in listed] == [
        (first, job_id, 20)
    ]
    assert (answer.status_code, answer.json()["endpoint"]) == (202, "ci")
    assert CANARY not in answer.text
    for name in (first, "stranger", "no"):
        check_problem(service.post(f"/webhooks/dead/{name}/resend"), 404, "unknown")


# -- endpoints of tenants --------------------------------------------------------------------------------


def test_an_endpoint_of_one_tenant_is_for_another_as_if_it_were_not_there(
    tmp_path: Path, redis_url: str, authority: LocalhostTls
) -> None:
    may = {"acme": "tenants = ['acme']", "both": "tenants = ['acme', 'web']", "all": ""}
    with receiving(authority) as receiver:
        secret = secret_file(tmp_path)
        sections = (toml(name, receiver, authority, secret, more) for name, more in may.items())
        with SecuredService(tmp_path / "install", REQUIRED + "".join(sections), redis_url).start(
            "api"
        ) as service:
            who = {name: service.token_header("encrypt,jobs:write", tenant=name) for name in ("acme", "web")}

            def ask(tenant: str, name: str) -> httpx.Response:
                return service.post("/jobs", ITEMS | {"callback": name}, headers=who[tenant])

            def upload(tenant: str, name: str) -> httpx.Response:
                more = {**who[tenant], "X-KMS-Callback": name, "X-KMS-Context": CONTEXT}
                return service.post("/files/encrypt", content=b"x", headers=more)

            for way in (ask, upload):
                taken = [("acme", name) for name in may] + [("web", "both"), ("web", "all")]
                assert [way(*pair).status_code for pair in taken] == [202] * len(taken)
                foreign, unknown = way("web", "acme"), way("web", "none")
                check_problem(foreign, 422, "invalid_request")
                assert foreign.json() | {"request_id": ""} == unknown.json() | {"request_id": ""}


def test_what_was_accepted_for_a_tenant_that_may_no_longer_is_not_told(
    store: JobStore, webhook_endpoint: WebhookEndpoint, receiver: Receiver
) -> None:
    """Neither at first nor when it is sent again."""
    ended_job(store)
    outbox, dead = given_up(store, {"ci": webhook_endpoint})
    assert outbox.resend(dead)
    ended_job(store)
    assert len(every(outbox)) == 2
    with running_dispatcher(store, {"ci": changed(webhook_endpoint, tenants=("others",))}):
        until(lambda: settled(outbox), "nothing is left")

    assert receiver.requests == []
    with running_dispatcher(store, {"ci": changed(webhook_endpoint, tenants=(TENANT,))}):
        job_id = ended_job(store)
        until(lambda: subjects(receiver) == [job_id], "a job of the tenant is told")
