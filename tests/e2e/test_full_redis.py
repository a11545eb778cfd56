"""A Redis that gets full: jobs are refused before it is, those that were accepted run, and it recovers."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_core.jobs.store import job_redis
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import RedisFull
from support.core_jobs import run_job
from support.embedded_valkey import EmbeddedValkey
from support.job_options import job_options
from support.job_stores import TENANT, accepted, connect, reap
from support.service import Service, b64, check_problem, core_of
from support.waiting import until

ITEM = {"plaintext": b64(b"x")}
JOB = {"kind": "encrypt", "items": [ITEM]}
MEMORY_BYTES = 24 * 1024**2
CHUNK = b"x" * 65536


class Filled:
    """A Redis of 24 MiB, and what fills it."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self._count = 0

    def fill(self, part: float) -> None:
        """Fill it to so much; 1.0 leaves no room for the smallest write."""
        size = len(CHUNK)
        while size > 64:
            if part < 1.0 and self._stays_above(part):
                return
            try:
                self.client.set(f"kms:junk:{self._count}", CHUNK[:size])
                self._count += 1
            except redis.exceptions.OutOfMemoryError:
                size //= 2

    def _stays_above(self, part: float) -> bool:
        """Whether so much is used by more than the buffers of a moment."""
        for _ in range(3):
            if self.client.info("memory")["used_memory"] <= part * MEMORY_BYTES:
                return False
            time.sleep(0.1)
        return True

    def empty(self) -> None:
        for number in range(self._count):
            self.client.delete(f"kms:junk:{number}")


@pytest.fixture
def valkey_url(tmp_path: Path) -> Iterator[str]:
    valkey = EmbeddedValkey(tmp_path / "valkey", options=("--maxmemory", str(MEMORY_BYTES)))
    try:
        yield valkey.start().url
    finally:
        valkey.stop()


@pytest.fixture
def filled(valkey_url: str) -> Filled:
    return Filled(connect(valkey_url))


# -- as seen over HTTP


def test_jobs_are_refused_by_code_before_it_is_full_those_accepted_run_and_it_recovers(
    tmp_path: Path, valkey_url: str, filled: Filled
) -> None:
    with Service(tmp_path / "install", "[kms.jobs]\nlease_s = 2\n", valkey_url) as service:
        service.start("api")
        queued = [service.submit(JOB) for _ in range(5)] + [
            service.submit({"kind": "encrypt", "items": [ITEM] * 600})
        ]
        filled.fill(job_redis.FULL + 0.01)

        for answer in (service.post("/jobs", JOB), service.post("/files/encrypt", content=bytes(100_000))):
            check_problem(answer, 503, "redis_full")
            assert "retry-after" in answer.headers
        folders = {path.partition("/")[0] for path in service.spooled()}
        assert folders - {"multipart"} == set(queued)
        until(lambda: service.http.get("/readyz").json()["jobs"] == "full", "readiness to tell")
        assert service.http.get("/readyz").status_code == 200
        assert service.decrypt(service.encrypt(b"single calls work")) == b"single calls work"
        assert "redis_full" in service.degraded
        assert 'kms_redis_ok{what="writes"} 0.0' in service.http.get("/metrics").text
        service.start("worker")
        for job_id in queued:
            service.wait(job_id, "succeeded")
        check_problem(service.post("/jobs", JOB), 503, "redis_full")
        filled.empty()

        until(lambda: service.http.get("/readyz").json()["jobs"] == "available", "readiness to tell")
        service.wait(service.submit(JOB), "succeeded")


# -- without any memory left: others may use the same Redis


@pytest.fixture
def own(tmp_path: Path, valkey_url: str) -> Core:
    return core_of(Service(tmp_path / "core", "[kms.jobs]\nlease_s = 2\n", valkey_url))


def bulk(core: Core, count: int = 1) -> str:
    options = job_options(Principal("local"), "encrypt", Context())
    items = [wire.JobItem(plaintext=b"x")] * count
    return core.submitter.items(options, items).job_id


def test_small_blobs_rest_in_redis_while_half_of_it_is_free(own: Core, filled: Filled) -> None:
    store = own.worker_context.store
    store.ping(write=True)
    assert store.has_room
    filled.fill(0.55)

    store.ping(write=True)

    assert not store.has_room


def test_nothing_of_a_refused_job_is_left(own: Core, filled: Filled) -> None:
    """Redis fills up between the check and the submission."""
    spool = own.worker_context.spool
    filled.fill(1.0)

    with pytest.raises(RedisFull):
        bulk(own)
    assert list(spool.folders(-1)) == []


def test_jobs_run_end_are_cancelled_released_and_purged(own: Core, filled: Filled) -> None:
    store, spool = own.worker_context.store, own.worker_context.spool
    job_id, withdrawn, purged = bulk(own), bulk(own), bulk(own)
    run_job(purged, own.worker_context, "w1")
    filled.client.zadd("kms:ended", {purged: 1.0}, xx=True)  # its time has come
    filled.fill(1.0)

    run_job(job_id, own.worker_context, "w1")
    assert store.cancel(withdrawn, TENANT).state == "cancelled"
    assert store.get(job_id, TENANT).state == "succeeded"
    store.release(store.get(job_id, TENANT))
    reap(store, spool)
    kept = [each for each in (job_id, withdrawn, purged) if filled.client.exists(f"kms:blobs:{each}")]
    assert kept == [withdrawn]
    with pytest.raises(RedisFull):
        store.submit(accepted())


def test_job_in_parts_waits_for_room_without_losing_an_attempt(own: Core, filled: Filled) -> None:
    store = own.worker_context.store
    job_id = bulk(own, 600)
    filled.fill(1.0)
    run_job(job_id, own.worker_context, "w1")

    assert (store.get(job_id, TENANT).state, store.get(job_id, TENANT).attempt) == ("queued", 0)
    filled.empty()
    store.redis.hset(f"kms:job:{job_id}", "not_before", 0)
    run_job(job_id, own.worker_context, "w1")
    assert store.get(job_id, TENANT).parts == 2


def test_redis_without_a_bound_has_room_for_small_blobs_up_to_half_of_an_assumed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    valkey = EmbeddedValkey(tmp_path / "valkey", options=("--maxmemory", "0"))
    try:
        store = core_of(Service(tmp_path / "core", redis=valkey.start().url)).worker_context.store
        store.ping(write=True)
        assert store.has_room

        monkeypatch.setattr(job_redis, "UNBOUNDED", 1024**2)
        store.ping(write=True)
        assert not store.has_room
    finally:
        valkey.stop()
