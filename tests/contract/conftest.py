"""The backend of each kind, for the laws."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kms_core.backends import Backend
from kms_core.backends.cosmian.backend import CosmianCipher
from support.contract.cosmian_ciphers import ALICE, MALLORY, cipher_of, made
from support.contract.cosmian_double import CosmianDouble
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


@pytest.fixture
def double() -> Iterator[CosmianDouble]:
    with CosmianDouble() as made:
        yield made


@pytest.fixture
def cipher(double: CosmianDouble) -> CosmianCipher:
    """A key of the double with its first version."""
    return made(cipher_of(double))


@pytest.fixture
def shared() -> Iterator[CosmianDouble]:
    """A server of several users."""
    with CosmianDouble(users={ALICE: "alice", MALLORY: "mallory"}) as made:
        yield made
