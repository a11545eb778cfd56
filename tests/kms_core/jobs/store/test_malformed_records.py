"""Fields, members and scores in Redis that no script of ours wrote: a junk record costs itself alone."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, cast

import pytest
import redis

from kms_core.container import Core
from kms_core.jobs.model import EXHAUSTED, LeaseLost
from kms_core.jobs.recovery.reaper import Reaper
from kms_core.jobs.spec import QUEUES
from kms_core.jobs.store.queue_stats import survey
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.submission.submitter import new_id
from kms_protocol.errors import UnknownJob
from support.embedded_valkey import EmbeddedValkey
from support.job_stores import COMMIT, LONG, TENANT, accepted, forge, lapse, record, store_of
from support.record_fields import FIELDS, MISSING, put
from support.service import Service, core_of

JUNK: Final = (
    *(b"nan", b"-nan", b"inf", b"-inf", b"-1", b"-5.5", b"1e308", b"1e400", b"9" * 400, b"253402300800"),
    *(b"9007199254740993", b"0x10", b" 7", b"", b"junk", b"None", b"\xff\xfe", b"a\0b", b"a\nb"),
    *(b"<script>alert(1)</script>", MISSING),
)
WORST: Final = (b"nan", b"1e308", b"9" * 400, b"\xff\xfe", MISSING)
STATES: Final[Mapping[str, Mapping[str, str]]] = {
    "queued": {},
    "running": {"state": "running", "fence": "1", "attempt": "1"},
    "dead": {"state": "failed", "error": EXHAUSTED, "campaign": "dry"},
}


@dataclass(frozen=True)
class Install:
    """An API, and records beside a good one: for each junk value one in each state."""

    service: Service
    store: JobStore
    good: str
    victims: Mapping[bytes, Mapping[str, str]]

    def put(self, field: str) -> None:
        for value, by_state in self.victims.items():
            for job_id in by_state.values():
                put(self.store, job_id, field, value)

    def pages(self, limit: int, **asked: str) -> list[str]:
        """The ids of the whole list, read page by page."""
        found: list[str] = []
        cursor: dict[str, str] = {}
        while True:
            answer = self.service.get("/jobs", params={"limit": str(limit), **asked, **cursor})
            assert answer.status_code == 200, answer.text
            found += [job["job_id"] for job in answer.json()["jobs"]]
            if answer.json().get("next") is None:
                return found
            cursor = {"cursor": answer.json()["next"]}


@pytest.fixture(scope="module")
def install(
    tmp_path_factory: pytest.TempPathFactory, valkey: EmbeddedValkey, database_numbers: Iterator[int]
) -> Iterator[Install]:
    redis_url = valkey.files.url_of(next(database_numbers))
    with Service(tmp_path_factory.mktemp("junk"), redis=redis_url) as service:
        service.start("api")
        store = core_of(service).worker_context.store
        good = store.submit(accepted()).job_id
        store.redis.zadd(f"kms:dead:{TENANT}", {good: 1})
        victims = {value: {state: store.submit(accepted()).job_id for state in STATES} for value in JUNK}
        yield Install(service, store, good, victims)


@pytest.fixture
def records(install: Install) -> Iterator[Install]:
    """The records as they should be, before and after."""
    ids = [(job_id, state) for each in install.victims.values() for state, job_id in each.items()]
    kept = {job_id: record(install.store, job_id) for job_id, _ in ids}
    for job_id, state in ids:
        for field, value in STATES[state].items():
            install.store.redis.hset(f"kms:job:{job_id}", field, value)
        install.store.redis.zadd(f"kms:dead:{TENANT}", {job_id: 2})
    yield install
    for job_id, fields in kept.items():
        install.store.redis.delete(f"kms:job:{job_id}")
        for name, was in fields.items():
            install.store.redis.hset(f"kms:job:{job_id}", name, was)


def looked_at(service: Service, job_id: str) -> None:
    """The job is shown or unknown by every way that leads to it; its events begin or are refused."""
    assert service.get(f"/jobs/{job_id}").status_code in {200, 404}
    assert service.http.get(f"/ui/jobs/{job_id}").status_code in {200, 404}
    with service.http.stream("GET", f"/api/v1/kms/jobs/{job_id}/events") as stream:
        assert stream.status_code in {200, 404}
        if stream.status_code == 200:
            assert next(stream.iter_bytes()).startswith(b"event: progress")


@pytest.mark.parametrize("field", FIELDS)
def test_a_junk_field_costs_its_record_alone(records: Install, field: str) -> None:
    records.put(field)
    service = records.service

    assert records.good in records.pages(100)
    assert records.good in records.pages(7, state="queued")
    answer = service.get("/jobs/dead", params={"limit": "1000"})
    assert answer.status_code == 200
    assert records.good in {job["job_id"] for job in answer.json()["jobs"]}
    for page in ("/ui", "/ui/jobs", "/ui/jobs?state=dead", "/ui/jobs?state=running"):
        assert service.http.get(page).status_code == 200
    status = service.get("/status")
    assert status.status_code == 200
    assert "redis" not in status.json()["degraded"]
    assert service.http.get("/metrics").status_code == 200
    for value, by_state in records.victims.items():
        assert service.get(f"/jobs/{by_state['running']}").status_code in {200, 404}
        if value in WORST:
            looked_at(service, by_state["dead"])
            looked_at(service, by_state["queued"])
    assert service.job(records.good)["state"] == "queued"


@pytest.mark.parametrize("field", FIELDS)
def test_a_record_with_a_junk_field_can_be_cancelled_and_retried_or_not(records: Install, field: str) -> None:
    """No answer is a 500; one that Redis cannot change says that jobs are unavailable."""
    records.put(field)
    for value in WORST:
        by_state = records.victims[value]
        for answer in (
            records.service.post(f"/jobs/{by_state['dead']}/retry"),
            records.service.post(f"/jobs/{by_state['queued']}/cancel"),
            records.service.get(f"/jobs/{by_state['dead']}/result"),
        ):
            assert answer.status_code != 500, (value, answer.text)


SCORES: Final = ("inf", "-inf", "-5", "1e308", "1e-7", "123456789012345")


def test_junk_in_the_list_of_jobs_hides_no_job(install: Install) -> None:
    key, clean = f"kms:tenant:{TENANT}", install.pages(100)
    names: list[str | bytes] = [b"\xff\xfe", "junk", "", "a" * 36, "\N{SNOWMAN}" * 36, new_id()]
    scored: dict[str | bytes, str] = {
        **dict(zip(names, SCORES, strict=True)),
        **{new_id(): score for score in SCORES},
    }
    for member, score in scored.items():
        install.store.redis.execute_command("ZADD", key, score, member)  # type: ignore[no-untyped-call]  # untyped there
    install.store.redis.hset("kms:job:junk", mapping={"tenant": TENANT, "kind": "encrypt", "state": "queued"})
    for junk_key in ("kms:dead", f"kms:dead:{TENANT}", "kms:open", "kms:ended"):
        install.store.redis.execute_command("ZADD", junk_key, 1, b"\xff\xfe", 2, "junk")  # type: ignore[no-untyped-call]  # as above
    install.store.redis.hset("kms:tally", mapping={b"\xff": b"\xfe", "operations encrypt ok": "nan"})

    for limit in (1, 7, 100):
        assert install.pages(limit) == clean
    for path in ("/jobs/dead", "/status", "/keys"):
        assert install.service.get(path).status_code == 200
    for page in ("/ui", "/ui/jobs", "/ui/jobs?state=dead", "/metrics"):
        assert install.service.http.get(page).status_code == 200
    assert survey(install.store).jobs["queued"] >= 1


def test_a_key_of_a_wrong_type_is_no_job_and_hides_none(install: Install) -> None:
    wrong = new_id()
    install.store.redis.set(f"kms:job:{wrong}", "no hash")
    for key in (f"kms:tenant:{TENANT}", f"kms:dead:{TENANT}", "kms:dead"):
        install.store.redis.zadd(key, {wrong: 1})
    install.store.redis.zadd("kms:open", {wrong: 9e12})

    assert install.good in install.pages(100)
    assert wrong not in install.pages(100)
    assert install.service.get("/jobs/dead", params={"limit": "1000"}).status_code == 200
    assert install.service.get(f"/jobs/{wrong}").status_code == 404
    assert "redis" not in install.service.get("/status").json()["degraded"]
    assert survey(install.store).jobs["queued"] >= 1
    for read in (install.store.part, install.store.accepted, install.store.log_of):
        with pytest.raises(UnknownJob):
            read(wrong)


def test_a_list_of_dead_letters_of_a_wrong_type_counts_none(core: Core) -> None:
    store = store_of(core, LONG, [])
    store.submit(accepted())
    store.redis.set("kms:dead", "no list")

    assert (survey(store).jobs["queued"], survey(store).dead) == (1, 0)


@pytest.mark.parametrize("broken", ["wrong type", "last id"])
def test_a_stream_of_events_that_takes_none_costs_no_job(core: Core, broken: str) -> None:
    store = store_of(core, LONG, [])
    claim = store.claim(store.submit(accepted()).job_id, "w1")
    assert claim
    store.redis.delete("kms:events")
    if broken == "wrong type":
        store.redis.set("kms:events", "x")
    else:
        store.redis.xadd("kms:events", {"a": "b"}, id=f"{2**64 - 1}-{2**64 - 1}")

    store.finish(claim, "failed", "nothing")

    assert store.redis.zscore("kms:open", claim.accepted.job_id) is None
    assert store.redis.zscore("kms:ended", claim.accepted.job_id)
    assert store.get(claim.accepted.job_id, TENANT).state == "failed"
    events = cast("list[tuple[bytes, dict[bytes, bytes]]]", store.redis.xrange("kms:events"))
    assert [fields[b"type"] for _, fields in events] == [b"kms.job.failed"]


# -- keys of a wrong type that many jobs use -------------------------------------------------------------

QUOTA: Final = replace(LONG, tenant_open={TENANT: 10}, tenant_spool_bytes={TENANT: 10_000})
LISTS: Final = ("open", "ended", "dead", "tenants", "workers", "events")
OF_TENANTS: Final = ("tenant", "open", "spooled", "running", "large-waiting")
OF_WORKERS: Final = ("busy", "large", "large-begun", "large-refused")
SHARED: Final = (
    *LISTS,
    *(f"{name}:{TENANT}" for name in OF_TENANTS),
    *(f"{name}:w1" for name in OF_WORKERS),
)


def wrong(store: JobStore, key: str) -> None:
    """Put another type at this key: a list, which no key of jobs is."""
    store.redis.delete(key)
    store.redis.rpush(key, "junk")


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_key_of_a_wrong_type_stops_no_job(core: Core, name: str) -> None:
    """Whichever step meets it does its work, and jobs end as they would have."""
    store = store_of(core, replace(QUOTA, large_job_bytes=5, has_several_tenants=lambda: True), [])

    def meets_it() -> JobStore:
        wrong(store, f"kms:{name}")
        return store

    first, second = new_id(), new_id()
    for job_id in (first, second):
        meets_it().submit(accepted(job_id=job_id, size_bytes=7))
        claim = meets_it().claim(job_id, "w1/1")
        assert claim
        meets_it().renew(claim, {})
        meets_it().defer(claim, 0, counts=False)
        Reaper(meets_it(), core.worker_context.spool, "me").round()
        claim = meets_it().claim(job_id, "w1/1")
        assert claim
        meets_it().finish(claim, "failed", EXHAUSTED)
    meets_it().retry(first, TENANT, 60)
    meets_it().cancel(first, TENANT)

    assert store.get(first, TENANT).state == "cancelled"
    assert store.get(second, TENANT).error == EXHAUSTED
    assert store.page(TENANT, state=None, limit=10, before=None)
    assert store.dead(TENANT, 10) is not None
    assert survey(store).jobs == dict.fromkeys(("queued", "running", "committing"), 0)


def test_reading_alone_survives_shared_keys_of_a_wrong_type(core: Core) -> None:
    store = store_of(core, QUOTA, [])
    for name in SHARED:
        wrong(store, f"kms:{name}")

    assert store.page(TENANT, state=None, limit=10, before=None) == ([], None)
    assert (store.dead(TENANT, 10), store.due(), store.expired(), store.workers()) == ([], [], [], 0)
    assert (store.lists(), store.open_lists()) == (["kms:dead"], ["kms:open"])
    assert store.spool_room(TENANT) == 10_000
    store.worker_seen("w1", 1, QUEUES)
    assert store.workers() == 1


@pytest.mark.parametrize("junk", [b"nan", b"x", b"9" * 18, b"9" * 400])
def test_a_junk_sum_of_a_quota_stops_no_job(core: Core, junk: bytes) -> None:
    store = store_of(core, QUOTA, [])
    first = store.submit(accepted(size_bytes=6)).job_id
    store.redis.hset(f"kms:spooled:{TENANT}", "sum", junk)
    for job_id in (first, store.submit(accepted(size_bytes=6)).job_id):
        claim = store.claim(job_id, "w1")
        assert claim
        store.finish(claim, "failed", "decrypt_failed")
        assert store.get(job_id, TENANT).state == "failed"


def test_a_record_of_a_wrong_type_is_no_job_for_any_step(core: Core) -> None:
    store = store_of(core, LONG, [])
    claim = store.claim(store.submit(accepted()).job_id, "w1")
    assert claim
    job_id = claim.accepted.job_id
    steps: list[tuple[Callable[[], object], type[Exception]]] = [
        (lambda: store.get(job_id, TENANT), UnknownJob),
        (lambda: store.cancel(job_id, TENANT), UnknownJob),
        (lambda: store.retry(job_id, TENANT, 60), UnknownJob),
        (lambda: store.renew(claim, {}), LeaseLost),
        (lambda: store.committing(claim, COMMIT), LeaseLost),
        (lambda: store.finish(claim, "succeeded"), LeaseLost),
        (lambda: store.defer(claim, 0, counts=False), LeaseLost),
        (lambda: store.split(claim, [accepted()]), LeaseLost),
    ]
    for step, refusal in steps:
        wrong(store, f"kms:job:{job_id}")
        with pytest.raises(refusal):
            step()
    wrong(store, f"kms:job:{job_id}")
    assert store.claim(job_id, "w1") is None
    assert not store.redis.exists(f"kms:job:{job_id}")


# -- lists in a record ---------------------------------------------------------------------------------


def test_a_long_list_of_resources_does_not_stop_redis(core: Core) -> None:
    """Scripts look through it at each step, and Redis does nothing else meanwhile."""
    store = store_of(core, LONG, [])
    job_id = store.submit(accepted()).job_id
    forge(store, job_id, resources="a" * 100_000)

    claim = store.claim(job_id, "w1")
    assert claim
    store.renew(claim, {})
    store.finish(claim, "failed", EXHAUSTED)


def test_a_class_with_a_long_name_does_not_stop_redis(core: Core) -> None:
    store, name = store_of(core, LONG, []), "a" * 100_000
    store.redis.sadd(f"kms:sizes:kms.files:{TENANT}", name)
    store.redis.zadd(f"kms:ready:kms.files:{TENANT}:{name}", {"junk": 1})
    store.submit(accepted())

    while isinstance(found := store.next("w1/1", "kms.files", QUEUES, woken=False), str):
        pass
    assert found


def test_a_long_list_of_labels_is_one_of_a_bounded_length(core: Core) -> None:
    store = store_of(core, LONG, [])
    claim = store.claim(store.submit(accepted()).job_id, "w1")
    assert claim
    forge(store, claim.accepted.job_id, labels=" ".join(f"{number:04x}" for number in range(10_000)))
    store.finish(claim, "failed", EXHAUSTED)

    assert store.redis.exists("kms:label:0000")
    assert not store.redis.exists("kms:label:1000")


# -- the caretaker -------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS)
def test_a_junk_record_keeps_the_caretaker_from_no_other(core: Core, field: str) -> None:
    store = store_of(core, LONG, [])
    jobs = [store.submit(accepted()).job_id for _ in range(len(JUNK) + 1)]
    for job_id in jobs:
        assert store.claim(job_id, "w1")
    lapse(store)
    *victims, good = jobs
    for value, job_id in zip(JUNK, victims, strict=True):
        put(store, job_id, field, value)

    Reaper(store, core.worker_context.spool, "me").reap()

    assert store.get(good, TENANT).state == "queued"


def test_members_that_are_no_jobs_keep_the_caretaker_from_no_other(core: Core) -> None:
    store = store_of(core, LONG, [])
    good, ended = store.submit(accepted()).job_id, store.submit(accepted()).job_id
    assert store.claim(good, "w1")
    assert store.claim(ended, "w1")
    store.redis.hset(f"kms:job:{ended}", mapping={"state": "failed", "fence": "nan"})
    store.redis.zadd("kms:ended", {ended: 3})
    lapse(store)
    store.redis.set("kms:job:text", "no hash")
    for key in ("kms:leased", "kms:ended"):
        store.redis.zadd(key, {b"\xff": 1})
    store.redis.zadd("kms:leased", {"text": 2})

    for _ in range(2):
        Reaper(store, core.worker_context.spool, "me").reap()

    assert store.get(good, TENANT).state == "queued"
    assert record(store, ended)[b"purged"] == b"1"
    assert store.redis.zscore("kms:leased", "text") is None
    assert not store.redis.exists("kms:job:text")
    assert store.redis.zscore("kms:leased", b"\xff") is None


def test_a_redis_that_refuses_is_no_junk_record(core: Core) -> None:
    store = store_of(core, LONG, [])
    with pytest.raises(redis.ResponseError):
        store._reaped("id", redis.ResponseError("MISCONF Redis is configured to save"))  # noqa: SLF001
