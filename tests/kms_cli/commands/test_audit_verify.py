"""``kms audit verify`` of several hosts tells of a log that is not there."""

import re
import subprocess
from pathlib import Path

from support.audit_logs import AuditFolder
from support.cli import fixtures

NOT_READ = 69


def verified(home: Path, *folders: Path) -> subprocess.CompletedProcess[bytes]:
    """With settings of a host that reads copies, and has no log yet."""
    (home / "copies").mkdir()
    settings = home / "kms.toml"
    settings.write_text(f'[kms.audit]\npath = "{home / "own"}"\ncopies = "{home / "copies"}"\n')
    return fixtures.kms(home, "--config", str(settings), "audit", "verify", *map(str, folders))


def test_of_named_directories_one_without_a_log_is_not_called_intact(tmp_path: Path) -> None:
    there, none = AuditFolder(tmp_path / "there"), tmp_path / "none"
    there.root.mkdir()
    there.written(2)
    none.mkdir()
    ran = verified(tmp_path, there.folder, none)
    told = ran.stdout.decode()

    assert f"none: there is no audit log in {none}\n" in told
    assert told.splitlines()[-1] == "not read: 2 hosts"
    assert ran.returncode == NOT_READ


def test_a_host_without_a_log_of_its_own_is_told(tmp_path: Path) -> None:
    """Nothing tells one that is new from one whose log is gone, except anchors."""
    ran = verified(tmp_path)

    assert re.search(rf"note: (\S+: )?there is no audit log in {tmp_path / 'own'} yet\n", ran.stderr.decode())
    assert ran.returncode == 0
