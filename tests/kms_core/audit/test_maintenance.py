"""What happens beside a trail: anchors reach second places, now or when those are back."""

import json
from pathlib import Path

import pytest
import redis

from kms_core.audit.maintenance import AuditMaintenance
from kms_core.audit.sinks import FolderSink, RedisSink
from kms_protocol.errors import AuditUnavailable
from support.audit_logs import AuditFolder, audit_section, record, room_for

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
