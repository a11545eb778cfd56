"""The watchdog of a worker: a worker that lives and takes nothing leaves with 70, and no other does."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from kms_worker.watchdog import EXIT_IDLE
from support.service import Service
from support.waiting import until

PATIENCE_S: Final = 0.4
PROGRAM: Final = f"""
import itertools, time
from kms_protocol.errors import JobsUnavailable
from kms_worker.watchdog import Watchdog

def gone():
    raise JobsUnavailable

def shaky(looks=itertools.count()):
    if next(looks) == 0:
        raise ValueError
    return True

idle = itertools.cycle([{PATIENCE_S} + 1, 0.0])  # it takes something every other time
Watchdog({PATIENCE_S}, lambda: CAN_TAKE, lambda: IDLE_S).start()
time.sleep(LIVES_S)
"""
LEAVES_S: Final = 60.0
STAYS_S: Final = 6 * PATIENCE_S


def ends_with(can_take: str, idle_s: str, lives_s: float) -> int:
    """The exit code of a process with a watchdog, which would end with 0 after ``lives_s`` seconds."""
    text = PROGRAM.replace("CAN_TAKE", can_take).replace("IDLE_S", idle_s).replace("LIVES_S", str(lives_s))
    return subprocess.run([sys.executable, "-c", text], check=False, capture_output=True).returncode


def test_a_worker_that_takes_nothing_leaves_to_be_started_anew() -> None:
    assert ends_with("True", str(PATIENCE_S + 1), LEAVES_S) == 70
    assert ends_with("True", "float('inf')", LEAVES_S) == 70
    assert ends_with("shaky()", str(PATIENCE_S + 1), LEAVES_S) == 70  # a look that fails is not the last


def test_a_worker_stays_that_works_or_has_nothing_to_take() -> None:
    cases = {
        "busy": ("True", "0.0"),
        "busy now and then": ("True", "next(idle)"),
        "nothing to take": ("False", str(PATIENCE_S + 1)),
        "no broker": ("gone()", str(PATIENCE_S + 1)),
        "no Redis": ("True", "gone()"),
    }
    with ThreadPoolExecutor(2) as pool:
        ends = pool.map(lambda case: ends_with(case[0], case[1], STAYS_S), cases.values())

    assert dict(zip(cases, ends, strict=True)) == dict.fromkeys(cases, 0)


def test_a_worker_whose_processes_stand_still_leaves(tmp_path: Path, redis_url: str) -> None:
    with Service(tmp_path, "[kms.jobs]\nconcurrency = 1\n", redis_url) as service:
        service.constants = {"kms_core.jobs.execution.attendance.PATIENCE_S": 1}
        service.start()
        service.signal_pool(signal.SIGSTOP)
        service.submit({"kind": "encrypt", "items": [{"plaintext": ""}]})

        until(lambda: "worker.takes_nothing" in service.output("worker"), "it leaves")
        assert service.stop("worker") == EXIT_IDLE
