"""The backend of each kind, for the laws."""

from pathlib import Path

import pytest

from contract.rigs import MAKERS, Rig
from kms_core.backends import Backend


@pytest.fixture(params=MAKERS.values(), ids=list(MAKERS))
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    made: Rig = request.param(tmp_path)
    return made


@pytest.fixture
def backend(rig: Rig) -> Backend:
    return rig.backend
