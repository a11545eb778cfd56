"""Full disks, files that go away, kills: what is left of an audit trail, and what is noticed."""

import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from kms_core.audit.segment_writer import SegmentFile
from kms_core.settings.model import AuditSection
from kms_protocol.errors import AuditUnavailable
from support.audit_logs import (
    PROGRAM_PREAMBLE,
    AuditFolder,
    audit_section,
    notes,
    problem_codes,
    record,
    room_for,
)
from support.small_disk import small_disk

APPEND_AND_DIE = f"""{PROGRAM_PREAMBLE}
trail = place.trail()
for number in range(1, 4):
    trail.append(record(number))
os.kill(os.getpid(), signal.SIGKILL)
"""


# -- disks that are full -----------------------------------------------------------------------------


def test_a_disk_that_fills_up_within_a_line_leaves_no_part_of_it(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail()
    trail.append(record(1))
    (path,) = audit_folder.files()
    size = path.stat().st_size
    with room_for(size + 20), pytest.raises(AuditUnavailable, match=r"No space left|File too large"):
        trail.append(record(2))

    assert path.stat().st_size == size


def test_a_full_disk_is_an_error_for_as_long_as_it_is_full(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail()
    with room_for(20):
        for _ in range(3):
            with pytest.raises(AuditUnavailable):
                trail.append(record())
            with pytest.raises(AuditUnavailable):
                trail.check()
    assert not audit_folder.files()

    trail.check()
    assert [line["kind"] for line in audit_folder.lines()] == ["open", "resumed"]


def test_a_chain_goes_on_after_a_full_disk_and_says_what_was_refused(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail()
    trail.append(record(1))
    with room_for(audit_folder.files()[0].stat().st_size + 20):
        for _ in range(3):
            with pytest.raises(AuditUnavailable):
                trail.append(record(2))
    trail.append(record(3))
    trail.close()
    (told,) = [line for line in audit_folder.lines() if line.get("kind") == "resumed"]

    assert audit_folder.principals() == ["ada-1", "ada-3"]
    assert told["refused"] == 3
    assert audit_folder.verified().verdict == "intact"
    assert notes(audit_folder.verified()) == ["resumed"]


def test_a_checkpoint_without_room_costs_no_record(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail(audit_section(checkpoint_lines=4))
    trail.append(record(1))
    trail.append(record(2))
    (path,) = audit_folder.files()
    line = len(path.read_bytes().splitlines()[-1])
    with room_for(path.stat().st_size + line + 10):
        trail.append(record(3))  # and now a checkpoint would be due
    trail.append(record(4))
    trail.close()

    assert audit_folder.principals() == ["ada-1", "ada-2", "ada-3", "ada-4"]
    assert audit_folder.verified().verdict == "intact"


def test_a_disk_that_is_really_full(audit_folder: AuditFolder) -> None:
    with small_disk(audit_folder.folder, 64 * 1024):
        trail = audit_folder.trail()
        with pytest.raises(AuditUnavailable, match="No space left"):
            deque(map(trail.append, map(record, range(1000))), maxlen=0)
        with pytest.raises(AuditUnavailable):
            trail.check()
        assert not problem_codes(audit_folder.verified())
        assert audit_folder.files()[0].read_bytes().endswith(b"}\n")


# -- files that go away ------------------------------------------------------------------------------


def replaced_by_a_copy(path: Path) -> None:
    copy = path.parent.parent / "copy"
    shutil.copy(path, copy)
    copy.replace(path)


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


TAMPERINGS: Final[dict[str, tuple[Callable[[Path], object], set[str], list[str]]]] = {
    "deleted": (Path.unlink, {"missing_file"}, ["vanished"]),
    "replaced by a copy": (replaced_by_a_copy, set(), ["vanished"]),
    "renamed": (lambda path: path.rename(path.with_name("old.jsonl.1")), set(), ["misplaced", "vanished"]),
    "cut": (rewritten(lambda data: data[:-30]), {"cut", "unreadable"}, ["disturbed"]),
    "emptied": (rewritten(lambda _: b""), {"cut"}, ["disturbed"]),
    "written to": (rewritten(lambda data: data + b'{"seq":9}\n'), {"unreadable"}, ["disturbed"]),
    "begun a line in": (rewritten(lambda data: data + b'{"seq":9'), {"unreadable"}, ["disturbed"]),
}
"""What is done to the file of a log that goes on, and the codes and notes of it."""


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_file_that_another_hand_changed_is_noticed_and_left_as_it_is(
    audit_folder: AuditFolder, name: str
) -> None:
    """It gets no more lines: the next record, or checkpoint, is in a further one."""
    hand, expected, noted = TAMPERINGS[name]
    trail = audit_folder.trail(audit_section(checkpoint_s=0))
    trail.append(record(1))
    trail.append(record(2))
    (path,) = audit_folder.files()
    hand(path)
    left = {file: file.read_bytes() for file in audit_folder.files()}
    trail.checkpoint_if_due()
    trail.append(record(3))
    trail.close()
    report = audit_folder.verified()

    assert {file: file.read_bytes() for file in left} == left
    (further,) = {*audit_folder.files()} - {*left}
    assert further.read_bytes().count(b"ada-3") == 1
    assert ({*problem_codes(report)}, notes(report)) == (expected, noted)


def test_a_file_that_another_hand_changed_gets_no_closing_line(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail()
    trail.append(record(1))
    (path,) = audit_folder.files()
    path.write_bytes(b"")
    trail.close()

    assert [file.read_bytes() for file in audit_folder.files()] == [b""]


def test_a_deleted_folder_is_made_again_once_nothing_is_in_its_place(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail()
    trail.append(record(1))
    shutil.rmtree(audit_folder.folder)
    audit_folder.folder.touch()
    with pytest.raises(AuditUnavailable):
        trail.append(record(2))
    audit_folder.folder.unlink()
    trail.append(record(3))

    assert audit_folder.principals() == ["ada-3"]


def test_no_descriptor_is_left_behind(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail()
    trail.append(record())
    before = open_files(audit_folder.root)
    for _ in range(5):
        audit_folder.files()[-1].unlink()
        trail.append(record())

    assert open_files(audit_folder.root) == before


# -- crashes -----------------------------------------------------------------------------------------


def open_files(folder: Path) -> int:
    """How many files of the folder this process has open, deleted ones too. Others come and go."""
    links = (os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))  # noqa: PTH208
    return sum(link.startswith(f"{folder}/") for link in links)


def test_a_killed_process_has_lost_no_line(audit_folder: AuditFolder) -> None:
    audit_folder.trail()  # makes the keys
    died = subprocess.run([sys.executable, "-c", APPEND_AND_DIE, str(audit_folder.root)], check=False)

    assert died.returncode == -signal.SIGKILL
    assert audit_folder.principals() == ["ada-1", "ada-2", "ada-3"]


def test_a_torn_tail_is_never_the_beginning_of_a_line(audit_folder: AuditFolder) -> None:
    path = audit_folder.written(3)
    os.truncate(path, path.stat().st_size - 40)
    torn = path.read_bytes()
    audit_folder.written(2)
    report = audit_folder.verified()

    assert path.read_bytes() == torn
    assert (report.verdict, problem_codes(report), notes(report)) == ("intact", [], ["cut_or_crashed"])


# -- durability --------------------------------------------------------------------------------------


def test_lines_that_wait_while_the_disk_is_busy_share_the_next_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, free, calls = threading.Event(), threading.Event(), []

    def sync(fd: int) -> None:
        calls.append(fd)
        busy.set()
        assert free.wait(60)

    monkeypatch.setattr("os.fdatasync", sync)
    file = SegmentFile(tmp_path / "file")
    file.append(b"first\n")
    with ThreadPoolExecutor(9) as pool:
        waiting = [pool.submit(file.sync, file.size)]
        assert busy.wait(60)
        for number in range(8):
            file.append(b"%d\n" % number)
            waiting.append(pool.submit(file.sync, file.size))
        free.set()
        for each in waiting:
            each.result(60)

    assert len(calls) == 2


def test_a_disk_without_room_for_records_is_told_before_one_fails(
    audit_folder: AuditFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    trail = audit_folder.trail()
    trail.check()
    room = os.statvfs(audit_folder.folder)
    monkeypatch.setattr("kms_core.audit.log._ENOUGH_BYTES", 2 * room.f_bavail * room.f_frsize)

    with pytest.raises(AuditUnavailable, match="disk is full"):
        trail.check()


def test_a_line_is_not_on_disk_if_the_sync_that_it_waits_for_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the disk is not asked again: a kernel may call pages clean that it lost."""
    calls = []

    def sync(fd: int) -> None:
        calls.append(fd)
        raise OSError(5, "broken", str(fd))

    monkeypatch.setattr("os.fdatasync", sync)
    file = SegmentFile(tmp_path / "file")
    file.append(b"first\n")
    for _ in range(2):
        with pytest.raises(OSError, match=r"broken|Input/output"):
            file.sync(file.size)

    assert not file.is_ours()
    assert len(calls) == 1


BY_DURABILITY: Final = pytest.mark.parametrize(
    "rules", [audit_section(), audit_section(durability="fsync")], ids=["write", "fsync"]
)


@BY_DURABILITY
def test_a_batch_whose_records_are_not_written_is_an_error(
    audit_folder: AuditFolder, rules: AuditSection
) -> None:
    trail = audit_folder.trail(rules)
    trail.append(record(0))

    def batch() -> None:
        with trail.together():
            trail.append(record(1))
            os.close(descriptor_of(audit_folder.files()[0]))  # the disk is gone

    with pytest.raises(AuditUnavailable):
        batch()
    trail.append(record(2))
    assert [line.get("reason", line.get("refused")) for line in audit_folder.lines()[-3:]] == [
        "torn",
        1,
        None,
    ]


@BY_DURABILITY
def test_a_batch_that_goes_on_after_a_record_that_failed_is_an_error_at_its_end(
    audit_folder: AuditFolder, rules: AuditSection
) -> None:
    trail = audit_folder.trail(rules)
    trail.append(record(0))
    failed = []

    def batch() -> None:
        with trail.together():
            os.close(descriptor_of(audit_folder.files()[0]))  # the disk is gone
            for number in range(250):
                try:
                    trail.append(record(number))
                except AuditUnavailable:
                    failed.append(number)

    with pytest.raises(AuditUnavailable):
        batch()
    assert failed == [99]  # what came later is in the next file
    assert [line["refused"] for line in audit_folder.lines() if "refused" in line] == [100]
    assert len(audit_folder.lines()) == len(["open", "0", "open", "resumed"]) + 150


def test_records_of_a_batch_are_one_write_and_a_chain(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail(audit_section())
    with trail.together():
        ids = [trail.append(record(number)) for number in range(30)]
        assert not audit_folder.folder.exists()
    trail.append(record(30))
    trail.close()

    assert ids == [""] * 30
    assert audit_folder.principals() == [f"ada-{number}" for number in range(31)]
    assert len({line["time"] for line in audit_folder.operations()[:30]}) == 1
    assert not problem_codes(audit_folder.verified())


def test_an_intent_does_not_wait_for_the_records_of_its_batch(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail()
    with trail.together():
        trail.append(record(1))
        trail.append(record(2, stage="intent", effect="x"))
        written = audit_folder.principals()

    assert written == ["ada-2"]
    assert audit_folder.principals() == ["ada-2", "ada-1"]


def descriptor_of(path: Path) -> int:
    links = Path("/proc/self/fd").iterdir()
    return next(int(link.name) for link in links if link.exists() and link.samefile(path))


def test_a_folder_that_cannot_be_synced_is_an_error_and_the_chain_goes_on(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail(audit_section(durability="fsync"))
    trail.append(record(1))
    path = audit_folder.files()[0]
    path.rename(audit_folder.root / "moved")
    with no_descriptor_but(descriptor_of(audit_folder.root / "moved")), pytest.raises(AuditUnavailable):
        trail.append(record(2))
    (audit_folder.root / "moved").rename(path)
    trail.append(record(3))
    trail.close()

    assert audit_folder.principals() == ["ada-1", "ada-3"]
    assert not problem_codes(audit_folder.verified())
    assert {"vanished", "unsynced"} <= set(notes(audit_folder.verified()))


@contextmanager
def no_descriptor_but(number: int) -> Iterator[None]:
    """This process can open one file, in the place of that one, and no second."""
    gc.collect()
    gc.disable()  # or the garbage of other tests makes room in the middle
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir("/proc/self/fd")}  # noqa: PTH208 -- a Path for each could not be closed
    filler = [os.open(os.devnull, os.O_RDONLY) for _ in range(max(used))]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(*filler, number) + 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in filler:
            os.close(each)
        gc.enable()


def test_threads_that_wait_for_the_disk_all_come_back(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail(audit_section(durability="fsync"), rotate_bytes=8192)
    barrier = threading.Barrier(8)

    def work(first: int) -> None:
        barrier.wait()
        for number in range(first, first + 20):
            trail.append(record(number))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(0, 160, 20)))
    trail.close()

    assert set(audit_folder.principals()) == {f"ada-{number}" for number in range(160)}
    assert len(audit_folder.files()) > 1
    assert audit_folder.verified().verdict == "intact"
