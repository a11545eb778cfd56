"""Workers that are killed in the middle: every job ends once, as it would have without."""

import filecmp
import os
import signal
import socket
import time
from collections import Counter
from pathlib import Path

from kms_core.jobs.store.store import JobStore
from kms_protocol.wire import ENDED, PREFIX
from support.job_stores import events
from support.service import Service, Supervised, core_of
from support.waiting import until

SETTINGS = "[kms.jobs]\nlease_s = 2\n"
LARGE = 96 * 1024 * 1024


def store_of(service: Service) -> JobStore:
    return core_of(service).worker_context.store


def temporary(service: Service) -> list[Path]:
    return list(service.files.glob(".kms-*"))


def url(service: Service, name: str) -> str:
    return f"file://{service.files}/{name}"


def until_writing(service: Service) -> None:
    """Until a worker writes a target; polled quickly, or it would be done."""
    until(lambda: temporary(service), lambda: service.output("worker")[-3000:], poll_s=0.001)


def successes(store: JobStore) -> Counter[str]:
    """How often each job was told to have succeeded."""
    return Counter(event["subject"] for event in events(store) if event["type"] == "kms.job.succeeded")


def large_ciphertext(service: Service) -> None:
    (service.files / "large").write_bytes(os.urandom(LARGE))
    job = {"kind": "encrypt", "source": url(service, "large"), "target": url(service, "large.age")}
    service.wait(service.submit(job), "succeeded")


def came_back(service: Service) -> bool:
    """Whether the file that was opened is the one that was sealed."""
    return filecmp.cmp(service.files / "large", service.files / "back", shallow=False)


def test_decryption_outlives_its_process_and_its_worker(tmp_path: Path) -> None:
    with Service(tmp_path, SETTINGS) as service:
        service.start()
        large_ciphertext(service)
        job = {"kind": "decrypt", "source": url(service, "large.age"), "target": url(service, "back")}
        job_id = service.submit(job)

        until_writing(service)
        service.signal_pool(signal.SIGKILL)
        until(lambda: store_of(service).get(job_id, "default").fence == 2, "another attempt")
        service.kill("worker")
        service.start("worker")

        service.wait(job_id, "succeeded")
        ended = store_of(service).get(job_id, "default")
        assert (ended.past[0].how, ended.past[0].cause) == ("lease_lost", "signal_9")
        assert ended.past[0].worker != ended.worker
        assert ended.fence >= 2
        assert came_back(service)
        assert {path.name for path in service.files.iterdir()} == {"large", "large.age", "back"}
        assert successes(store_of(service))[job_id] == 1


def test_worker_whose_pool_is_killed_at_its_start_makes_another(tmp_path: Path) -> None:
    with Service(tmp_path, SETTINGS) as service:
        service.start("api")
        job_id = service.submit({"kind": "encrypt", "items": [{"plaintext": ""}]})
        service.spawn("worker")
        first = service.pid("worker")
        until(service.pool_pids, "the pool is there")
        service.signal_pool(signal.SIGKILL)

        service.wait(job_id, "succeeded")
        assert service.pid("worker") == first
        assert service.pool_pids()


def test_job_that_kills_every_worker_becomes_a_dead_letter(tmp_path: Path) -> None:
    with Service(tmp_path, SETTINGS + "attempts = 2\n") as service:
        service.start()
        large_ciphertext(service)
        job = {"kind": "decrypt", "source": url(service, "large.age"), "target": url(service, "back")}
        job_id = service.submit(job)
        for _ in range(2):
            until_writing(service)
            service.signal_pool(signal.SIGKILL)
            for path in temporary(service):
                path.unlink()

        ended = service.wait(job_id, "failed")
        assert (ended["error"]["code"], ended["attempt"]) == ("attempts_exhausted", 2)
        assert [letter["job_id"] for letter in service.get("/jobs/dead").json()["jobs"]] == [job_id]
        assert not (service.files / "back").exists()

        service.post(f"/jobs/{job_id}/retry")
        service.wait(job_id, "succeeded")
        assert came_back(service)


def test_tree_outlives_many_kills_and_each_file_is_done_once(tmp_path: Path) -> None:
    names = [f"f{number:03}" for number in range(900)]
    with Supervised(tmp_path, SETTINGS) as service:
        (service.files / "in").mkdir()
        for name in names:
            (service.files / "in" / name).write_bytes(name.encode())
        tree = {"kind": "encrypt", "source": url(service, "in/*"), "target": url(service, "out/")}
        job_id = service.submit(tree)
        out = service.files / "out"
        for at in (100, 300, 500):
            until(lambda at=at: out.exists() and len(list(out.iterdir())) > at, f"{at} files are done")  # type: ignore[misc]
            if at == 300:
                service.kill("worker")
            else:
                service.signal_pool(signal.SIGKILL)

        job = service.wait(job_id, "succeeded")
        assert job["progress"] == job["progress"] | {"items_done": 900, "items_failed": 0}
        assert {path.name for path in out.iterdir()} == {f"{name}.age" for name in names}
        lines = service.lines(job_id)
        assert [line for line in lines if "error" in line] == []
        assert successes(store_of(service))[job_id] == 1
        for name in names[::90]:
            assert service.decrypt((out / f"{name}.age").read_bytes(), None) == name.encode()


def test_upload_of_a_killed_api_is_swept(tmp_path: Path) -> None:
    with Service(tmp_path, SETTINGS) as service:
        service.start("api")
        head = f"POST {PREFIX}/files/encrypt HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500000\r\n\r\n"
        with socket.create_connection(("127.0.0.1", service.port)) as peer:
            peer.sendall(head.encode() + bytes(100_000))
            until(service.spooled, "the upload has begun")
            service.kill("api")
        past = time.time() - 2 * 3600
        for path in service.spool.iterdir():
            os.utime(path, (past, past))

        service.start()

        until(lambda: service.spooled() == [], "the orphan is swept")
        assert service.wait(service.upload("encrypt", b"x"))["state"] in ENDED
