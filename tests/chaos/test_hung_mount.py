"""A file system that hangs takes the processes that work on it, in the open, and nothing else.

The long form has many more jobs on it and beside it, while it hangs for a minute.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from support.frozen_disk import FrozenDisk, frozen_disk, state_of
from support.long_form import IS_LONG, RUNS
from support.service import Service, b64
from support.waiting import until

HUNG: Final = 40 if IS_LONG else 3
OTHERS: Final = 400 if IS_LONG else 1
SETTINGS: Final = """
[kms.jobs]
roots = {roots}
spool_dir = "{spool}"
stall_s = {stall_s}
stop_s = 2
lease_s = 5
concurrency = 2
"""
DEFAULT: Final = 300  # stall_s


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FrozenDisk]:
    with frozen_disk(tmp_path / "disk") as found:
        yield found


@contextmanager
def installed(tmp_path: Path, disk: FrozenDisk, spool: Path, stall_s: int) -> Iterator[Service]:
    files = tmp_path / "other"
    files.mkdir()
    roots = [files] if disk.folder in spool.parents else [files, disk.folder]
    settings = SETTINGS.format(roots=[*map(str, roots)], spool=spool, stall_s=stall_s)
    with Service(tmp_path, settings) as service:
        service.files = files
        for folder in roots:
            for number in range(max(HUNG, OTHERS, 8)):
                (folder / f"{number}").write_bytes(b"content")
        yield service.start()


@pytest.fixture
def install(tmp_path: Path, disk: FrozenDisk) -> Iterator[Service]:
    with installed(tmp_path, disk, tmp_path / "spool", 3) as found:
        yield found


def submit(service: Service, folder: Path, number: int) -> str:
    source, target = (f"file://{folder}/{number}{end}" for end in ("", ".age"))
    return service.submit({"kind": "encrypt", "source": source, "target": target})


def degraded(service: Service) -> list[str]:
    found: list[str] = service.http.get("/api/v1/kms/status").json()["degraded"]
    return found


@pytest.mark.timeout(1800 if IS_LONG else 180)
@pytest.mark.parametrize("run", RUNS)
def test_a_hung_mount_takes_no_other_queue_with_it(install: Service, disk: FrozenDisk, run: int) -> None:
    """More jobs on it than processes: all others go on, and those on it are done once it is back."""
    with disk.frozen():
        hung = [submit(install, disk.folder, number) for number in range(HUNG)]
        until(lambda: len(stuck(install)) == 2, "both processes hang")
        before = stuck(install)
        for number in range(OTHERS):
            other = submit(install, install.files, number)
            items = install.submit({"kind": "encrypt", "items": [{"plaintext": b64(b"x")}]})
            assert install.wait(items)["state"] == "succeeded", f"run {run}"
            assert install.wait(other)["state"] == "succeeded", f"run {run}"
        until(lambda: "worker_processes" in degraded(install), "status says so")
        assert set(before) <= set(stuck(install)), "they cannot be ended, and hold nothing else"
        assert "kms_worker_stuck_processes 2.0" in install.http.get("/metrics").text
        output = install.output("worker")
        assert output.count("worker.process_stuck") == 2
        assert "job.stalled" in output
        of_worker = install.http.get(f"http://127.0.0.1:{install.port + 1}/metrics").text
        assert 'kms_job_resumes_total{reason="stalled"} 2.0' in of_worker
        assert len(stuck(install)) == 2, "no third process was lost to it"
        for job_id in hung:
            assert install.job(job_id)["state"] == "queued"

    for job_id in hung:
        found = install.wait(job_id)
        assert (found["state"], found["attempt"] <= 3) == ("succeeded", True)
    until(lambda: degraded(install) == [], "all is well")
    until(lambda: len(install.pool_pids()) == 2, "as many processes as before")


def others_go_on(service: Service) -> None:
    """Some jobs over files elsewhere and over items, one after another."""
    for number in range(3):
        other = submit(service, service.files, number)
        items = service.submit({"kind": "encrypt", "items": [{"plaintext": b64(b"x")}]})
        assert service.wait(items)["state"] == "succeeded"
        assert service.wait(other)["state"] == "succeeded"


def test_others_go_on_long_before_an_attempt_counts_as_hanging(tmp_path: Path, disk: FrozenDisk) -> None:
    """By default that takes five minutes."""
    with installed(tmp_path, disk, tmp_path / "spool", DEFAULT) as install:
        with disk.frozen():
            hung = [submit(install, disk.folder, number) for number in range(8)]
            until(lambda: len(stuck(install)) == 2, "both processes hang")
            others_go_on(install)
            until(lambda: "worker_processes" in degraded(install), "status says so")
            assert len(stuck(install)) == 2, "no third process was lost to it"
        for job_id in hung:
            assert install.wait(job_id)["state"] == "succeeded"
        until(lambda: degraded(install) == [], "all is well")
        until(lambda: len(install.pool_pids()) == 2, "as many processes as before")


def test_a_hung_spool_takes_no_job_with_it_that_does_not_need_it(tmp_path: Path, disk: FrozenDisk) -> None:
    """Neither by a process of the pool, nor by the cleanup of what has ended."""
    with installed(tmp_path, disk, disk.folder / "spool", DEFAULT) as install:
        ended = install.upload("encrypt", bytes(100_000))
        install.wait(ended, "succeeded")
        install.signal_pool(signal.SIGSTOP)
        uploads = [install.upload("encrypt", bytes(100_000)) for _ in range(6)]
        with disk.frozen():
            install.signal_pool(signal.SIGCONT)
            until(lambda: len(stuck(install)) == 2, "both processes hang")
            others_go_on(install)
            assert "workers" not in degraded(install)
        for job_id in uploads:
            assert install.wait(job_id)["state"] == "succeeded"
        until(lambda: degraded(install) == [], "all is well")


def stuck(service: Service) -> list[int]:
    return [pid for pid in service.pool_pids() if state_of(pid) == "D"]


def test_cancel_and_run_by_hold_for_a_job_that_hangs(install: Service, disk: FrozenDisk) -> None:
    with disk.frozen():
        job_id = submit(install, disk.folder, 0)
        until(lambda: stuck(install), "it hangs")

        answer = install.http.delete(f"/api/v1/kms/jobs/{job_id}").json()
        assert (answer["state"], answer["cancelling"]) == ("running", True)

        assert install.wait(job_id)["state"] == "cancelled"
    assert not (disk.folder / "0.age").exists()


def test_a_worker_whose_process_hangs_can_be_stopped(install: Service, disk: FrozenDisk) -> None:
    with disk.frozen():
        job_id = submit(install, disk.folder, 0)
        until(lambda: stuck(install), "it hangs")

        assert install.stop("worker") == 0

        assert install.job(job_id)["state"] == "queued"
    install.start("worker")
    assert install.wait(job_id)["state"] == "succeeded"
