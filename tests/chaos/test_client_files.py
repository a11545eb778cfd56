"""A program that encrypts files through the client and is killed, over restarts of the service."""

import os
import random
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Final, Self

import pytest

from kms_client import Client
from support import programs
from support.long_form import IS_LONG
from support.service import Service
from support.waiting import RealTime, until

FILES: Final = 20
SIZE_BYTES: Final = 20_000_000 if IS_LONG else 4_000_000
EVENTS: Final = ["kill"] * 2 + ["kill in writing"] * 2 + ["restart"] * 2
FLOW: Final = """
import sys
from pathlib import Path

from kms_client import Client

url, sources, targets = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
with Client(url, deadline_s=120) as kms:
    for source in sorted(sources.iterdir()):
        target = targets / f"{source.name}.age"
        if not target.exists():
            kms.encrypt_file(source, target, idempotency_key=f"flow-{source.name}")
        print(source.name, flush=True)
"""


class Flow:
    """The process of the program, which is started again after its death, as an engine does."""

    def __init__(self, *argv: str) -> None:
        self._argv = programs.tethered(sys.executable, "-c", FLOW, *argv)

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(self._argv, env=dict(os.environ), stdout=subprocess.DEVNULL)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def kill(self) -> None:
        self.__exit__()
        self.__enter__()


def written_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_no_file_is_cut_and_no_job_lost_or_doubled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kills come at any moment, and while a target is being written."""
    seed = int(os.environ.get("KMS_STORM_SEED") or secrets.randbelow(1_000_000))
    with capsys.disabled():
        print(f"\nfiles: seed {seed}")  # noqa: T201 -- a failure must be repeatable
    drawn = random.Random(seed)  # noqa: S311 -- repeatable, no secret
    sources, targets, opened = (tmp_path / name for name in ("sources", "targets", "opened"))
    for folder in (sources, targets, opened):
        folder.mkdir()
    for number in range(FILES):
        (sources / f"{number:02}").write_bytes(drawn.randbytes(SIZE_BYTES))
    counts = sorted(drawn.sample(range(FILES - 1), len(EVENTS)))

    with Service(tmp_path / "install", "[kms.jobs]\nlease_s = 2\n") as service:
        service.start()
        with Flow(service.url, str(sources), str(targets)) as flow:
            for count, event in zip(counts, drawn.sample(EVENTS, len(EVENTS)), strict=True):
                until(lambda count=count: len(list(targets.glob("*.age"))) >= count, "files", poll_s=0.01)  # type: ignore[misc]
                if event == "kill in writing":
                    seen = set(targets.iterdir())
                    until(lambda seen=seen: set(targets.iterdir()) - seen, "another", poll_s=0.0002)  # type: ignore[misc]
                else:
                    RealTime.sleep(drawn.uniform(0, 0.5))
                if event == "restart":
                    service.kill("api")
                    service.kill("worker")
                    service.start()
                else:
                    flow.kill()
            assert flow.process.wait(300) == 0

        with Client(service.url) as kms:
            jobs = kms.jobs(limit=1000).jobs
            for path in sources.iterdir():
                kms.decrypt_file(targets / f"{path.name}.age", opened / path.name)
    assert [job.state for job in jobs] == ["succeeded"] * FILES
    assert written_of(opened) == written_of(sources)
