"""Two API processes and two workers with state of their own: one Redis, one bucket, no shared path."""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from kms_protocol import wire
from support import object_stores
from support.blob_stores import PREFIX
from support.object_stores import S3Proxy, SeenRequest, TestBucket
from support.service import CANARY, CONTEXT, Json, Service, b64, unb64
from support.waiting import until

MIB = 1024 * 1024
RIGHTS = 'read = ["in/", "out/"]\nwrite = ["out/"]\n'


@dataclass(frozen=True)
class Hosts:
    """The hosts: ``front`` takes jobs, ``back`` gives results, two others work."""

    front: Service
    back: Service
    workers: tuple[Service, Service]
    bucket: TestBucket
    s3_proxy: S3Proxy
    """The way of jobs to the bucket; that of the spool is another."""

    @property
    def blobs(self) -> set[str]:
        return {key for key in self.bucket.keys() if key.startswith(PREFIX)}  # noqa: SIM118 -- no dict


def spool_settings(bucket: TestBucket, secret: Path) -> str:
    secret.write_text(object_stores.SECRET)
    secret.chmod(0o600)
    return (
        f'[kms.jobs.spool_bucket]\nurl = "s3://{bucket.name}/{PREFIX}"\nendpoint = "{bucket.store.url}"\n'
        f'allow_http = true\naccess_key_id = "{object_stores.ACCESS_KEY}"\nsecret_key_file = "{secret}"\n'
    )


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, module_redis: str) -> Iterator[Hosts]:
    bucket = object_stores.weed().new()
    made: list[Service] = []
    with ExitStack() as stack:
        s3_proxy = stack.enter_context(S3Proxy(bucket.store))
        for name in ("front", "back", "worker-1", "worker-2"):
            folder = tmp_path_factory.mktemp(name)
            settings = (
                "[kms.jobs]\nresult_ttl_s = 3600\ninput_grace_s = 1\nconcurrency = 1\nlease_s = 2\n"
                + spool_settings(bucket, folder / "spool-secret")
                + bucket.settings(folder / "secret", s3_proxy.url, job_rights=RIGHTS)
            )
            service = stack.enter_context(Service(folder, settings, module_redis))
            if made:
                service.take_keys(made[0])
            made.append(service.start("worker" if name.startswith("worker") else "api"))
        yield Hosts(made[0], made[1], (made[2], made[3]), bucket, s3_proxy)


def lines(hosts: Hosts, job_id: str) -> list[Json]:
    hosts.back.wait(job_id, "succeeded")
    return hosts.back.lines(job_id)


def done(hosts: Hosts, job_id: str) -> bytes:
    """The result of a job, by the API that did not take it."""
    hosts.back.wait(job_id, "succeeded")
    return hosts.back.result(job_id)


@pytest.mark.parametrize("size", [0, 1000, 300_000, 20 * MIB], ids=str)
def test_upload_is_encrypted_and_decrypted(hosts: Hosts, size: int) -> None:
    data = (CANARY.encode() + os.urandom(size))[:size]
    sealed = done(hosts, hosts.front.upload("encrypt", data, CONTEXT))
    chunks = (sealed[at : at + 70_000] for at in range(0, len(sealed), 70_000))

    assert done(hosts, hosts.front.upload("decrypt", chunks, CONTEXT)) == data
    assert CANARY.encode() not in sealed
    stored = {key: hosts.bucket.find(key) for key in hosts.blobs}
    assert [data for data in stored.values() if data], "the results are there"
    assert not [key for key, data in stored.items() if data and CANARY.encode() in data]


@pytest.mark.parametrize("count", [3, 2500], ids=["bulk", "parts"])
def test_bulk_job(hosts: Hosts, count: int) -> None:
    plain = [f"{CANARY} {number}" for number in range(count)]
    items = [{"plaintext": b64(text.encode())} for text in plain]
    job_id = hosts.front.submit({"kind": "encrypt", "items": items, "context": CONTEXT})
    sealed = [{"ciphertext": line["ciphertext"]} for line in lines(hosts, job_id)]

    again = hosts.front.submit({"kind": "decrypt", "items": sealed, "context": CONTEXT})

    assert [unb64(line["plaintext"]).decode() for line in lines(hosts, again)] == plain


