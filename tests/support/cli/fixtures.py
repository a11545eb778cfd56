"""Services for the command to talk to: a stand-in with faults on order, and what ``kms up`` runs."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.contract_server import ContractServer, running
from support.ports import free_port
from support.programs import tied
from support.waiting import WAIT_S

BIN = Path(sys.executable).parent


@dataclass(frozen=True, slots=True)
class Place:
    """Where a service is."""

    url: str
    state_dir: Path


def environment(home: Path, **more: str) -> dict[str, str]:
    """What a command under test finds in its environment, and nothing else."""
    return {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(home), "LANG": "C.UTF-8", **more}


@pytest.fixture
def stand_in() -> Iterator[ContractServer]:
    with running() as service:
        yield service


@pytest.fixture(scope="session")
def real_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    home = tmp_path_factory.mktemp("real")
    port = free_port()
    command = tied(BIN / "kms", "up", "--state-dir", home / "state", "--port", port)
    with (home / "log").open("wb") as log:
        up = subprocess.Popen(command, env=environment(home), stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        ready = up.stdout.readline() if up.stdout else ""
        assert ready.startswith("kms: ready"), (home / "log").read_text()
        yield Place(f"http://127.0.0.1:{port}", home / "state")
    finally:
        up.send_signal(signal.SIGTERM)
        up.communicate(timeout=WAIT_S)
