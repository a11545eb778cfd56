"""The memory of a service at work: what protects it, and how much of it files take."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support import without_mlock
from support.service import Service
from support.waiting import answers, until


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory, module_redis: str) -> Iterator[Service]:
    """Two API processes and a worker of two."""
    folder = tmp_path_factory.mktemp("memory")
    settings = "jobs.concurrency = 2\nserver.processes = 2\n[kms.log]\nlevel = 'info'\nformat = 'json'\n"
    with Service(folder, settings, module_redis) as made:
        yield made.start()


def locked_kib(pid: int) -> int:
    try:
        found = re.search(r"^VmLck:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


@pytest.mark.skipif(not without_mlock.may_lock(), reason="memory cannot be locked here")
def test_every_process_of_a_server_locks_its_memory(install: Service) -> None:
    """Locks are not inherited: each of them has to ask, and so does a child that takes the place of one."""
    api, worker = install.pid("api"), install.pid("worker")
    until(lambda: len(install.pool_pids()) == 2, "the pool")
    everybody = [api, *install.pool_pids("api"), worker, *install.pool_pids()]
    assert len(everybody) == 6
    for pid in everybody:
        until(lambda pid=pid: locked_kib(pid) > 0, f"{pid} locks")  # type: ignore[misc]  # mypy#12557

    before = set(install.pool_pids())
    os.kill(min(before), signal.SIGKILL)
    until(lambda: len(set(install.pool_pids()) - before) == 1, "another child")
    (new,) = set(install.pool_pids()) - before
    until(lambda: locked_kib(new) > 0, "it locks")
    for name in ("api", "worker"):
        assert '"event":"memory.protected"' in re.sub(r"\s", "", install.output(name))


@pytest.mark.skipif(os.geteuid() != 0, reason="takes capabilities away")
def test_a_server_that_may_not_lock_says_so_and_works(tmp_path: Path, redis_url: str) -> None:
    settings = "[kms.log]\nlevel = 'info'\nformat = 'json'\n"
    with Service(tmp_path, settings, redis_url) as service, (tmp_path / "log").open("wb") as log:
        argv = without_mlock.words(sys.executable, "-P", "-m", "kms_api.main")
        with subprocess.Popen(argv, env=service.environ | {"KMS_REDIS_URL": redis_url}, stderr=log) as api:
            try:
                until(lambda: answers(f"{service.url}/livez"), "it answers")
                service.encrypt(b"x" * 10_000)
                assert locked_kib(api.pid) == 0
            finally:
                api.kill()
        said = (tmp_path / "log").read_text()
        (line,) = (line for line in said.splitlines() if "memory.protected" in line)
        assert '"limit"' in line
        assert "LimitMEMLOCK=infinity" in line


# -- as much for a large file as for one an eighth its size ------------------------------------------------

MIB: Final = 1024 * 1024
SMALL: Final = 64 * MIB
LARGE: Final = 512 * MIB
BOUND_BYTES: Final = 48 * MIB
"""A tenth of what the larger file has more: garbage collectors and thread pools are never quite alike."""


def pieces(size: int) -> Iterator[bytes]:
    yield from (bytes(MIB) for _ in range(size // MIB))


def peak_bytes(*pids: int) -> int:
    """The most memory that one of these processes had resident so far (proc(5), VmHWM)."""
    texts = (Path(f"/proc/{pid}/status").read_text() for pid in pids)
    lines = (line for text in texts for line in text.splitlines() if line.startswith("VmHWM:"))
    return max(int(line.split()[1]) * 1024 for line in lines)


def peaks(folder: Path, size: int) -> dict[str, int]:
    """Of API and worker after an upload, its result, and a job from file to file, of so many bytes."""
    folder.mkdir()
    with Service(folder) as service:
        service.start()
        upload = service.upload("encrypt", pieces(size))
        service.wait(upload, "succeeded")
        with service.http.stream("GET", f"/api/v1/kms/jobs/{upload}/result") as answer:
            assert sum(map(len, answer.iter_raw())) > size
        source, target = service.files / "in", service.files / "out"
        with source.open("wb") as file:
            file.truncate(size)
        job = {"kind": "encrypt", "source": source.as_uri(), "target": target.as_uri()}
        service.wait(service.submit(job), "succeeded")
        assert target.stat().st_size > size
        return {"api": peak_bytes(service.pid("api")), "worker": peak_bytes(*service.pool_pids())}


@pytest.mark.timeout(600)
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    small, large = peaks(tmp_path / "small", SMALL), peaks(tmp_path / "large", LARGE)

    assert {
        name: large[name] - small[name] for name in small if large[name] - small[name] > BOUND_BYTES
    } == {}
