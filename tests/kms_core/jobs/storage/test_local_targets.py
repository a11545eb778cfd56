"""Targets of jobs: complete and private or not there, put in place once by whoever finishes."""

import os
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import pytest

from kms_core.jobs.model import Commit
from kms_core.jobs.storage.commit_marks import CommitMarks
from kms_core.jobs.storage.local import RootedPending, RootedTarget, Roots, temporary_name
from kms_core.payload.files import FileRange
from kms_core.payload.parallel import ParallelOptions
from kms_protocol.errors import PathRefused, SpoolFull, TargetExists, Unavailable
from support.disk_trace import recorded
from support.file_tree import (
    a_directory,
    a_fifo,
    a_hard_link,
    a_link_to_a_file,
    beneath_a_file,
    beneath_a_linked_directory,
    beneath_a_missing_directory,
    names,
    outside_the_root,
    the_root_itself,
    write_file_uri,
)


class Unmarked:
    """Marks nothing."""

    def put(self, fd: int, attempt_id: str, url: str) -> None:
        pass


def target(roots: Roots, url: str, *, overwrite: bool = False) -> RootedTarget:
    return RootedTarget(url, "job", overwrite, roots, cast("CommitMarks", Unmarked()))


@dataclass(frozen=True)
class Settled:
    """A temporary file that is ready to be put in place."""

    roots: Roots
    url: str
    commit: Commit

    @property
    def temporary(self) -> str:
        return temporary_name(f"job-{self.commit.attempt_id}")

    def finish(self, *, overwrite: bool) -> None:
        target(self.roots, self.url, overwrite=overwrite).finish(self.commit)


def settled(roots: Roots, url: str, attempt_id: str = "1", *, overwrite: bool = False) -> Settled:
    with target(roots, url, overwrite=overwrite).prepare(attempt_id) as pending:
        os.write(pending.fd, b"sealed")
        return Settled(roots, url, pending.settle(None, in_place=False))


def prepared(roots: Roots, url: str, attempt_id: str = "1", *, overwrite: bool = False) -> None:
    with target(roots, url, overwrite=overwrite).prepare(attempt_id):
        pass


def test_a_target_appears_at_once_complete_and_private(root: Path, roots: Roots) -> None:
    (root / "a").mkdir()
    url = (root / "a/out.age").as_uri()
    placement = settled(roots, url)
    before = names(root / "a")
    placement.finish(overwrite=False)

    assert before == [".kms-job-1.tmp"]
    assert names(root / "a") == ["out.age"]
    assert (root / "a/out.age").read_bytes() == b"sealed"
    assert stat.S_IMODE((root / "a/out.age").stat().st_mode) == 0o600
    assert (root / "a/out.age").stat().st_nlink == 1


@pytest.mark.parametrize("overwrite", [False, True], ids=["create", "overwrite"])
def test_finishing_twice_changes_nothing(root: Path, roots: Roots, *, overwrite: bool) -> None:
    placement = settled(roots, (root / "out").as_uri(), overwrite=overwrite)
    placement.finish(overwrite=overwrite)
    before = (root / "out").stat()
    placement.finish(overwrite=overwrite)

    assert (root / "out").stat() == before
    assert names(root) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True], ids=["create", "overwrite"])
def test_a_crash_between_link_and_unlink_is_finished(root: Path, roots: Roots, *, overwrite: bool) -> None:
    placement = settled(roots, (root / "out").as_uri())
    (root / "out").hardlink_to(root / placement.temporary)
    placement.finish(overwrite=overwrite)

    assert names(root) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True], ids=["create", "overwrite"])
