"""A folder for an audit log, which the tests of this folder write, damage and read."""

from pathlib import Path

import pytest

from support.audit_logs import AuditFolder


@pytest.fixture
def audit_folder(tmp_path: Path) -> AuditFolder:
    return AuditFolder(tmp_path)
