"""The whole service on a Redis Cluster: all kinds of jobs, a fail-over of the node that holds their keys."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import redis

from kms_core.jobs.store.scripts import SCRIPTS
from support.embedded_valkey import EmbeddedValkey
from support.redis_clusters import Cluster, Node, cluster, standalone
from support.redis_servers import all_ended
from support.service import CONTEXT, PROGRAMS, Service, b64
from support.waiting import until

SETTINGS: Final = '[kms.redis]\nbroker_url = "{}"\n[kms.jobs]\nlease_s = 2\n'
JOB: Final = {"kind": "encrypt", "context": CONTEXT, "items": [{"plaintext": b64(b"x")}] * 3}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[str]:
    """Another Redis, for Celery."""
    (tmp_path / "broker").mkdir(mode=0o700)
    valkey = EmbeddedValkey(tmp_path / "broker")
    yield valkey.start().broker_url
    valkey.stop()


def submitted(service: Service) -> list[str]:
    """A job of each kind, and one in parts."""
    for name in ("one", "in/a", "in/b", "old/c"):
        (service.files / name).parent.mkdir(mode=0o700, exist_ok=True)
        (service.files / name).write_bytes(b"plain")
    files = service.files.as_uri()
    (service.files / "old/d.age").write_bytes(service.encrypt(b"older"))
    common = {"kind": "encrypt", "context": CONTEXT}
    many = [{"plaintext": b64(b"%d" % number)} for number in range(600)]
    return [
        service.submit(JOB),
        service.submit({**common, "items": many, "priority": "low"}),
        service.upload("encrypt", b"an upload", CONTEXT),
        service.submit({**common, "source": f"{files}/one", "target": f"{files}/one.age"}),
        service.submit({**common, "source": f"{files}/in/*", "target": f"{files}/out/"}),
        service.submit({**common, "kind": "rewrap", "source": f"{files}/old/*.age", "overwrite": True}),
    ]


def check_keys(found: Cluster) -> None:
    """All keys of the cluster carry the hash tag, and lie on one node."""
    assert found.holder.client.dbsize()
    for node in found.masters:
        keys: list[bytes] = node.client.keys("*")  # type: ignore[assignment]  # sync client
        assert all(key.startswith(b"{kms}:") for key in keys)
        assert node is found.holder or not keys


def test_one_node_runs_every_kind_of_job(tmp_path: Path, broker: str) -> None:
    with (
        cluster(tmp_path / "cluster", 1) as found,
        Service(tmp_path / "kms", SETTINGS.format(broker), found.url) as service,
    ):
        service.start()
        ids = submitted(service)

        for job_id in ids:
            service.wait(job_id, "succeeded")
        listed = [job["job_id"] for job in service.get("/jobs").json()["jobs"]]
        status = service.get("/status").json()

        assert len(service.result(ids[1]).splitlines()) == 600
        assert service.decrypt((service.files / "one.age").read_bytes()) == b"plain"
        assert set(ids) <= set(listed)
        assert (status["degraded"], status["queue_depth"]) == ([], 0)
        check_keys(found)
        told = service.run_kms("doctor", KMS_SERVICE_URL=service.url)
        assert "one node holds all keys of jobs: give it a replica" in told.stdout, told


def test_jobs_go_on_after_fail_overs_of_the_node_that_holds_the_keys(tmp_path: Path, broker: str) -> None:
    """An operator's, after which the old node says where the slot is now; and one of a killed node."""
    with (
        cluster(tmp_path / "cluster", 3, replica=True) as found,
        Service(tmp_path / "kms", SETTINGS.format(broker), found.url) as service,
    ):
        service.start()
        before = submitted(service)
        for job_id in before:
            service.wait(job_id, "succeeded")
        assert found.replica
        check_keys(found)
        replica = found.replica
        replica.ask("CLUSTER FAILOVER")
        until(lambda: _is_master(replica), "the replica has taken over")
        until(lambda: service.post("/jobs", JOB).status_code == 202, "a job is accepted by the new one")
        until(lambda: all_ended(service), "it has ended")
        until(lambda: found.holder.client.info("replication")["role"] == "slave", "the old node follows")

        found.replica.process.kill()
        until(lambda: service.post("/jobs", JOB).status_code == 202, "a job is accepted")
        until(lambda: all_ended(service), "what was accepted ends")

        assert _is_master(found.holder)
        assert [service.job(job_id)["state"] for job_id in before] == ["succeeded"] * len(before)


def _is_master(node: Node) -> bool:
    return bool(node.client.info("replication")["role"] == "master")


def refusal(folder: Path, name: str, url: str, broker_url: str) -> str:
    """What a process says that does not start because of these addresses."""
    service = Service(folder, "", "redis://127.0.0.1:1/0")
    service.config.write_text(f'[kms.redis]\nbroker_url = "{broker_url}"\n')
    return service.refusal(name, KMS_REDIS_URL=url)


@pytest.mark.parametrize("name", PROGRAMS)
def test_start_refuses_a_cluster_in_the_wrong_place(tmp_path: Path, name: str) -> None:
    no_broker = "a Redis Cluster cannot be the broker, since Celery uses none: name another Redis or RabbitMQ"
    with cluster(tmp_path / "cluster", 1) as found, standalone(tmp_path / "alone") as alone:
        plain, other = (f"redis://127.0.0.1:{node.port}/0" for node in (found.holder, alone))
        wrong = f"redis+cluster://127.0.0.1:{alone.port}"

        assert no_broker in refusal(tmp_path / "a", name, found.url, plain)
        assert "answers: write redis+cluster://" in refusal(tmp_path / "b", name, plain, other)
        assert "answers: write redis://" in refusal(tmp_path / "c", name, wrong, other)


def test_scripts_refuse_keys_of_another_slot(tmp_path: Path) -> None:
    """Even where one node has all slots: each script declares itself (``#!lua``)."""
    with cluster(tmp_path / "cluster", 1) as found:
        for name, text in SCRIPTS.items():
            keys, values = ["{kms}:a", "elsewhere", "{kms}:b", "{kms}:c"], ["a"] * 20
            with pytest.raises(redis.ResponseError, match=r"slot"):
                found.holder.client.eval(text, len(keys), *keys, *values)
            assert text.startswith("#!lua"), name
        derived = SCRIPTS["wake"].replace("return counts", "redis.call('GET', 'elsewhere') return counts")
        with pytest.raises(redis.ResponseError, match="slot"):
            found.holder.client.eval(derived, 1, "{kms}:a", "", "kms.bulk", "", "")
