"""The backend of each kind, for the laws."""

from pathlib import Path

import pytest

from kms_core.backends import Backend
from support.contract.rigs import MAKERS, Rig


def _marked(name: str) -> object:
    marks = [pytest.mark.cosmian] if name.startswith("cosmian") else []
    return pytest.param(MAKERS[name], id=name, marks=marks)


@pytest.fixture(params=map(_marked, MAKERS))
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    made: Rig = request.param(tmp_path)
    return made


@pytest.fixture
def backend(rig: Rig) -> Backend:
    return rig.backend
