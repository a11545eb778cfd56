"""The whole service on Redis as operators run it: TLS under their own authority, access lists, Sentinel."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kms_core.jobs.spec import QUEUES
from kms_core.jobs.store.heartbeats import worker_seen
from kms_protocol.errors import JobsUnavailable
from support.job_stores import LASTING_LEASES, TENANT, accepted, claimed, store_of
from support.redis_servers import Server, all_ended, sentinel, server
from support.service import Service, b64, check_problem, core_of
from support.waiting import until
from support.webhooks import LocalhostTls, make_localhost_tls

SETTINGS = '[kms.redis]\nca_file = "{}"\n[kms.jobs]\nlease_s = 2\n'
JOB = {"kind": "encrypt", "items": [{"plaintext": b64(b"x")}] * 3}


@pytest.fixture(name="authority")
def an_authority(tmp_path: Path) -> LocalhostTls:
    return make_localhost_tls(tmp_path)


@pytest.fixture(name="tls")
def a_server(tmp_path: Path, authority: LocalhostTls) -> Iterator[Server]:
    with server(tmp_path / "redis", authority) as running:
        yield running


def test_jobs_run_over_tls_as_a_user_of_an_access_list(
    tmp_path: Path, authority: LocalhostTls, tls: Server
) -> None:
    with Service(tmp_path / "kms", SETTINGS.format(authority.ca_file), tls.url()) as service:
        service.start()

        job = service.wait(service.submit(JOB), "succeeded")
        until(lambda: service.get("/status").json()["workers"] == 1, "the worker is seen")
        status = service.get("/status").json()
    assert job["progress"]["items_done"] == 3
    assert (status["degraded"], status["queue_depth"]) == ([], 0)


def test_a_full_redis_ends_jobs_and_takes_no_new_ones(
    tmp_path: Path, authority: LocalhostTls, tls: Server
) -> None:
    with Service(tmp_path / "kms", SETTINGS.format(authority.ca_file), tls.url()) as service:
        service.start("api")
        store = store_of(core_of(service), LASTING_LEASES)
        running, queued, other = claimed(store), store.submit(accepted()), store.submit(accepted())
        tls.admin().config_set("maxmemory", 1)
        with pytest.raises(JobsUnavailable):
            store.submit(accepted())
        check_problem(service.post("/jobs", JOB), 503, "redis_full")
        worker_seen(store, "w", 1, QUEUES)
        store.renew(running, {"items_done": 1})
        store.finish(running, "succeeded")
        assert store.cancel(queued.job_id, TENANT).state == "cancelled"
        store.purged(queued.job_id)

        tls.admin().config_set("maxmemory", 0)
        assert store.get(running.accepted.job_id, TENANT).state == "succeeded"
        assert store.claim(other.job_id, "w/1")


@pytest.mark.parametrize("wrong", ["authority", "password", "name"])
def test_server_that_cannot_be_trusted_or_entered_is_no_redis(
    tmp_path: Path, authority: LocalhostTls, tls: Server, wrong: str
) -> None:
    url, ca_file = tls.url(), authority.ca_file
    if wrong == "authority":
        (tmp_path / "other").mkdir()
        ca_file = make_localhost_tls(tmp_path / "other").ca_file
    elif wrong == "password":
        url = tls.url(password="guessed")
    else:
        url = url.replace("@localhost", "@127.0.0.1")  # its certificate is for localhost alone
    with Service(tmp_path / "kms", SETTINGS.format(ca_file), url) as service:
        service.start("api")

        check_problem(service.post("/jobs", JOB), 503, "jobs_unavailable")
        assert service.decrypt(service.encrypt(b"no need for Redis")) == b"no need for Redis"
        assert "redis" in service.get("/status").json()["degraded"]


def test_jobs_go_on_after_sentinel_has_changed_the_master(
    tmp_path: Path, authority: LocalhostTls, tls: Server
) -> None:
    with (
        server(tmp_path / "replica", authority, master=tls.port) as replica,
        sentinel(tmp_path / "sentinel", authority, tls.port) as watcher,
    ):
        login = tls.url().removeprefix("rediss://").partition("@")[0]
        options = "master=mymaster&sentinel_password=sentinel"
        url = f"sentinels://{login}@localhost:{watcher.port}/0?{options}"
        until(lambda: tls.admin().info("replication")["connected_slaves"] == 1, "the replica follows")
        with Service(tmp_path / "kms", SETTINGS.format(authority.ca_file), url) as service:
            service.start()
            before = service.submit(JOB)
            service.wait(before, "succeeded")
            tls.admin().wait(1, 5000)

            tls.process.kill()
            until(lambda: replica.admin().info("replication")["role"] == "master", "another master")
            until(lambda: service.post("/jobs", JOB).status_code == 202, "a job is accepted")
            until(lambda: all_ended(service), "what was accepted ends")

            assert service.job(before)["state"] == "succeeded"
            assert replica.admin().exists(f"kms:job:{before}")
