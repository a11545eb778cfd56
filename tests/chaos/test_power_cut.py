"""The power is cut while the service works: each job that was acknowledged is whole afterwards.

The long form has eight times as many jobs, and cuts the power three times.
"""

import shutil
from pathlib import Path

import pytest

from support.long_form import IS_LONG, RUNS
from support.power_cut import SETTINGS, OnDiskImage, OnSyncedDisk, jobs_lost_to_power_cut
from support.service import Service, b64, check_problem
from support.waiting import until

FILES = 96 if IS_LONG else 12  # at most 100 jobs are awaited
KINDS = [kind for kind in ("ext4", "xfs") if kind == "ext4" or shutil.which(f"mkfs.{kind}")]
WRITE = SETTINGS + 'durability = "write"\n'


@pytest.mark.timeout(1800 if IS_LONG else 300)
@pytest.mark.parametrize("number", RUNS)
def test_no_acknowledged_job_is_lost_where_only_synced_bytes_are_left(tmp_path: Path, number: int) -> None:
    with OnSyncedDisk(tmp_path, SETTINGS) as service:
        assert jobs_lost_to_power_cut(service, FILES) == [], f"run {number}"


def test_jobs_are_lost_where_the_spool_is_only_written(tmp_path: Path) -> None:
    """Shows that the test above can fail."""
    with OnSyncedDisk(tmp_path, WRITE) as service:
        assert jobs_lost_to_power_cut(service, 12)


@pytest.mark.timeout(1800 if IS_LONG else 300)
@pytest.mark.parametrize("number", RUNS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_acknowledged_job_is_lost_on_a_real_file_system(tmp_path: Path, kind: str, number: int) -> None:
    with OnDiskImage(tmp_path, SETTINGS, kind) as service:
        assert jobs_lost_to_power_cut(service, 2 * FILES) == [], f"run {number}"


@pytest.mark.parametrize("kind", KINDS)
def test_jobs_are_lost_on_a_real_file_system_if_the_spool_is_only_written(tmp_path: Path, kind: str) -> None:
    """Shows that the test above can fail."""
    with OnDiskImage(tmp_path, WRITE, kind) as service:
        assert jobs_lost_to_power_cut(service, 24)


@pytest.fixture
def recorded_service(tmp_path: Path) -> OnSyncedDisk:
    return OnSyncedDisk(tmp_path, SETTINGS)


def test_disk_that_cannot_sync_refuses_jobs_and_keeps_nothing_of_them(recorded_service: OnSyncedDisk) -> None:
    with recorded_service as service:
        service.start("api")
        service.disk.broken.touch()
        for answer in (
            service.post("/files/encrypt", content=b"x" * 100_000),
            service.post("/jobs", {"kind": "encrypt", "items": [{"plaintext": b64(bytes(20_000))}]}),
        ):
            check_problem(answer, 503, "spool_unavailable")
            assert int(answer.headers["retry-after"]) > 0
            assert "send it again" in answer.json()["detail"]
        assert service.spooled() == []
        assert service.get("/jobs").json()["jobs"] == []
        assert "spool.disk_failed" in service.output("api")

        service.disk.broken.unlink()
        service.start("worker")
        works(service)


def works(service: Service) -> None:
    job_id = service.upload("encrypt", b"again")
    service.wait(job_id, "succeeded")
    assert service.decrypt(service.result(job_id), None) == b"again"


def test_result_that_cannot_be_synced_waits_for_the_disk(recorded_service: OnSyncedDisk) -> None:
    with recorded_service as service:
        service.start("api")
        job_id = service.upload("encrypt", b"x" * 100_000)
        service.disk.broken.touch()
        service.start("worker")
        until(lambda: "spool.disk_failed" in service.output("worker"), "the result cannot be synced")
        assert service.job(job_id)["state"] in {"queued", "running"}

        service.disk.broken.unlink()
        ended = service.wait(job_id, "succeeded")
        assert ended["attempt"] == 1
        assert service.decrypt(service.result(job_id), None) == b"x" * 100_000
