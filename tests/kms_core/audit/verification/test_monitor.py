"""A trail that is read back while it is written: a hand that changes it is noticed, and nothing else is."""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from prometheus_client import REGISTRY

from kms_core.audit import AuditLog, chain
from kms_core.audit.keys import PublicKeys
from kms_core.audit.segments import Segment
from kms_core.audit.verification import verify
from kms_core.audit.verification.scan import ScannedSpan, scan
from kms_core.audit.verification.verify import AuditMonitor
from support.audit_logs import Place, audit_section, record

MANY: Final = 5_000
"""Records of more than a MiB: a look does not read all of them."""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def trail(place: Place) -> Iterator[AuditLog]:
    """A trail of ten records that is still written to."""
    made = place.trail(audit_section(checkpoint_lines=4), rotate_bytes=16 * 1024)
    for number in range(10):
        made.append(record(number))
    yield made
    made.close()


@pytest.fixture
def watch(place: Place, trail: AuditLog) -> AuditMonitor:
    """One that has looked once."""
    del trail
    made = AuditMonitor(place.folder, place.signing_key)
    made.round()
    assert made.condition.problems == ()
    return made


def chain_ok() -> float:
    value = REGISTRY.get_sample_value("kms_audit_ok", {"what": "chain"})
    assert value is not None
    return value


def codes(watch: AuditMonitor) -> set[str]:
    watch.round()
    return {problem.code for problem in watch.condition.problems}


def test_a_trail_that_grows_and_rotates_holds(place: Place, trail: AuditLog, watch: AuditMonitor) -> None:
    for number in range(200):
        trail.append(record(number))
        if number % 50 == 0:
            assert codes(watch) == set()
    others = place.trail(role="worker")
    others.append(record(1))
    others.close()

    assert codes(watch) == set()
    assert len(place.files()) > 3
    assert watch.condition.lines == len(place.lines())
    assert watch.condition.newest == max(str(line["time"]) for line in place.lines())
    assert watch.condition.read_at > 0
    assert chain_ok() == 1
    assert REGISTRY.get_sample_value("kms_audit_read_timestamp_seconds") == watch.condition.read_at


def test_only_the_end_of_a_long_file_is_read_at_first(place: Place) -> None:
    place.written(MANY)
    watch = AuditMonitor(place.folder, place.signing_key)

    assert codes(watch) == set()
    assert 0 < watch.condition.lines < MANY


def test_of_many_new_lines_the_last_are_read_and_the_old_ones_must_still_be_there(place: Place) -> None:
    busy = place.trail(role="busy")
    busy.append(record(1))
    watch = AuditMonitor(place.folder, place.signing_key)
    assert codes(watch) == set()
    for number in range(MANY):
        busy.append(record(number))

    assert codes(watch) == set()
    assert watch.condition.lines < MANY
    for number in range(MANY):
        busy.append(record(number))
    (file,) = place.folder.glob("busy-*")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join((lines[0], *lines[2:])))
    assert codes(watch) & {"rewritten", "cut"}


def test_lines_behind_an_end_far_above_the_last_mib_are_found(place: Place) -> None:
    """Only the end that was known before tells that its process wrote no more."""
    file = place.written(3)
    watch = AuditMonitor(place.folder, place.signing_key)
    assert codes(watch) == set()
    line = file.read_bytes().splitlines()[-1]
    head, found = chain.claimed_head(line), chain.read(line)
    assert head
    assert found
    body, lines = chain.body_of(file.read_bytes().splitlines()[1]), []
    for seq in range(found.seq + 1, MANY):
        sealed, head = chain.seal(head, body.replace(b'"seq":1,', b'"seq":%d,' % seq))
        lines.append(sealed)
    with file.open("ab") as end:
        end.write(b"".join(lines))

    assert codes(watch) == {"after_closed"}
    assert watch.condition.lines < MANY - 1


