"""Wake-ups that are too many, or none, or kept off: they cost a worker neither its memory nor its jobs."""

import os
import signal
from pathlib import Path

import pytest

from kms_core.jobs.store.wake_ups import encode_message, list_key
from support.service import Service, b64, core_of
from support.waiting import until

MANY = 100_000
TAKEN = 20_000
STEP = 5_000  # for one wait
MOST_MIB = 40
BIG = 4 << 30  # bytes: seconds of work, of which a moment is done


def memory_mib(pid: int) -> float:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


def test_a_hundred_thousand_wake_ups_fill_no_memory(tmp_path: Path) -> None:
    with Service(tmp_path) as service:
        service.start("api")
        job_id = service.submit({"kind": "encrypt", "items": [{"plaintext": b64(b"x")}]})
        store = core_of(service).worker_context.store
        for _ in range(MANY // 1000):
            store.redis.lpush(list_key("kms.bulk"), *[encode_message("kms.bulk")] * 1000)
        store.redis.lpush(list_key("kms.bulk"), b"no message", b"{}", b"\x00")
        service.start("worker")
        before = memory_mib(service.pid("worker"))

        service.wait(job_id, "succeeded")
        for left in range(MANY - STEP, MANY - TAKEN - 1, -STEP):
            until(lambda left=left: store.redis.llen(list_key("kms.bulk")) < left, f"{left} are left")  # type: ignore[misc]  # mypy#12557

        assert memory_mib(service.pid("worker")) - before < MOST_MIB
        after = service.submit({"kind": "encrypt", "items": [{"plaintext": b64(b"x")}]})
        service.wait(after, "succeeded")


def stopped_in_a_job(service: Service, job_id: str) -> int:
    """Start the worker, stop its process in the midst of the job, and return the process."""
    service.start("worker")
    until(lambda: service.job(job_id)["state"] == "running", "the job runs", poll_s=0.01)
    (pid,) = service.pool_pids()
    os.kill(pid, signal.SIGSTOP)
    assert service.job(job_id)["state"] == "running", "the file is too small"
    return pid


@pytest.mark.parametrize("what", ["process", "host"])
def test_jobs_are_taken_although_a_process_was_killed_in_its_job(tmp_path: Path, what: str) -> None:
    """Wake-ups that came while it ran were dropped; another one comes."""
    with Service(tmp_path, "[kms.jobs]\nlease_s = 600\nconcurrency = 1\n") as service:
        service.start("api")
        big = service.files / "big"
        with big.open("wb") as file:
            file.truncate(BIG)
        job = {"kind": "encrypt", "source": big.as_uri(), "target": f"{big.as_uri()}.age"}
        pid = stopped_in_a_job(service, service.submit(job))
        if what == "process":
            os.kill(pid, signal.SIGKILL)
        else:
            service.kill("worker")
            service.start("worker")

        small = service.submit({"kind": "encrypt", "items": [{"plaintext": b64(b"x")}]})
        service.wait(small, "succeeded")
