"""Redis that takes no writes, a worker whose clock is a day off, a job of a later version, seen from outside.

A code or a line tells of each, and what to do. Nothing is lost, and all goes on when the state is over.
"""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from support.chaos.cluster import Clock
from support.job_stores import forge, record, resealed
from support.ports import free_port
from support.redis_servers import Server, server
from support.service import Json, Service, b64, check_problem, core_of
from support.waiting import until

JOB: Final[Json] = {"kind": "encrypt", "items": [{"plaintext": b64(b"x")}]}
SETTINGS: Final = "[kms.jobs]\nlease_s = 2\n"
DAY_S: Final = 86_400


def jobs_state(service: Service) -> str:
    return str(service.http.get("/readyz").json()["jobs"])


# -- Redis takes no writes -------------------------------------------------------------------------------


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Server]:
    with server(tmp_path / "redis", None) as found:
        yield found


class ReadOnly:
    """Makes a server a replica of one that is away, as a fail-over does that finds no other master."""

    def __init__(self, found: Server) -> None:
        self._admin = found.admin()

    def __enter__(self) -> None:
        self._admin.replicaof("localhost", str(free_port()))

    def __exit__(self, *_: object) -> None:
        self._admin.replicaof("no", "one")


def test_redis_that_takes_no_writes_is_told_by_code_and_loses_nothing(tmp_path: Path, redis: Server) -> None:
    with Service(tmp_path / "kms", SETTINGS, redis.url()) as service:
        service.start("api")
        queued = [service.submit(JOB) for _ in range(3)] + [service.upload("encrypt", bytes(100_000))]
        before = service.spooled()
        with ReadOnly(redis):
            for answer in (
                service.post("/jobs", JOB),
                service.post("/files/encrypt", content=bytes(100_000)),
                service.post(f"/jobs/{queued[0]}/cancel"),
            ):
                check_problem(answer, 503, "redis_read_only")
                assert int(answer.headers["retry-after"]) > 0
            assert service.spooled() == before, "nothing of what was refused is left"
            assert [service.job(job_id)["state"] for job_id in queued] == ["queued"] * 4
            until(lambda: jobs_state(service) == "read_only", "readiness tells")
            assert service.http.get("/readyz").status_code == 200
            assert "redis_read_only" in service.get("/status").json()["degraded"]
            assert service.decrypt(service.encrypt(b"single calls work")) == b"single calls work"

        until(lambda: jobs_state(service) == "available", "readiness tells")
        service.start("worker")
        for job_id in [*queued, service.submit(JOB)]:
            assert service.wait(job_id, "succeeded")["attempt"] == 1


def test_a_worker_outlives_a_redis_that_takes_no_writes(tmp_path: Path, redis: Server) -> None:
    """Its commands fail with an error of the server, on connections that stay."""
    with Service(tmp_path / "kms", SETTINGS, redis.url()) as service:
        service.start()
        service.wait(service.submit(JOB), "succeeded")
        worker = service.pid("worker")
        with ReadOnly(redis):
            until(lambda: service.get("/status").json()["workers"] == 0, "its heartbeats are not taken")

        until(lambda: jobs_state(service) == "available", "readiness tells")
        service.wait(service.submit(JOB), "succeeded")
        assert service.pid("worker") == worker
        assert service.http.get(f"http://127.0.0.1:{service.port + 1}/livez").status_code == 200


# -- a clock that is a day off -----------------------------------------------------------------------------


class Shifted(Service):
    """A service whose later processes have another clock."""

    clock: Clock | None = None

    @property
    def environ(self) -> dict[str, str]:
        return super().environ | (self.clock.environ if self.clock else {})


def in_seconds(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


@pytest.fixture
def shifted(tmp_path: Path) -> Iterator[Shifted]:
    """Its API has the right clock; a worker that is started has that of ``clock``."""
    with Shifted(tmp_path, SETTINGS) as service:
        service.start("api")
        service.clock = Clock(tmp_path)
        yield service


def test_a_worker_whose_clock_is_ahead_leaves_jobs_and_says_so(shifted: Shifted) -> None:
    assert shifted.clock
    shifted.clock.shift(DAY_S)
    shifted.start("worker")
    job_id = shifted.submit(JOB | {"run_by": in_seconds(600)})
    until(lambda: "job.clocks_apart" in shifted.output("worker"), "it says so")
    assert (shifted.job(job_id)["state"], shifted.job(job_id)["attempt"]) == ("queued", 0)

    shifted.clock.shift(0)

    assert shifted.wait(job_id, "succeeded")["attempt"] == 1


def test_a_worker_whose_clock_is_behind_starts_nothing_late(shifted: Shifted) -> None:
    assert shifted.clock
    late = shifted.submit(JOB | {"start_by": in_seconds(1)})
    good = shifted.submit(JOB)
    shifted.clock.shift(-DAY_S)
    time.sleep(1.1)
    shifted.start("worker")

    assert shifted.wait(late, "failed")["error"]["code"] == "not_started"
    shifted.wait(good, "succeeded")


# -- a job of a later version ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "changes", "feature"),
    [(2, {}, "record-2"), (1, {"needs": ["later-feature"]}, "later-feature")],
    ids=["version", "feature"],
)
def test_a_job_of_a_later_version_waits_in_the_open(
    tmp_path: Path, version: int, changes: dict[str, Any], feature: str
) -> None:
    with Service(tmp_path, SETTINGS) as service:
        service.start("api")
        later, good = service.submit(JOB), service.submit(JOB)
        store = core_of(service).worker_context.store
        written = record(store, later)[b"sealed"]
        forge(store, later, sealed=resealed(store, later, version=version, **changes))
        service.start("worker")

        service.wait(good, "succeeded")
        until(lambda: service.job(later).get("waits_for") == feature, "the job says what it waits for")
        assert (service.job(later)["state"], service.job(later)["attempt"]) == ("queued", 0)
        until(lambda: "jobs.wait_for_newer_workers" in service.output("worker"), "the worker says so")
        assert 'kms_jobs_in_state{state="for_newer_workers"} 1.0' in service.http.get("/metrics").text
        refused = service.get(f"/jobs/{later}/result")
        check_problem(refused, 404, "unknown_job")
        assert f"`{feature}`): ask that version" in refused.json()["detail"]

        forge(store, later, sealed=written)
        store.redis.hdel(f"kms:job:{later}", "needs")
        assert service.wait(later, "succeeded")["attempt"] == 1
