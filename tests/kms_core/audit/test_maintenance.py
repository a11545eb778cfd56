"""What happens beside a trail: anchors reach second places, now or when those are back."""

import json
import time
from pathlib import Path

import pytest
import redis

from kms_core.audit.maintenance import AuditMaintenance, FolderSink, RedisSink
from kms_protocol.errors import AuditUnavailable
from support.audit_logs import Place, audit_section, chain_name, codes, record, rewrite

EAGER = audit_section(checkpoint_s=0)
DAY_NS = 24 * 3600 * 1_000_000_000


class Shelf:
    """A second place in memory, which may be away."""

    name = "directory"

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.away = False

    def put(self, line: bytes) -> None:
        if self.away:
            raise AuditUnavailable
        self.lines.append(line)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_place_that_was_away_gets_the_newest_anchor_when_it_is_back(place: Place) -> None:
    shelf, trail = Shelf(), place.trail(rotate_bytes=4096)
    keeper = AuditMaintenance(trail, anchors=[shelf])
    shelf.away = True
    for number in range(40):
        trail.append(record(number))
        keeper.round()
    shelf.away = False
    trail.close()
    keeper.round()

    assert [json.loads(line)["kind"] for line in shelf.lines] == ["closed"]


def test_one_place_that_is_away_holds_up_no_other(place: Place) -> None:
    away, there = Shelf(), Shelf()
    away.away = True
    trail = place.trail(EAGER)
    keeper = AuditMaintenance(trail, anchors=[away, there])
    trail.append(record())
    keeper.round()

    assert len(there.lines) == 1


def test_new_checkpoints_are_anchored_once(place: Place) -> None:
    shelf, trail = Shelf(), place.trail(EAGER)
    keeper = AuditMaintenance(trail, anchors=[shelf])
    trail.append(record(1))
    keeper.round()
    keeper.round()
    trail.append(record(2))
    keeper.round()

    assert [json.loads(line)["seq"] for line in shelf.lines] == [2, 4]


def test_a_thread_that_is_stopped_closes_the_chain_and_anchors_its_end(place: Place) -> None:
    trail = place.trail()
    keeper = AuditMaintenance(trail, anchors=[FolderSink(place.at / "anchors")])
    keeper.start()
    trail.append(record())
    keeper.stop()
    (line,) = FolderSink(place.at / "anchors").lines()

    assert json.loads(line)["kind"] == "closed"
    assert place.verified(line).chains[0].state == "closed"
    assert not keeper.is_alive()


def test_the_folder_of_anchors_is_private(place: Place) -> None:
    trail = place.trail(EAGER)
    trail.append(record())
    AuditMaintenance(trail, anchors=[FolderSink(place.at / "anchors")]).round()
    (path,) = (place.at / "anchors").iterdir()

    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_anchors_in_redis_tell_of_a_cut(place: Place, redis_url: str) -> None:
    stream = RedisSink(redis.Redis.from_url(redis_url))
    trail = place.trail(EAGER)
    keeper = AuditMaintenance(trail, anchors=[stream])
    for number in range(10):
        trail.append(record(number))
    keeper.round()
    rewrite(place.files()[0], lambda lines: lines[:5])
    trail.close()

    assert len(stream.lines()) == 1
    assert "cut" in codes(place.verified(*stream.lines()))


def test_without_redis_nothing_is_held_up(place: Place) -> None:
    stream = RedisSink(redis.Redis.from_url("unix:///nonexistent/valkey.sock"))
    trail = place.trail(EAGER)
    keeper = AuditMaintenance(trail, anchors=[stream])
    trail.append(record())
    keeper.round()

    assert place.principals() == ["ada-0"]
    with pytest.raises(AuditUnavailable):
        stream.lines()


@pytest.mark.parametrize(("keep_days", "left"), [(0, 2), (20, 1)])
def test_old_files_are_removed_with_a_record(place: Place, keep_days: int, left: int) -> None:
    old = place.trail(clock=lambda: time.time_ns() - 30 * DAY_NS)
    old.append(record(1))
    old.close()
    trail = place.trail()
    trail.append(record(2))
    keeper = AuditMaintenance(trail, keep_days=keep_days)
    keeper.round()
    trail.close()

    assert len(place.files()) == left
    assert [line["files"] for line in place.lines() if line.get("kind") == "retired"] == [1] * (2 - left)
    assert place.verified().verdict == "intact"


def test_what_cannot_be_recorded_is_not_removed(place: Place) -> None:
    old = place.trail(clock=lambda: time.time_ns() - 30 * DAY_NS)
    old.append(record(1))
    old.close()
    trail = place.trail()
    trail.append(record(2))
    place.signing_key.unlink()
    path = place.files()[-1]
    path.unlink()
    (place.folder / f"{chain_name(trail)}.0002.jsonl").touch()  # the name of its next file is taken
    with pytest.raises(AuditUnavailable):
        AuditMaintenance(trail, keep_days=20).round()

    assert len(place.files()) == 2
    assert "ada-1" in place.principals()