def test_segments_that_have_not_changed_are_not_read_again(
    place: Place, trail: AuditLog, watch: AuditMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = place.written(3)
    scanned: list[Path] = []

    def counted(segment: Segment, keys: PublicKeys, end: int, begin: int = 0) -> ScannedSpan:
        scanned.append(segment.path)
        return scan(segment, keys, end, begin)

    monkeypatch.setattr(verify, "scan", counted)
    assert codes(watch) == codes(watch) == set()
    assert scanned == [others]
    trail.append(record(11))
    assert codes(watch) == set()
    assert scanned == [others, place.files()[0]]


def edited(file: Path) -> None:
    """A byte within a line, of the same length; the clock shows it, as a disk with coarse times may not."""
    file.write_bytes(file.read_bytes().replace(b"ada-3", b"bob-3", 1))
    os.utime(file)


def edited_with_its_time_put_back(file: Path) -> None:
    before = file.stat()
    edited(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def edited_while_it_grows(file: Path) -> None:
    """As a process that goes on writing does not notice, since the size is right."""
    line = file.read_bytes().splitlines()[-1]
    head, found = chain.claimed_head(line), chain.read(line)
    assert head
    assert found
    body = chain.body_of(line).replace(b'"seq":%d,' % found.seq, b'"seq":%d,' % (found.seq + 1))
    edited(file)
    with file.open("ab") as end:
        end.write(chain.seal(head, body)[0])


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 40)


def cut_to_whole_lines(file: Path) -> None:
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-2]))


def forged(file: Path) -> None:
    """Every line anew, with heads that fit, and one line more."""
    bodies = [chain.body_of(line) for line in file.read_bytes().splitlines()]
    last = len(bodies) - 1
    bodies.append(bodies[-1].replace(b'"seq":%d' % last, b'"seq":%d' % (last + 1)))
    head, lines = chain.ZERO, []
    for body in bodies:
        line, head = chain.seal(head, body.replace(b"ada-3", b"bob-3"))
        lines.append(line)
    file.write_bytes(b"".join(lines))


@pytest.mark.parametrize(
    ("hand", "expected"),
    [
        (edited, {"edited"}),
        (edited_with_its_time_put_back, {"edited"}),
        (edited_while_it_grows, {"edited"}),
        (cut, {"cut"}),
        (cut_to_whole_lines, {"cut"}),
        (Path.unlink, {"missing_file"}),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_hand_that_changes_the_trail_is_noticed(
    place: Place, watch: AuditMonitor, hand: Callable[[Path], None], expected: set[str]
) -> None:
    hand(place.files()[0])

    assert codes(watch) == expected
    assert chain_ok() == 0
    assert codes(watch) == expected, "it stays, and is not told again"
    assert len(watch.condition.problems) == 1


def test_whoever_writes_a_file_anew_is_noticed_although_all_its_heads_fit(place: Place) -> None:
    file = place.written(10, close=False)
    watch = AuditMonitor(place.folder, place.signing_key)
    assert codes(watch) == set()

    forged(file)

    assert codes(watch) == {"rewritten"}


def test_files_whose_removal_is_on_record_are_not_missed(
    place: Place, trail: AuditLog, watch: AuditMonitor
) -> None:
    while len(place.files()) < 3:
        trail.append(record())
    assert codes(watch) == set()
    first = place.files()[0]
    trail.record_removal(str(place.lines()[0]["time"]), 1)
    first.unlink()

    assert codes(watch) == set()


def test_a_folder_that_cannot_be_read_is_no_broken_trail_but_an_old_time(
    place: Place, watch: AuditMonitor
) -> None:
    before = watch.condition.read_at
    (place.at / "signing.pub").rename(place.at / "elsewhere")

    assert codes(watch) == set()
    assert watch.condition.read_at == before
    assert math.isnan(chain_ok()), "neither whole nor broken"
    (place.at / "elsewhere").rename(place.at / "signing.pub")
    assert codes(watch) == set()
    assert chain_ok() == 1


def test_half_a_line_at_the_end_is_read_once_it_is_whole(
    place: Place, trail: AuditLog, watch: AuditMonitor
) -> None:
    trail.append(record(77))
    file = place.files()[-1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])  # as a reader may meet it in the middle of a write
    watch.round()
    file.write_bytes(whole)

    assert codes(watch) == set()
    assert watch.condition.newest == place.lines()[-1]["time"]


def test_a_segment_that_is_just_begun_is_read_once_it_has_a_line(place: Place, trail: AuditLog) -> None:
    while len(place.files()) < 2:
        trail.append(record())
    file = place.files()[-1]
    whole = file.read_bytes()
    file.write_bytes(b"")
    watch = AuditMonitor(place.folder, place.signing_key)
    assert codes(watch) == set()
    file.write_bytes(whole)

    assert codes(watch) == set()
    assert watch.condition.lines == len(place.lines())
