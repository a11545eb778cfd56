"""A trail that is read back while it is written: a hand that changes it is noticed, and nothing else is."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from prometheus_client import REGISTRY

from kms_core.audit import chain
from kms_core.audit.keys import PublicKeys
from kms_core.audit.log import AuditLog
from kms_core.audit.segments import Segment
from kms_core.audit.verification import verify
from kms_core.audit.verification.scan import ScannedSpan, scan
from kms_core.audit.verification.verify import AuditMonitor
from support.audit_logs import AuditFolder, audit_ok, audit_section, record, rewrite
from support.waiting import until

MANY: Final = 5_000
"""Records of more than a MiB: a look does not read all of them."""


@pytest.fixture
def trail(audit_folder: AuditFolder) -> Iterator[AuditLog]:
    """A trail of ten records that is still written to."""
    made = audit_folder.trail(audit_section(checkpoint_lines=4), rotate_bytes=16 * 1024)
    for number in range(10):
        made.append(record(number))
    yield made
    made.close()


@pytest.fixture
def watch(audit_folder: AuditFolder, trail: AuditLog) -> AuditMonitor:
    """One that has looked once."""
    del trail
    made = audit_folder.monitor()
    made.round()
    assert made.condition.problems == ()
    return made


def problem_codes(watch: AuditMonitor) -> set[str]:
    watch.round()
    return {problem.code for problem in watch.condition.problems}


def test_a_trail_that_grows_and_rotates_holds(
    audit_folder: AuditFolder, trail: AuditLog, watch: AuditMonitor
) -> None:
    for number in range(200):
        trail.append(record(number))
        if number % 50 == 0:
            assert problem_codes(watch) == set()
    others = audit_folder.trail(role="worker")
    others.append(record(1))
    others.close()

    assert problem_codes(watch) == set()
    assert len(audit_folder.files()) > 3
    assert watch.condition.lines == len(audit_folder.lines())
    assert watch.condition.newest == max(str(line["time"]) for line in audit_folder.lines())
    assert watch.condition.read_at > 0
    assert audit_ok("chain") == 1
    assert REGISTRY.get_sample_value("kms_audit_read_timestamp_seconds") == watch.condition.read_at


def test_of_many_new_lines_the_last_are_read_and_the_old_ones_must_still_be_there(
    audit_folder: AuditFolder,
) -> None:
    busy = audit_folder.trail(role="busy")
    busy.append(record(1))
    watch = audit_folder.monitor()
    assert problem_codes(watch) == set()
    for number in range(MANY):
        busy.append(record(number))

    assert problem_codes(watch) == set()
    assert watch.condition.lines < MANY
    first = audit_folder.monitor()
    assert (problem_codes(first), 0 < first.condition.lines < MANY) == (set(), True)
    for number in range(MANY):
        busy.append(record(number))
    (file,) = audit_folder.folder.glob("busy-*")
    rewrite(file, lambda lines: [lines[0], *lines[2:]])
    assert problem_codes(watch) & {"rewritten", "cut"}


def test_segments_that_have_not_changed_are_not_read_again(
    audit_folder: AuditFolder, trail: AuditLog, watch: AuditMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = audit_folder.written(3)
    scanned: list[Path] = []

    def counted(segment: Segment, keys: PublicKeys, end: int, begin: int = 0) -> ScannedSpan:
        scanned.append(segment.path)
        return scan(segment, keys, end, begin)

    monkeypatch.setattr(verify, "scan", counted)
    assert problem_codes(watch) == problem_codes(watch) == set()
    assert scanned == [others]
    trail.append(record(11))
    assert problem_codes(watch) == set()
    assert scanned == [others, audit_folder.files()[0]]


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
    last = file.read_bytes().splitlines()[-1]
    found = chain.read(last)
    assert found
    body = chain.body_of(last).replace(b'"seq":%d,' % found.seq, b'"seq":%d,' % (found.seq + 1))
    edited(file)
    with file.open("ab") as end:
        end.write(chain.seal(bytes.fromhex(found.head), body)[0])


def written_anew(file: Path) -> None:
    """Every line anew, with heads that fit, and one line more."""
    bodies = [chain.body_of(line) for line in file.read_bytes().splitlines()]
    last = len(bodies) - 1
    bodies.append(bodies[-1].replace(b'"seq":%d' % last, b'"seq":%d' % (last + 1)))
    head, lines = chain.ZERO, []
    for body in bodies:
        line, head = chain.seal(head, body.replace(b"ada-3", b"bob-3"))
        lines.append(line)
    file.write_bytes(b"".join(lines))


TAMPERINGS: Final[dict[str, tuple[Callable[[Path], object], str]]] = {
    "edited": (edited, "edited"),
    "edited, and its time put back": (edited_with_its_time_put_back, "edited"),
    "edited while it grows": (edited_while_it_grows, "edited"),
    "cut": (lambda file: os.truncate(file, file.stat().st_size - 40), "cut"),
    "cut to whole lines": (lambda file: rewrite(file, lambda lines: lines[:-2]), "cut"),
    "removed": (Path.unlink, "missing_file"),
    "written anew": (written_anew, "rewritten"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_hand_that_changes_the_trail_is_noticed(audit_folder: AuditFolder, name: str) -> None:
    hand, code = TAMPERINGS[name]
    file = audit_folder.written(10, close=False)
    watch = audit_folder.monitor()
    assert problem_codes(watch) == set()
    hand(file)

    assert problem_codes(watch) == {code}
    assert audit_ok("chain") == 0
    assert problem_codes(watch) == {code}, "it stays, and is not told again"
    assert len(watch.condition.problems) == 1


def test_files_whose_removal_is_on_record_are_not_missed(
    audit_folder: AuditFolder, trail: AuditLog, watch: AuditMonitor
) -> None:
    while len(audit_folder.files()) < 3:
        trail.append(record())
    assert problem_codes(watch) == set()
    first = audit_folder.files()[0]
    trail.record_removal(str(audit_folder.lines()[0]["time"]), 1)
    first.unlink()

    assert problem_codes(watch) == set()


def broken(*_: object) -> ScannedSpan:
    raise ZeroDivisionError


def test_an_error_that_no_code_expects_is_left_to_the_thread_which_logs_it(
    audit_folder: AuditFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit_folder.written(3)
    watch = audit_folder.monitor()
    monkeypatch.setattr(verify, "scan", broken)

    with pytest.raises(ZeroDivisionError):
        watch.round()


def test_an_error_that_no_code_expects_is_reported_and_the_next_round_is_as_ever(
    audit_folder: AuditFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is at once, in the thread that goes on after it."""
    path = audit_folder.written(3)
    watch = audit_folder.monitor()
    monkeypatch.setattr(verify, "scan", broken)
    watch.start()
    try:
        until(lambda: "ZeroDivisionError" in watch.condition.unread, "the first round")
        assert watch.condition.read_at == 0
        monkeypatch.setattr(verify, "scan", scan)
        watch.wake()
        until(lambda: watch.condition.read_at, "another round")
    finally:
        watch.stop(5)
    assert (watch.condition.unread, watch.condition.lines) == ("", 5)
    path.unlink()

    assert problem_codes(watch) == {"missing_file"}


@pytest.mark.parametrize("written", [-30, 0], ids=["half a line", "no line"])
def test_the_end_of_a_segment_is_read_once_it_is_whole(
    audit_folder: AuditFolder, trail: AuditLog, watch: AuditMonitor, written: int
) -> None:
    """As a reader may meet it in the middle of a write."""
    while len(audit_folder.files()) < 2:
        trail.append(record())
    file = audit_folder.files()[-1]
    whole = file.read_bytes()
    file.write_bytes(whole[:written])
    assert problem_codes(watch) == set()
    file.write_bytes(whole)

    assert problem_codes(watch) == set()
    assert watch.condition.lines == len(audit_folder.lines())
    assert watch.condition.newest == audit_folder.lines()[-1]["time"]
