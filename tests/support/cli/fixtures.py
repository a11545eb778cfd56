"""Services for the command to talk to: a stand-in with faults on order, and what ``kms up`` runs."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from support.contract_server import ContractServer, running
from support.ports import free_port
from support.programs import tethered
from support.waiting import WAIT_S

BIN = Path(sys.executable).parent
TIMEOUT_S: Final = 120


@dataclass(frozen=True, slots=True)
class RunningService:
    """Where a service is."""

    url: str
    state_dir: Path


def environment(home: Path, **more: str) -> dict[str, str]:
    """What a command under test finds in its environment, and nothing else."""
    return {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(home), "LANG": "C.UTF-8", **more}


def kms(
    folder: Path, *words: str, given: bytes = b"", **variables: str
) -> subprocess.CompletedProcess[bytes]:
    """Run ``kms`` in a folder that is also its home; its stdin and stdout are pipes."""
    return subprocess.run(
        [str(BIN / "kms"), *words],
        cwd=folder,
        env=environment(folder, **variables),
        input=given,
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@contextmanager
def running_up(
    log: Path,
    env: Mapping[str, str],
    *words: object,
    cwd: Path | None = None,
    program: Path = BIN / "kms",
) -> Iterator[subprocess.Popen[str]]:
    """``kms up`` until the end of the block, from the time when it is ready; ``log`` has what it says."""
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            tethered(program, "up", *words),
            cwd=cwd,
            env=env,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        ready = process.stdout.readline() if process.stdout else ""
        assert ready.startswith("kms: ready"), log.read_text()
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=WAIT_S)


@pytest.fixture
def stand_in() -> Iterator[ContractServer]:
    with running() as service:
        yield service


@pytest.fixture(scope="session")
def real_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    home = tmp_path_factory.mktemp("real")
    port = free_port()
    words = ("--state-dir", home / "state", "--port", port)
    with running_up(home / "log", environment(home), *words):
        yield RunningService(f"http://127.0.0.1:{port}", home / "state")
