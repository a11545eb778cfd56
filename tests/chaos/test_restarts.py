"""Workers that are told to stop hand their jobs back: a deploy costs no job an attempt."""

import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from support.service import Service, b64, core_of
from support.waiting import until

SETTINGS = "[kms.jobs]\nlease_s = 600\nstop_s = 1\nattempts = 2\n"


@pytest.fixture
def install(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path, SETTINGS) as service:
        yield service.start()


def large_tree(service: Service, files: int) -> str:
    folder = service.files / "tree"
    folder.mkdir()
    for number in range(files):
        (folder / f"{number:04}").write_bytes(bytes(100))
    source, target = f"file://{folder}/*", f"file://{service.files}/out/"
    job = {"kind": "encrypt", "source": source, "target": target}
    return service.submit(job)


def restart(service: Service) -> None:
    """SIGTERM, which ends it within a minute: no lease of 600 s is waited for."""
    assert service.stop("worker") == 0
    service.start("worker")


def test_a_large_file_is_handed_back_at_each_restart(install: Service) -> None:
    """Up to four restarts, with two attempts: each would be one. The job may end before the last."""
    size = 4 * 1024 * 1024 * 1024  # bytes: more than a worker encrypts in the second it has to stop
    with (install.files / "large").open("wb") as file:
        file.truncate(size)
    source, target = (f"file://{install.files}/{name}" for name in ("large", "large.age"))
    job_id = install.submit({"kind": "encrypt", "source": source, "target": target})
    store = core_of(install).worker_context.store

    def at_work_or_ended(fence: int) -> bool:
        job = store.get(job_id, "default")
        return job.fence >= fence or job.ended

    for fence in range(1, 5):
        until(partial(at_work_or_ended, fence), "it is at work")
        if store.get(job_id, "default").ended:
            break
        restart(install)

    found = install.wait(job_id, "succeeded")
    assert found["attempt"] == 1
    assert install.output("worker").count("job.handed_back") >= 2, "restarts took the job from a worker"
    assert not list(install.files.glob(".kms-*")), "nothing is left of earlier attempts"


def test_a_rolling_restart_under_load_costs_no_attempt(install: Service) -> None:
    whole = large_tree(install, 2_000)
    jobs = [install.submit({"kind": "encrypt", "items": [{"plaintext": b64(b"x")}] * 20}) for _ in range(30)]
    for _ in range(3):
        restart(install)

    for job_id in jobs:
        assert install.wait(job_id, "succeeded")["attempt"] == 1
    found = install.wait(whole, "succeeded")
    assert found["progress"]["items_done"] == 2_000
    assert len(list((install.files / "out").iterdir())) == 2_000


def test_an_idle_worker_stops(install: Service) -> None:
    assert install.stop("worker") == 0
    assert "job.handed_back" not in install.output("worker")


@pytest.mark.parametrize("after_s", [0.0, 0.3, 0.6, 1.0])
def test_a_worker_that_is_stopped_while_it_starts_exits_cleanly(install: Service, after_s: float) -> None:
    assert install.stop("worker") == 0
    begun = install.output("worker").count("memory.protected")
    install.spawn("worker")
    until(lambda: install.output("worker").count("memory.protected") > begun, "it starts")
    time.sleep(after_s)

    assert install.stop("worker") == 0


LOST = """
import os, signal, sys
from kms_core.settings import lint
from kms_worker.main import main

class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass

def warn(loaded, real=lint.warn):
    Last()
    real(loaded)

lint.warn, sys.argv = warn, ["kms-worker"]
sys.exit(main())
"""


def test_a_signal_is_heard_that_came_in_a_finalizer(install: Service) -> None:
    """Python drops exceptions there, and with them the end that the handler asked for."""
    assert install.stop("worker") == 0
    argv = [sys.executable, "-P", "-c", LOST]

    done = subprocess.run(argv, env=install.environ, capture_output=True, text=True, check=False, timeout=60)

    assert "Exception ignored in: <function Last.__del__" in done.stderr
    assert "ready." in done.stderr, "it had started"
    assert done.returncode == 0