def test_many_may_finish_at_once(root: Path, roots: Roots, *, overwrite: bool) -> None:
    failures: list[Exception] = []

    def finish(placement: Settled, barrier: threading.Barrier) -> None:
        barrier.wait()
        try:
            placement.finish(overwrite=overwrite)
        except (PathRefused, TargetExists, Unavailable) as exc:
            failures.append(exc)

    for round_ in range(50):
        placement = settled(roots, (root / f"out{round_}").as_uri())
        barrier = threading.Barrier(4)
        threads = [threading.Thread(target=finish, args=(placement, barrier)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert failures == []
    assert len(names(root)) == 50


def test_an_existing_target_is_refused_before_any_work_unless_overwriting_was_asked_for(
    root: Path, roots: Roots
) -> None:
    """The source may be the target."""
    url = write_file_uri(root)
    with roots.open_source(url) as source:
        with pytest.raises(TargetExists):
            prepared(roots, url)
        assert names(root) == ["plain.txt"]
        placement = settled(roots, url, overwrite=True)
        source.check_unchanged()
        placement.finish(overwrite=True)

    assert (root / "plain.txt").read_bytes() == b"sealed"


def test_a_target_that_appears_meanwhile_wins(root: Path, roots: Roots) -> None:
    placement = settled(roots, (root / "plain.txt").as_uri())
    write_file_uri(root)

    with pytest.raises(TargetExists):
        placement.finish(overwrite=False)

    assert (root / "plain.txt").read_bytes() == b"salary"
    assert (root / placement.temporary).exists()


def test_overwriting_one_of_two_links_leaves_the_other(tmp_path: Path, root: Path, roots: Roots) -> None:
    write_file_uri(tmp_path, "secret", b"other")
    path = a_hard_link(root, tmp_path)
    settled(roots, path.as_uri(), overwrite=True).finish(overwrite=True)

    assert path.read_bytes() == b"sealed"
    assert (tmp_path / "secret").read_bytes() == b"other"


@pytest.mark.parametrize(
    "make",
    [
        a_directory,
        a_fifo,
        a_link_to_a_file,
        beneath_a_linked_directory,
        beneath_a_missing_directory,
        beneath_a_file,
        the_root_itself,
        outside_the_root,
    ],
)
def test_a_target_is_a_regular_file_in_a_real_directory_beneath_the_root(
    make: Callable[[Path, Path], Path], tmp_path: Path, root: Path, roots: Roots
) -> None:
    write_file_uri(tmp_path, "outside/secret")
    path = make(root, tmp_path / "outside")

    with pytest.raises(PathRefused):
        prepared(roots, path.as_uri(), overwrite=True)

    assert names(tmp_path / "outside") == ["secret"]


@pytest.mark.parametrize("put", [None, b"other!"], ids=["absent", "different"])
def test_a_result_that_vanished_is_told(root: Path, roots: Roots, put: bytes | None) -> None:
    placement = settled(roots, (root / "out").as_uri())
    (root / placement.temporary).unlink()
    if put is not None:
        write_file_uri(root, "out", put)  # it may well be given the same inode
        os.utime(root / "out", ns=(1, 1))

    with pytest.raises(PathRefused, match="run the job again"):
        placement.finish(overwrite=True)


@pytest.mark.parametrize("change", ["cut", "replaced", "of another time"])
def test_another_temporary_file_is_not_put_in_place(root: Path, roots: Roots, change: str) -> None:
    placement = settled(roots, (root / "out").as_uri())
    if change == "cut":
        os.truncate(root / placement.temporary, 3)
    elif change == "of another time":  # as a later file that was given the same inode
        os.utime(root / placement.temporary, ns=(1, 1))
    else:
        write_file_uri(root, "evil", b"forged")
        (root / "evil").replace(root / placement.temporary)

    with pytest.raises(PathRefused):
        placement.finish(overwrite=False)

    assert not (root / "out").exists()


def test_a_description_that_names_another_file_moves_nothing(root: Path, roots: Roots) -> None:
    write_file_uri(root)
    found, url = (root / "plain.txt").stat(), (root / "out").as_uri()

    for attempt_id in ("plain.txt", "/../plain.txt"):
        forged = Commit(
            attempt_id=attempt_id,
            inode=found.st_ino,
            size_bytes=found.st_size,
            mtime_ns=found.st_mtime_ns,
        )
        with pytest.raises(PathRefused):
            target(roots, url, overwrite=True).finish(forged)
        with pytest.raises(PathRefused):
            target(roots, url).give_up(forged)

    assert names(root) == ["plain.txt"]


def test_a_temporary_file_is_discarded_once_or_twice(root: Path, roots: Roots) -> None:
    url = (root / "out").as_uri()
    with target(roots, url).prepare("1") as pending:
        pending.discard()
        pending.discard()
    placement = settled(roots, url)
    target(roots, url).give_up(placement.commit)
    target(roots, url).give_up(placement.commit)

    assert names(root) == []


def test_two_attempts_do_not_share_a_temporary_file(root: Path, roots: Roots) -> None:
    url = (root / "out").as_uri()
    settled(roots, url, "1")

    with pytest.raises(PathRefused):
        prepared(roots, url)
    settled(roots, url, "2")

    assert len(names(root)) == 2


def test_a_planted_link_is_not_written_through(tmp_path: Path, root: Path, roots: Roots) -> None:
    (root / temporary_name("job-1")).symlink_to(tmp_path / "victim")

    with pytest.raises(PathRefused):
        prepared(roots, (root / "out").as_uri())

    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("tag", ["", "a/b", "..", "a.b", "x" * 65, "ü"])
def test_a_tag_is_a_plain_word(tag: str) -> None:
    with pytest.raises(PathRefused, match="tag"):
        temporary_name(tag)


def test_no_descriptor_outlives_its_block(root: Path, roots: Roots) -> None:
    before = len(names(Path("/dev/fd")))
    settled(roots, (root / "out").as_uri()).finish(overwrite=False)
    with pytest.raises(TargetExists):
        prepared(roots, (root / "out").as_uri(), "2")

    assert len(names(Path("/dev/fd"))) == before


@pytest.mark.parametrize("overwrite", [False, True], ids=["create", "overwrite"])
def test_a_finished_target_survives_a_power_cut(
    root: Path, roots: Roots, monkeypatch: pytest.MonkeyPatch, *, overwrite: bool
) -> None:
    disk = recorded(monkeypatch)
    placement = settled(roots, (root / "out").as_uri(), overwrite=overwrite)
    before = len(disk.steps)
    placement.finish(overwrite=overwrite)

    assert ("sync", root) in disk.steps[:before], "a commit was described whose temporary file may vanish"
    disk.assert_survives(root / "out")


def test_each_new_directory_survives_a_power_cut(
    root: Path, roots: Roots, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = recorded(monkeypatch)
    roots.make_parents((root / "a/b/out").as_uri())

    a, b = root / "a", root / "a/b"
    assert disk.steps == [("mkdir", a), ("sync", root), ("mkdir", b), ("sync", a)]


# -- a payload that is moved as it is ------------------------------------------------------------------


def move(source: Path, into: IO[bytes], at: int) -> int:
    """Copy all but the first seven bytes of a file to ``at`` of another; the bytes that were reported."""
    told: list[int] = []
    pending = RootedPending("", -1, into.fileno(), cast("RootedTarget", None), "1")
    with source.open("rb") as file:
        payload = FileRange(file.fileno(), source.stat().st_size).tail(7)
        pending.copy(payload, at, ParallelOptions(progress=told.append))
    return sum(told)


@pytest.mark.parametrize("is_elsewhere", [False, True], ids=["one-file-system", "two-file-systems"])
def test_payload_is_moved_to_a_position_on_any_file_system(tmp_path: Path, *, is_elsewhere: bool) -> None:
    """A memfd is on a file system of its own, to which the kernel copies nothing."""
    (tmp_path / "in").write_bytes(data := os.urandom(20_000_003))
    fd = os.memfd_create("out") if is_elsewhere else os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    with os.fdopen(fd, "r+b", buffering=0) as into:
        assert move(tmp_path / "in", into, 100) == len(data) - 7
        assert into.read() == bytes(100) + data[7:]


def test_payload_that_finds_no_room_is_the_error_of_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(bytes(100_000))
    with Path("/dev/full").open("r+b", buffering=0) as full, pytest.raises(SpoolFull):
        move(tmp_path / "in", full, 0)
