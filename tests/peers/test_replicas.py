"""Jobs on a Redis whose replicas are behind: nobody is told of what a fail-over takes back."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx
import pytest

from kms_core.auth.policy import Principal
from kms_core.jobs.storage.spool import ITEMS
from kms_protocol.context import Context
from kms_protocol.errors import RedisReadOnly
from kms_protocol.wire import ENDED
from support.job_options import job_options
from support.long_form import IS_LONG, RUNS
from support.redis_servers import Server, sentinel, server
from support.service import Json, Service, b64, check_problem, core_of, unb64
from support.tcp_proxy import LaggingProxy
from support.waiting import until
from support.webhooks import SECRET, make_localhost_tls, receiving

WAITING = "[kms.redis]\nwait_replicas = 1\nwait_ms = {}\n[kms.jobs]\nlease_s = 2\n"
JOB = {"kind": "encrypt", "items": [{"plaintext": b64(b"x")}] * 3}
FAR_S = 60.0
LAG_S = 1.5
GRACE_S = 5
FAILING_OVER = 4_000 if IS_LONG else 200


@dataclass
class ReplicatedRedis:
    """A master, and a replica that is as far behind as the relay holds it."""

    master: Server
    replica: Server
    relay: LaggingProxy

    def catches_up(self) -> None:
        """Let the replica have all, and hold nothing any more: what the relay holds is sent again."""
        self.relay.hold(0.0)
        self.relay.cut()
        self.relay.mend()
        until(lambda: self.master.admin().wait(1, 500) == 1, "the replica has all")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[ReplicatedRedis]:
    with ExitStack() as stack:
        master = stack.enter_context(server(tmp_path / "master", None))
        relay = LaggingProxy(master.port, 0.0)
        stack.callback(relay.cut)
        replica = stack.enter_context(server(tmp_path / "replica", None, master=relay.port))
        until(lambda: master.admin().info("replication")["connected_slaves"] == 1, "the replica follows")
        until(lambda: master.admin().wait(1, 500) == 1, "the replica has all")
        yield ReplicatedRedis(master, replica, relay)


def a_service(folder: Path, pair: ReplicatedRedis, wait_ms: int = 300, more: str = "") -> Service:
    return Service(folder / "kms", WAITING.format(wait_ms) + more, pair.master.url())


def test_jobs_run_where_a_replica_follows(tmp_path: Path, pair: ReplicatedRedis) -> None:
    with a_service(tmp_path, pair, 3000) as service:
        service.start()
        job_id = service.submit(JOB)
        service.wait(job_id, "succeeded")

        assert pair.replica.admin().exists(f"kms:job:{job_id}")
        assert "redis.unconfirmed" not in service.output()


def test_job_that_no_replica_has_is_taken_back(tmp_path: Path, pair: ReplicatedRedis) -> None:
    with a_service(tmp_path, pair) as service:
        service.start("api")
        before = names(pair.master)
        pair.relay.hold(FAR_S)
        key = {"Idempotency-Key": "payroll-7"}

        taken_back = {submitted(service, key) for _ in range(2)}
        for job_id in taken_back:
            check_problem(service.get(f"/jobs/{job_id}"), 404, "unknown_job")
        sums = {b"kms:spooled:default", b"kms:held:default"}
        left = {
            b"kms:audit:anchors",
            b"kms:events",
            b"kms:inputs",
            b"kms:tenants",
            b"kms:probed",
            b"kms:room",
            b"kms:kms.bulk",
        } | sums
        assert names(pair.master) - before <= left
        assert {float(pair.master.admin().hget(name, "sum") or 0) for name in sums} == {0}
        pair.catches_up()
        answer = service.post("/jobs", JOB, headers=key)
        assert answer.status_code == 202, answer.text
        again = service.post("/jobs", JOB, headers=key)

        assert again.json()["job_id"] == answer.json()["job_id"]
        assert answer.json()["job_id"] not in taken_back
        service.start("worker")
        service.wait(answer.json()["job_id"], "succeeded")
        assert [job["job_id"] for job in service.get("/jobs").json()["jobs"]] == [answer.json()["job_id"]]


def submitted(service: Service, key: dict[str, str]) -> str:
    """The id of a job that is not acknowledged."""
    answer = service.post("/jobs", JOB, headers=key)
    check_problem(answer, 503, "durability_unconfirmed")
    return str(answer.json()["job_id"])


def test_job_that_has_begun_is_found_by_its_key(tmp_path: Path, pair: ReplicatedRedis) -> None:
    with a_service(tmp_path, pair, 1500) as service:
        service.start()
        service.wait(service.submit(JOB), "succeeded")
        pair.relay.hold(FAR_S)
        key = {"Idempotency-Key": "payroll-8"}

        answer = service.post("/jobs", JOB, headers=key)
        check_problem(answer, 503, "durability_unconfirmed")
        begun = answer.json()["job_id"]
        service.wait(begun, "succeeded")
        check_problem(service.post("/jobs", JOB, headers=key), 503, "durability_unconfirmed")
        pair.catches_up()
        answer = service.post("/jobs", JOB, headers=key)

        assert (answer.status_code, answer.json()["job_id"]) == (202, begun)
        assert len(service.result(begun).splitlines()) == 3


def test_upload_that_no_replica_has_leaves_its_input_for_a_while(
    tmp_path: Path, pair: ReplicatedRedis
) -> None:
    """After a fail-over to a replica that has the record after all, the job can run."""
    with a_service(tmp_path, pair) as service:
        service.start("api")
        pair.relay.hold(FAR_S)

        answer = service.post("/files/encrypt", content=bytes(20_000))

        check_problem(answer, 503, "durability_unconfirmed")
        assert f"{answer.json()['job_id']}/upload" in service.spooled()


@pytest.mark.parametrize("source", ["one", "*"])
def test_commit_that_no_replica_has_puts_nothing_in_place(
    tmp_path: Path, pair: ReplicatedRedis, source: str
) -> None:
    with a_service(tmp_path, pair) as service:
        (service.files / "in").mkdir()
        (service.files / "in" / "one").write_bytes(b"secret")
        (service.files / "out").mkdir()
        target = service.files / "out" / ("one.age" if source == "*" else "one")
        named = service.files / "out" / ("" if source == "*" else "one")
        job = {"kind": "encrypt", "source": f"file://{service.files}/in/{source}"}
        service.start("api")
        job_id = service.submit(job | {"target": f"file://{named}{'/' if source == '*' else ''}"})
        pair.relay.hold(FAR_S)
        service.start("worker")

        until(lambda: service.output("worker").count("redis.unconfirmed") >= 3, "two attempts to commit")
        assert not target.exists()
        assert service.job(job_id)["state"] in {"queued", "running", "committing"}
        pair.catches_up()
        ended = service.wait(job_id, "succeeded")

        assert ended["attempt"] == 1
        assert service.decrypt(target.read_bytes(), None) == b"secret"
        assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_end_that_no_replica_has_stands_and_its_event_waits(tmp_path: Path, pair: ReplicatedRedis) -> None:
    authority = make_localhost_tls(tmp_path)
    (tmp_path / "hook").write_bytes(SECRET)
    (tmp_path / "hook").chmod(0o600)
    with receiving(authority) as receiver:
        hook = (
            f'[kms.jobs.endpoints.ci]\nurl = "{receiver.url()}"\nsecret_file = "{tmp_path}/hook"\n'
            f'allow_private = true\nca_file = "{authority.ca_file}"\n'
        )
        with a_service(tmp_path, pair, more=hook) as service:
            service.start("api")
            job_id = service.submit(JOB | {"callback": "ci"})
            pair.relay.hold(FAR_S)
            service.start("worker")
            service.wait(job_id, "succeeded")
            assert len(service.result(job_id).splitlines()) == 3
            seen = service.output("worker").count("redis.unconfirmed")
            until(lambda: service.output("worker").count("redis.unconfirmed") > seen + 2, "events were held")
            assert receiver.requests == []

            pair.catches_up()
            until(lambda: len(receiver.requests) == 1, "the event is sent")


def test_cancel_is_repeated_until_a_replica_has_it(tmp_path: Path, pair: ReplicatedRedis) -> None:
    with a_service(tmp_path, pair) as service:
        service.start("api")
        job_id = service.submit(JOB)
        pair.relay.hold(FAR_S)
        check_problem(service.post(f"/jobs/{job_id}/cancel"), 503, "durability_unconfirmed")

        pair.catches_up()
        answer = service.post(f"/jobs/{job_id}/cancel")
        assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")


def names(found: Server) -> set[bytes]:
    return {name for name in found.admin().scan_iter("kms:*") if b"usage" not in name}


# -- a server that cannot do it --------------------------------------------------------------------------


def refusal(folder: Path, url: str, name: str = "api", more: str = "") -> str:
    """What a program says that does not start."""
    return Service(folder / "kms", f"[kms.redis]\nwait_replicas = 1\n{more}", url).refusal(name)


@pytest.mark.parametrize("name", ["api", "worker"])
def test_server_without_a_file_is_refused(tmp_path: Path, name: str) -> None:
    with server(tmp_path / "redis", None, appends=False) as found:
        text = refusal(tmp_path, found.url(), name)

    assert "[kms.redis] wait_replicas needs a server with" in text
    assert "appendonly yes" in text


def test_server_without_the_command_is_refused(tmp_path: Path) -> None:
    authority = make_localhost_tls(tmp_path)
    with server(tmp_path / "redis", authority) as found:
        version = tuple(map(int, found.admin().info("server")["redis_version"].split(".")[:2]))
        if version >= (7, 2):
            found.admin().acl_setuser("kms", commands=["-waitaof"])
        text = refusal(tmp_path, found.url(), more=f'ca_file = "{authority.ca_file}"\n')

    assert "WAITAOF (Redis 7.2 or Valkey)" in text


def test_replica_without_a_file_is_refused(tmp_path: Path) -> None:
    with (
        server(tmp_path / "master", None) as master,
        server(tmp_path / "replica", None, master=master.port, appends=False),
    ):
        until(lambda: master.admin().info("replication")["connected_slaves"] == 1, "the replica follows")
        until(lambda: master.admin().wait(1, 500) == 1, "the replica has all")

        assert "keeps no append-only file: set appendonly yes" in refusal(tmp_path, master.url())


def test_replica_that_is_away_does_not_stop_the_start(tmp_path: Path) -> None:
    with (
        server(tmp_path / "redis", None) as found,
        Service(tmp_path / "kms", WAITING.format(100), found.url()) as service,
    ):
        service.start("api")
        check_problem(service.post("/jobs", JOB), 503, "durability_unconfirmed")
        assert "kms_redis_unconfirmed_total 1.0" in service.http.get("/metrics").text
        assert service.decrypt(service.encrypt(b"no need for Redis")) == b"no need for Redis"


def test_input_of_a_submission_that_redis_refuses_is_removed(tmp_path: Path) -> None:
    """The master loses its replicas while an upload arrives."""
    with server(tmp_path / "redis", None) as found:
        core = core_of(Service(tmp_path / "kms", "", found.url()))
        spool = core.worker_context.spool
        upload = core.submitter.receive_upload(job_options(Principal("local"), "encrypt", Context()), 0)
        next(upload)
        upload.send((memoryview(b"x" * 100_000), True))
        assert list(spool.folders(-1)) != []

        found.admin().config_set("min-replicas-to-write", 1)
        with pytest.raises(RedisReadOnly):
            upload.send((memoryview(b"x"), False))
        assert list(spool.folders(-1)) == []


# -- fail-over -------------------------------------------------------------------------------------------


class Load:
    """Threads that submit jobs with keys of their own, and ask again after a 503."""

    def __init__(self, service: Service, count: int, senders: int) -> None:
        self.acknowledged: dict[int, str] = {}
        self._service = service
        self._numbers = iter(range(count))
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(senders)]
        for thread in self._threads:
            thread.start()

    def wait(self, count: int) -> None:
        """Wait until so many jobs are acknowledged: each takes a sender as long as the replica is behind."""
        for some in (*range(0, count, 400), count):
            until(lambda some=some: len(self.acknowledged) >= some, f"{some} are acknowledged")  # type: ignore[misc]  # mypy#12557

    def join(self) -> None:
        for thread in self._threads:
            thread.join(300)
            assert not thread.is_alive()

    def _work(self) -> None:
        with httpx.Client(base_url=self._service.url, timeout=60, trust_env=False) as http:
            while True:
                with self._lock:
                    number = next(self._numbers, None)
                if number is None:
                    return
                self.acknowledged[number] = self._accepted(http, number)

    @staticmethod
    def _accepted(http: httpx.Client, number: int) -> str:
        body = {"kind": "encrypt", "items": [{"plaintext": b64(b"%d" % number)}]}
        ends = time.monotonic() + 120
        while time.monotonic() < ends:
            answer = http.post("/api/v1/kms/jobs", json=body, headers={"Idempotency-Key": f"n{number}"})
            if answer.status_code == 202:
                return str(answer.json()["job_id"])
            assert answer.status_code == 503, answer.text
            time.sleep(0.2)
        raise AssertionError("no job was accepted for two minutes")


def failed_over(folder: Path, count: int, settings: str) -> tuple[Load, Service, ExitStack]:
    """Submit jobs while the master dies and a replica that is 1.5 s behind takes its place."""
    stack = ExitStack()
    master = stack.enter_context(server(folder / "master", None))
    relay = LaggingProxy(master.port, LAG_S)
    stack.callback(relay.cut)
    second = stack.enter_context(server(folder / "second", None, master=relay.port))
    watcher = stack.enter_context(sentinel(folder / "sentinel", None, master.port, failover_timeout_s=600))
    until(lambda: master.admin().info("replication")["connected_slaves"] == 1, "the replica follows")
    until(lambda: watcher.admin("sentinel").sentinel_slaves("mymaster"), "the Sentinel knows the replica")
    login = master.url().removeprefix("redis://").partition("@")[0]
    url = f"sentinel://{login}@localhost:{watcher.port}/0?master=mymaster&sentinel_password=sentinel"
    service = stack.enter_context(Service(folder / "kms", settings, url)).start()
    load = Load(service, count, 32)
    load.wait(count // 2)
    master.process.kill()
    until(lambda: second.admin().info("replication")["role"] == "master", "another master")
    stack.enter_context(server(folder / "third", None, master=second.port))
    load.join()
    assert service.pool_pids(), "the worker outlives it"
    return load, service, stack


def lost(service: Service, load: Load) -> list[str]:
    """Acknowledged jobs that are unknown, or do not succeed with their result."""
    found = load.acknowledged.items()
    return [f"{number} {job_id}" for number, job_id in found if _is_lost(service, number, job_id)]


def _is_lost(service: Service, number: int, job_id: str) -> bool:
    answer = service.get(f"/jobs/{job_id}")
    if answer.status_code == 404:
        return True
    found = answer.json() if answer.json()["state"] in ENDED else service.wait(job_id)
    if found["state"] != "succeeded":
        return True
    line: Json = json.loads(service.result(job_id))
    return service.decrypt(unb64(line["ciphertext"]), None) != b"%d" % number


def inputs_left(service: Service, load: Load) -> set[str]:
    """Acknowledged jobs whose input is in the spool."""
    return {path.parent.name for path in service.spool.glob(f"*/{ITEMS}")} & {*load.acknowledged.values()}


@pytest.mark.timeout(1800 if IS_LONG else 180)
@pytest.mark.parametrize("number", RUNS)
def test_no_acknowledged_job_is_lost_by_a_fail_over(tmp_path: Path, number: int) -> None:
    """A job that had succeeded, and has no result after it, would be among the lost ones."""
    settings = f"{WAITING.format(6000)}input_grace_s = {GRACE_S}\n"
    load, service, stack = failed_over(tmp_path, FAILING_OVER, settings)
    with stack:
        assert len(load.acknowledged) == FAILING_OVER, f"run {number}"
        assert lost(service, load) == []
        until(lambda: not inputs_left(service, load), lambda: f"inputs go: {inputs_left(service, load)}")


def test_jobs_are_lost_by_a_fail_over_that_nobody_waits_for(tmp_path: Path) -> None:
    """Shows that the test above can fail."""
    load, service, stack = failed_over(tmp_path, 400, "[kms.jobs]\nlease_s = 2\n")
    with stack:
        assert len(load.acknowledged) == 400
        assert lost(service, load)
