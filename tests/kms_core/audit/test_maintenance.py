"""What happens beside a trail: anchors reach second places, now or when those are back."""

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis

from kms_core.audit import maintenance
from kms_core.audit.maintenance import AuditMaintenance, FolderSink, RedisSink
from kms_protocol.errors import AuditUnavailable
from support.audit_logs import (
    DAY_NS,
    AuditFolder,
    audit_section,
    chain_name,
    problem_codes,
    record,
    room_for,
)

EAGER = audit_section(checkpoint_s=0)


class MemoryAnchorPlace:
    """A second place in memory, which may be away."""

    name = "directory"

    def __init__(self, *, is_away: bool = False) -> None:
        self.lines: list[bytes] = []
        self.away = is_away

    def put(self, line: bytes) -> None:
        if self.away:
            raise AuditUnavailable
        self.lines.append(line)


def test_a_place_that_was_away_gets_the_newest_anchor_when_it_is_back(audit_folder: AuditFolder) -> None:
    shelf, trail = MemoryAnchorPlace(is_away=True), audit_folder.trail(rotate_bytes=4096)
    upkeep = AuditMaintenance(trail, anchors=[shelf])
    for number in range(40):
        trail.append(record(number))
        upkeep.round()
    shelf.away = False
    trail.close()
    upkeep.round()

    assert [json.loads(line)["kind"] for line in shelf.lines] == ["closed"]


def test_one_place_that_is_away_holds_up_no_other(audit_folder: AuditFolder) -> None:
    away, there = RedisSink(redis.Redis.from_url("unix:///nonexistent/valkey.sock")), MemoryAnchorPlace()
    trail = audit_folder.trail(EAGER)
    trail.append(record())
    AuditMaintenance(trail, anchors=[away, there]).round()

    assert (audit_folder.principals(), len(there.lines)) == (["ada-0"], 1)
    with pytest.raises(AuditUnavailable):
        away.lines()


def test_new_checkpoints_are_anchored_once(audit_folder: AuditFolder) -> None:
    shelf, trail = MemoryAnchorPlace(), audit_folder.trail(EAGER)
    upkeep = AuditMaintenance(trail, anchors=[shelf])
    trail.append(record(1))
    upkeep.round()
    upkeep.round()
    trail.append(record(2))
    upkeep.round()

    assert [json.loads(line)["seq"] for line in shelf.lines] == [2, 4]


def test_a_thread_that_is_stopped_closes_the_chain_and_anchors_its_end(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail()
    upkeep = AuditMaintenance(trail, anchors=[FolderSink(audit_folder.root / "anchors")])
    upkeep.start()
    trail.append(record())
    upkeep.stop()
    (line,) = FolderSink(audit_folder.root / "anchors").lines()

    assert json.loads(line)["kind"] == "closed"
    assert audit_folder.verified(line).chains[0].state == "closed"
    assert not upkeep.is_alive()


def test_the_folder_of_anchors_is_private(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail(EAGER)
    trail.append(record())
    AuditMaintenance(trail, anchors=[FolderSink(audit_folder.root / "anchors")]).round()
    (path,) = (audit_folder.root / "anchors").iterdir()

    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def two_anchors(audit_folder: AuditFolder) -> list[bytes]:
    """Two signed lines of one chain."""
    shelf, trail = MemoryAnchorPlace(), audit_folder.trail(EAGER)
    upkeep = AuditMaintenance(trail, anchors=[shelf])
    for number in range(2):
        trail.append(record(number))
        upkeep.round()
    return shelf.lines


def test_an_anchor_that_finds_no_room_is_refused_and_leaves_no_part(
    tmp_path: Path, two_anchors: list[bytes]
) -> None:
    place = FolderSink(tmp_path / "anchors")
    place.put(two_anchors[0])
    (path,) = place.path.iterdir()
    with room_for(path.stat().st_size + 20), pytest.raises(OSError, match="File too large"):
        place.put(two_anchors[1])
    assert path.read_bytes() == two_anchors[0]

    place.put(two_anchors[1])
    assert path.read_bytes() == b"".join(two_anchors)


def test_an_anchor_after_a_torn_one_has_a_line_of_its_own(tmp_path: Path, two_anchors: list[bytes]) -> None:
    place = FolderSink(tmp_path / "anchors")
    place.put(two_anchors[0])
    (path,) = place.path.iterdir()
    path.write_bytes(two_anchors[0][:50])
    place.put(two_anchors[1])

    assert path.read_bytes() == two_anchors[0][:50] + b"\n" + two_anchors[1]


# -- retention ---------------------------------------------------------------------------------------


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

    assert len(maintenance.due_segments(audit_folder.folder, 20, now)[0]) == 1
    assert len(maintenance.due_segments(audit_folder.folder, 20, now + timedelta(days=3))[0]) == 2


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
