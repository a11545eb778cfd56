"""A folder for an audit log, which the tests of this folder write, damage and read."""

from pathlib import Path

import pytest

from support.audit_logs import Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)
