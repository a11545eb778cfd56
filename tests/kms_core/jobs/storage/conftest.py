"""A spool key, for tests of each place where a spool may rest; and a root for files of jobs."""

from pathlib import Path

import pytest
from pyrage import x25519

from kms_core.backends.age import AgeBackend
from kms_core.backends.key_files import KeyFiles
from kms_core.jobs.storage.local import Roots


@pytest.fixture
def key(tmp_path: Path) -> AgeBackend:
    path = tmp_path / "spool.key"
    path.write_text(str(x25519.Identity.generate()))
    path.chmod(0o600)
    return AgeBackend(KeyFiles(path), native=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "root"
    directory.mkdir()
    return directory


@pytest.fixture
def roots(root: Path) -> Roots:
    return Roots([root])
