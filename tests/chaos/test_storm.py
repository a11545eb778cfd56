"""The storm: short always; ``KMS_STORM=long`` for a thousand jobs, ``KMS_STORM_SEED`` to have one again."""

import os
import secrets
from pathlib import Path
from typing import Final

import pytest

from chaos import storm

IS_LONG: Final = os.environ.get("KMS_STORM") == "long"
PLAN: Final = storm.LONG if IS_LONG else storm.SHORT


@pytest.mark.timeout(3600 if IS_LONG else 300)
def test_every_accepted_job_ends_once_whatever_dies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int(os.environ.get("KMS_STORM_SEED") or secrets.randbelow(1_000_000))
    with capsys.disabled():
        print(f"\nstorm: seed {seed}")  # noqa: T201 -- a failure must be repeatable

    verdict = storm.run(tmp_path, PLAN, seed)

    with capsys.disabled():
        print(f"storm: {verdict.row()}\nstorm: ends {dict(verdict.ends)}, glimpses {verdict.glimpses}")  # noqa: T201
    assert not verdict.faults, "\n".join(verdict.faults[:40])
    assert verdict.jobs == PLAN.jobs