def test_jobs_over_objects_and_over_a_pattern_of_them(hosts: Hosts) -> None:
    bucket, data = hosts.bucket, {f"{number}.txt": os.urandom(1000 * number) for number in range(4)}
    large = os.urandom(20 * MIB)
    bucket.put("in/large", large)
    for name, content in data.items():
        bucket.put(f"in/many/{name}", content)
    job = {"kind": "encrypt", "context": CONTEXT}
    one = hosts.front.submit(job | {"source": bucket.url("in/large"), "target": bucket.url("out/large")})
    many = hosts.front.submit(
        job | {"source": bucket.url("in/many/*.txt"), "target": bucket.url("out/many/")}
    )
    hosts.back.wait(one, "succeeded")
    assert len(lines(hosts, many)) == len(data)
    job = {"kind": "decrypt", "context": CONTEXT}
    names = [f"out/many/{name}.age" for name in data]
    backs = [
        hosts.front.submit(job | {"source": bucket.url(key), "target": bucket.url(f"out/back/{number}")})
        for number, key in enumerate([*names, "out/large"])
    ]

    for job_id in backs:
        hosts.back.wait(job_id, "succeeded")
    assert [bucket.get(f"out/back/{number}") for number in range(5)] == [*data.values(), large]
    assert bucket.uploads() == []
    assert not [key for key in hosts.blobs if "/multipart/" in key]


def test_results_that_are_released_leave_nothing(hosts: Hosts) -> None:
    job_id = hosts.front.upload("encrypt", os.urandom(200_000), CONTEXT)
    done(hosts, job_id)
    assert {key for key in hosts.blobs if job_id in key}

    hosts.back.http.delete(f"{wire.PREFIX}/jobs/{job_id}/result")

    until(lambda: not [key for key in hosts.blobs if job_id in key], "the bucket has nothing of the job")


def test_inputs_of_ended_jobs_go_and_no_host_has_a_spool_of_its_own(hosts: Hosts) -> None:
    items = [{"plaintext": b64(b"x" * 100)}] * 1500
    job_id = hosts.front.submit({"kind": "encrypt", "items": items, "context": CONTEXT})
    hosts.back.wait(job_id, "succeeded")

    until(lambda: not [key for key in hosts.blobs if key.endswith(f"{job_id}/items")], "the input is gone")
    assert len(lines(hosts, job_id)) == 1500
    for host in (hosts.front, hosts.back, *hosts.workers):
        assert not host.spool.exists()


def test_jobs_may_not_name_the_spool(hosts: Hosts) -> None:
    job = {"kind": "encrypt", "context": CONTEXT, "target": hosts.bucket.url("out/x")}
    answer = hosts.front.post("/jobs", job | {"source": hosts.bucket.url(f"{PREFIX}x")})

    assert (answer.status_code, answer.json()["code"]) == (403, "path_refused")


def test_upload_of_a_killed_worker_is_aborted_by_that_of_another_host(hosts: Hosts) -> None:
    """The note of a multipart upload is in the bucket, where any host finds it."""
    data, reached, opened = os.urandom(28 * MIB), threading.Event(), threading.Event()
    parts: list[SeenRequest] = []

    def gate(seen: SeenRequest) -> None:
        if seen.operation == "UploadPart":
            parts.append(seen)
        if len(parts) > 2 and not opened.is_set():
            reached.set()
            opened.wait(60)

    first, second = hosts.workers
    second.kill("worker")
    hosts.s3_proxy.intercept = gate
    source, target = hosts.bucket.put("in/killed", data), hosts.bucket.url("out/killed")
    job_id = hosts.front.submit({"kind": "encrypt", "source": source, "target": target, "context": CONTEXT})
    assert reached.wait(60)
    first.kill("worker")
    hosts.s3_proxy.intercept = lambda _: None
    opened.set()
    until(hosts.bucket.uploads, "the upload that the killed worker left")
    assert [key for key in hosts.blobs if key.startswith(f"{PREFIX}multipart/{job_id}")]

    second.start("worker")
    assert hosts.back.wait(job_id, "succeeded")["attempt"] == 2

    until(lambda: not hosts.bucket.uploads(), "the upload is aborted")
    assert not [key for key in hosts.blobs if "/multipart/" in key]
    first.start("worker")
