"""A port that is taken and a disk that is full: told as such, and nothing is left behind."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kms_core.programs.liveness import is_alive
from support.service import PROGRAMS, Service, b64, check_problem
from support.small_disk import small_disk
from support.waiting import until

MIB = 1024 * 1024


@pytest.mark.parametrize("port", ["api", "metrics"])
def test_taken_port(tmp_path: Path, port: str) -> None:
    with (
        Service(tmp_path) as service,
        socket.create_server(("127.0.0.1", service.port + (port == "metrics"))),
    ):
        if port == "api":
            argv = [sys.executable, "-m", PROGRAMS["api"]]
            done = subprocess.run(argv, env=service.environ, capture_output=True, text=True, check=False)

            assert done.returncode == 69
            assert f"port {service.port} cannot be taken" in done.stderr
            assert "ss -ltnp" in done.stderr
            return
        service.start("api")
        service.spawn("worker")

        job_id = service.submit({"kind": "encrypt", "items": [{"plaintext": ""}]})
        service.wait(job_id, "succeeded")
        assert "metrics.not_served" in service.output("worker")


@pytest.mark.parametrize("program", ["api", "worker"])
@pytest.mark.parametrize(
    "settings",
    [
        "nonsense = 1\n",
        '[kms.age]\nprivate_key_path = "/nonexistent/key"\n',
        '[kms.redis]\nurl = "nonsense"\n',
        '[kms.jobs]\nqueues = ["kms.bulk", "kms.video"]\n',
    ],
    ids=["unknown", "key", "redis", "queue"],
)
def test_wrong_configuration_does_not_start(tmp_path: Path, program: str, settings: str) -> None:
    service = Service(tmp_path)
    service.config.write_text(f"[kms]\n{settings}")

    told = service.refusal(program)

    errors = [line for line in told.splitlines() if '"memory.protected"' not in line]
    assert len(errors) == 1
    assert "Traceback" not in told
    assert not is_alive("127.0.0.1", service.port)


@pytest.mark.parametrize("program", ["api", "worker"])
@pytest.mark.parametrize("place", ["spool", "run"])
def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path, program: str, place: str) -> None:
    processes = 2 if place == "run" else 1  # of several each has a file of metrics
    server = f"[kms.server]\nprocesses = {processes}\n"
    service = Service(tmp_path, f'[kms.jobs]\nspool_dir = "{tmp_path}/spool"\n{server}')
    (tmp_path / "spool" if place == "spool" else service.state / "run").symlink_to("nowhere/below")
    argv = [sys.executable, "-P", "-m", PROGRAMS[program]]
    done = subprocess.run(argv, env=service.environ, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 1
    assert f"kms-{'service' if program == 'api' else 'worker'}: error: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Service]:
    """A service whose spool is a disk of 8 MiB."""
    with (
        small_disk(tmp_path / "disk", 8 * MIB) as disk,
        Service(tmp_path, f'[kms.jobs]\nspool_dir = "{disk}"\n') as service,
    ):
        service.spool = disk
        yield service.start()


def test_full_disk_is_told_and_nothing_is_left(small: Service) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield bytes(MIB)

    for body in (bytes(20 * MIB), pieces()):
        check_problem(small.post("/files/encrypt", content=body), 507, "spool_full")
        assert small.spooled() == []

    job_id = small.upload("encrypt", bytes(6 * MIB))
    small.wait(job_id, "succeeded")
    assert len(small.result(job_id)) > 6 * MIB


def fill(ballast: Path) -> None:
    """Write a file until its disk is full."""
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(MIB))


def test_accepted_jobs_wait_while_the_disk_is_full_and_none_fails(small: Service) -> None:
    small.stop("worker")
    jobs = [small.upload("encrypt", b"%d" % number * 20_000) for number in range(16)]
    jobs.append(small.submit({"kind": "encrypt", "items": [{"plaintext": b64(b"x")}] * 2_000}))
    fill(ballast := small.spool / "ballast")
    small.start("worker")
    until(lambda: small.output("worker").count("spool_full") >= len(jobs), "each job met it")
    check_problem(small.post("/files/encrypt", content=bytes(MIB)), 507, "spool_full")
    assert {small.job(job_id)["state"] for job_id in jobs} <= {"queued", "running"}

    ballast.unlink()
    for job_id in jobs:
        small.wait(job_id, "succeeded")
    assert b"error" not in small.result(jobs[-1])


def test_accepted_jobs_wait_while_the_disk_of_their_targets_is_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "state" / "files", 8 * MIB) as disk, Service(tmp_path) as service:
        service.start("api")
        (disk / "in").mkdir()
        for number in range(10):
            (disk / "in" / f"{number}").write_bytes(bytes(20_000))
        into = {"target": f"{(disk / 'out').as_uri()}/", "kind": "encrypt"}
        jobs = [
            service.submit({"source": f"{(disk / 'in').as_uri()}/*", **into}),
            service.submit({**into, "source": (disk / "in/1").as_uri(), "target": (disk / "1.age").as_uri()}),
        ]
        fill(ballast := disk / "ballast")
        service.start("worker")
        until(lambda: service.output("worker").count("spool_full") >= len(jobs), "each job met it")

        ballast.unlink()
        for job_id in jobs:
            service.wait(job_id, "succeeded")
        assert len(list((disk / "out").iterdir())) == 10
