"""The storm: short, or a thousand jobs for each of three seeds; ``KMS_STORM_SEED`` repeats one."""

import os
import secrets
from pathlib import Path
from typing import Final

import pytest

from support.chaos import storm
from support.long_form import IS_LONG, RUNS

PLAN: Final = storm.LONG if IS_LONG else storm.SHORT


@pytest.mark.timeout(3600 if IS_LONG else 600)
@pytest.mark.parametrize("number", RUNS)
def test_every_accepted_job_ends_once_whatever_dies(
    tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int(os.environ.get("KMS_STORM_SEED") or secrets.randbelow(1_000_000)) + number
    with capsys.disabled():
        print(f"\nstorm: seed {seed}")  # noqa: T201 -- a failure must be repeatable

    verdict = storm.run(tmp_path, PLAN, seed)

    with capsys.disabled():
        exits = dict(verdict.unexpected_exits)
        print(f"storm: {verdict.row()}\nstorm: exits {exits}, glimpses {verdict.glimpses}")  # noqa: T201
    assert not verdict.violations, "\n".join(verdict.violations[:40])
    assert verdict.jobs == PLAN.jobs
    assert verdict.interrupted >= PLAN.min_interrupted
