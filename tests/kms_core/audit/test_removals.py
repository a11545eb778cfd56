"""Removal of old segments, with a record of it."""

import time
from datetime import UTC, datetime, timedelta

import pytest

from kms_core.audit.maintenance import AuditMaintenance
from kms_core.audit.removals import due_segments
from kms_protocol.errors import AuditUnavailable
from support.audit_logs import DAY_NS, AuditFolder, chain_name, problem_codes, record


def retire(audit_folder: AuditFolder, keep_days: int) -> list[int]:
    """The days ago of which records are left."""
    trail = audit_folder.trail()
    trail.append(record(0))
    AuditMaintenance(trail, keep_days=keep_days).round()
    trail.close()
    return sorted({int(name.removeprefix("ada-")) for name in audit_folder.principals()} - {0})


def test_old_files_are_removed_with_a_record_and_verification_knows(audit_folder: AuditFolder) -> None:
    """Removals on top of removals too."""
    audit_folder.aged(50, 40, 30, 10, 5)
    assert retire(audit_folder, 0) == [5, 10, 30, 40, 50]
    assert retire(audit_folder, 20) == [5, 10]
    audit_folder.aged(4, 1)
    assert retire(audit_folder, 7) == [1, 4, 5]
    assert retire(audit_folder, 3) == [1]

    assert [line["files"] for line in audit_folder.lines() if line.get("kind") == "retired"] == [3, 1, 2]
    assert audit_folder.verified().verdict == "intact"


def test_a_young_file_that_is_gone_is_missing_all_the_same(audit_folder: AuditFolder) -> None:
    audit_folder.aged(50, 10)
    young = audit_folder.files()[-1]
    assert retire(audit_folder, 20) == [10]
    young.unlink()

    assert problem_codes(audit_folder.verified()) == ["missing_chain"]


def test_a_file_goes_only_after_all_that_were_opened_before_it(audit_folder: AuditFolder) -> None:
    """Or one time could not say which files are gone. Files of live processes stay, too."""
    at = [time.time_ns() - 60 * DAY_NS]
    old = audit_folder.trail(clock=lambda: at[0])
    old.append(record(60))
    assert retire(audit_folder, 20) == [60]
    audit_folder.aged(50)
    at[0] = time.time_ns()
    old.append(record(2))
    old.close()

    assert retire(audit_folder, 20) == [2, 50, 60]


def test_days_are_kept_from_the_last_record_on(audit_folder: AuditFolder) -> None:
    audit_folder.aged(21, 19)
    now = datetime.now(UTC)

    assert len(due_segments(audit_folder.folder, 20, now)[0]) == 1
    assert len(due_segments(audit_folder.folder, 20, now + timedelta(days=3))[0]) == 2


def test_what_cannot_be_recorded_is_not_removed(audit_folder: AuditFolder) -> None:
    audit_folder.aged(30)
    trail = audit_folder.trail()
    trail.append(record(2))
    audit_folder.signing_key.unlink()
    audit_folder.files()[-1].unlink()
    (audit_folder.folder / f"{chain_name(trail)}.0002.jsonl").touch()  # the name of its next file is taken
    with pytest.raises(AuditUnavailable):
        AuditMaintenance(trail, keep_days=20).round()

    assert len(audit_folder.files()) == 2
    assert "ada-30" in audit_folder.principals()
