"""What has to be on disk before it counts: files, and the entries of the directories that name them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kms_core.audit.keys import Concealer, Signer
from kms_core.audit.sinks import FolderSink
from kms_core.auth import tokens
from kms_core.auth.tokens import TokenRequest
from support.audit_logs import AuditFolder, audit_section, record
from support.disk_trace import recorded


def create_token(path: Path) -> None:
    tokens.create(path, TokenRequest(name="ci", tenant="default", scopes=("status",), ttl=None))


@pytest.mark.parametrize("make", [Concealer.at, Signer.at, create_token], ids=["hiding", "signing", "tokens"])
def test_keys_and_tokens_are_on_disk_before_they_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object]
) -> None:
    """A power cut would take the key of values and lines, or bring back a revoked token."""
    disk = recorded(monkeypatch)
    make(tmp_path / "made.key")

    disk.assert_survives(tmp_path / "made.key")


def test_a_folder_that_is_made_for_tokens_keeps_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = recorded(monkeypatch)
    create_token(tmp_path / "made" / "tokens.json")

    assert disk.steps[:2] == [("mkdir", tmp_path / "made"), ("sync", tmp_path)]


def test_the_end_of_a_log_is_on_disk_when_it_is_closed(
    audit_folder: AuditFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = audit_folder.trail(audit_section(durability="fsync"))
    log.append(record(1))
    disk = recorded(monkeypatch)
    log.close()
    (file,) = audit_folder.files()

    assert disk.steps == [("sync", file)]
    assert disk.synced_bytes[file.stat().st_ino] == file.stat().st_size


def test_a_new_file_of_anchors_keeps_its_name(
    audit_folder: AuditFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = audit_folder.trail()
    log.append(record(1))
    log.close()
    anchors = FolderSink(audit_folder.root / "anchors")
    disk = recorded(monkeypatch)
    anchors.put(log.last_signed)
    (file,) = anchors.path.iterdir()
    assert disk.steps == [("mkdir", anchors.path), ("sync", file), ("sync", anchors.path)]
    assert disk.synced_bytes[file.stat().st_ino] == file.stat().st_size
    anchors.put(log.last_signed)

    assert disk.steps[3:] == [("sync", file)]
    assert disk.synced_bytes[file.stat().st_ino] == file.stat().st_size == 2 * len(log.last_signed)
