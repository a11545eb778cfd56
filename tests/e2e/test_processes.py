"""``[kms.server] processes``: several of them answer at one port, and callers cannot tell."""

import os
import re
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx2 as httpx
import pytest

from support.service import CONTEXT, Service, b64
from support.waiting import until

SEALING = {"plaintext": b64(b"x"), "context": CONTEXT}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, module_redis: str) -> Iterator[Service]:
    with Service(
        tmp_path_factory.mktemp("pair"),
        "server.processes = 2\n",
        module_redis,
    ) as service:
        yield service.start("api")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def serving(service: Service) -> list[int]:
    """The processes that answer by now, not the leader."""
    return [pid for pid in children(service.pid("api")) if "kms_api.main" in command(pid)]


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def sealed(service: Service) -> float:
    """The operations that /metrics tells of, whichever process is asked."""
    text = service.http.get("/metrics").text
    found = re.findall(
        r'^kms_operation_duration_seconds_count\{.*operation="encrypt".*result="ok".*\} (\S+)$',
        text,
        re.MULTILINE,
    )
    return sum(map(float, found))


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_counts_are_of_all_processes_and_only_grow_also_when_one_is_killed(pair: Service) -> None:
    until(lambda: len(serving(pair)) == 2, "two processes")
    told = []
    for round_ in range(3):
        for _ in range(20):  # a connection each: any process may take it
            assert httpx.post(f"{pair.url}/api/v1/kms/encrypt", json=SEALING, timeout=60).status_code == 200
        told.append(sealed(pair))
        if round_ == 1:
            before = serving(pair)
            os.kill(before[0], signal.SIGKILL)
            until(lambda before=before: len(set(serving(pair)) - set(before)) == 1, "a new one")  # type: ignore[misc]
    assert [later - earlier for earlier, later in pairwise(told)] == [20, 20]
    files = sorted(path.name for path in (pair.state / "run").glob("metrics-*/counter_*"))
    assert files == ["counter_api-1.db", "counter_api-2.db"]


def test_programs_note_which_settings_they_read(tmp_path: Path, redis_url: str) -> None:
    """For the commands of this machine."""
    with Service(tmp_path, "server.processes = 2\n", redis_url) as service:
        note = service.state / "run/config"
        for name in ("api", "worker"):
            service.start(name)
            assert note.read_text() == f"{service.config}\n"
            note.unlink()


def test_a_stop_ends_all_and_a_killed_leader_leaves_nobody(tmp_path: Path, redis_url: str) -> None:
    with Service(tmp_path, "server.processes = 2\n", redis_url) as service:
        service.start("api")
        until(lambda: len(serving(service)) == 2, "two processes")
        pids = serving(service)
        assert service.stop("api") == 0
        assert all(map(ended, pids))

        service.start("api")
        until(lambda: len(serving(service)) == 2, "two processes again")
        pids = serving(service)
        os.kill(service.pid("api"), signal.SIGKILL)
        until(lambda: all(map(ended, pids)), "nobody serves for a leader who is dead")


def test_a_wrong_configuration_ends_the_leader_too(tmp_path: Path) -> None:
    service = Service(tmp_path, "server.processes = 2\n", "redis://127.0.0.1:1/0")
    service.config.write_text(
        service.config.read_text() + '[kms.age]\nprivate_key_path = "/nonexistent/key"\n'
    )

    assert "/nonexistent/key" in service.refusal("api", KMS_STATE_DIR=str(tmp_path / "none"))


def test_processes_end_with_a_worker_that_is_killed_while_it_starts_them(
    tmp_path: Path, redis_url: str
) -> None:
    """Each holds the pipes of the others open, so none would read the end of its own."""
    with Service(tmp_path, "[kms.jobs]\nconcurrency = 2\n", redis_url) as service:
        service.spawn("worker")
        until(lambda: len(service.pool_pids()) == 2, "they are there", poll_s=0.001)
        pids = service.pool_pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        os.kill(service.pid("worker"), signal.SIGKILL)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

        until(lambda: all(map(ended, pids)), "both have ended")
