"""Targets of jobs: complete and private or not there, put in place once by whoever finishes."""

import os
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kms_core.jobs.storage.local_paths import Placement, Roots, temporary_name
from kms_protocol.errors import PathRefused, TargetExists, Unavailable
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
    written,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "root"
    directory.mkdir()
    return directory


@pytest.fixture
def roots(root: Path) -> Roots:
    return Roots([root])


def settled(roots: Roots, url: str, tag: str = "job-1", *, overwrite: bool = False) -> Placement:
    with roots.prepare(url, tag, overwrite=overwrite) as pending:
        os.write(pending.fd, b"sealed")
        return pending.settle(lambda _: None)


def test_a_target_appears_at_once_complete_and_private(root: Path, roots: Roots) -> None:
    (root / "a").mkdir()
    url = (root / "a/out.age").as_uri()
    placement = settled(roots, url)
    before = names(root / "a")
    roots.finish(placement, overwrite=False)

    assert before == [".kms-job-1.tmp"]
    assert names(root / "a") == ["out.age"]
    assert (root / "a/out.age").read_bytes() == b"sealed"
    assert stat.S_IMODE((root / "a/out.age").stat().st_mode) == 0o600
    assert (root / "a/out.age").stat().st_nlink == 1


@pytest.mark.parametrize("overwrite", [False, True], ids=["create", "overwrite"])
def test_finishing_twice_changes_nothing(root: Path, roots: Roots, *, overwrite: bool) -> None:
    placement = settled(roots, (root / "out").as_uri(), overwrite=overwrite)
    roots.finish(placement, overwrite=overwrite)
    before = (root / "out").stat()
    roots.finish(placement, overwrite=overwrite)

    assert (root / "out").stat() == before
    assert names(root) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True], ids=["create", "overwrite"])
def test_a_crash_between_link_and_unlink_is_finished(root: Path, roots: Roots, *, overwrite: bool) -> None:
    placement = settled(roots, (root / "out").as_uri())
    (root / "out").hardlink_to(root / placement.temporary)
    roots.finish(placement, overwrite=overwrite)

    assert names(root) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True], ids=["create", "overwrite"])
def test_many_may_finish_at_once(root: Path, roots: Roots, *, overwrite: bool) -> None:
    failures: list[Exception] = []

    def finish(placement: Placement, barrier: threading.Barrier) -> None:
        barrier.wait()
        try:
            roots.finish(placement, overwrite=overwrite)
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


def test_an_existing_target_is_refused_before_any_work(root: Path, roots: Roots) -> None:
    url = written(root)

    with pytest.raises(TargetExists):
        roots.prepare(url, "job-1", overwrite=False)

    assert names(root) == ["plain.txt"]


def test_the_source_is_no_target_unless_overwriting_was_asked_for(root: Path, roots: Roots) -> None:
    url = written(root)
    with roots.open_source(url) as source:
        with pytest.raises(TargetExists):
            roots.prepare(url, "job-1", overwrite=False)
        placement = settled(roots, url, overwrite=True)
        source.check_unchanged()
        roots.finish(placement, overwrite=True)

    assert (root / "plain.txt").read_bytes() == b"sealed"


def test_a_target_that_appears_meanwhile_wins(root: Path, roots: Roots) -> None:
    placement = settled(roots, (root / "plain.txt").as_uri())
    written(root)

    with pytest.raises(TargetExists):
        roots.finish(placement, overwrite=False)

    assert (root / "plain.txt").read_bytes() == b"salary"
    assert (root / placement.temporary).exists()


@pytest.mark.parametrize("make", [a_directory, a_fifo, a_link_to_a_file], ids=["directory", "fifo", "link"])
def test_only_a_regular_file_is_overwritten(
    make: Callable[[Path, Path], Path], tmp_path: Path, root: Path, roots: Roots
) -> None:
    written(tmp_path, "secret")
    path = make(root, tmp_path)

    with pytest.raises(PathRefused):
        roots.prepare(path.as_uri(), "job-1", overwrite=True)


def test_overwriting_one_of_two_links_leaves_the_other(tmp_path: Path, root: Path, roots: Roots) -> None:
    written(tmp_path, "secret", b"other")
    path = a_hard_link(root, tmp_path)
    roots.finish(settled(roots, path.as_uri(), overwrite=True), overwrite=True)

    assert path.read_bytes() == b"sealed"
    assert (tmp_path / "secret").read_bytes() == b"other"


@pytest.mark.parametrize(
    "make",
    [
        beneath_a_linked_directory,
        beneath_a_missing_directory,
        beneath_a_file,
        the_root_itself,
        outside_the_root,
    ],
)
def test_a_target_lies_in_a_real_directory_beneath_the_root(
    make: Callable[[Path, Path], Path], tmp_path: Path, root: Path, roots: Roots
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    path = make(root, outside)

    with pytest.raises(PathRefused):
        roots.prepare(path.as_uri(), "job-1", overwrite=True)

    assert names(outside) == []


@pytest.mark.parametrize("put", [None, b"other!"], ids=["absent", "different"])
def test_a_result_that_vanished_is_told(root: Path, roots: Roots, put: bytes | None) -> None:
    placement = settled(roots, (root / "out").as_uri())
    (root / placement.temporary).unlink()
    if put is not None:
        written(root, "out", put)  # it may well be given the same inode
        os.utime(root / "out", ns=(1, 1))

    with pytest.raises(PathRefused, match="run the job again"):
        roots.finish(placement, overwrite=True)


def test_a_description_without_a_time_is_finished_too(root: Path, roots: Roots) -> None:
    placement = replace(settled(roots, (root / "out").as_uri()), mtime_ns=0)
    roots.finish(placement, overwrite=False)

    assert names(root) == ["out"]


@pytest.mark.parametrize("change", ["cut", "replaced"])
def test_another_temporary_file_is_not_put_in_place(root: Path, roots: Roots, change: str) -> None:
    placement = settled(roots, (root / "out").as_uri())
    if change == "cut":
        os.truncate(root / placement.temporary, 3)
    else:
        written(root, "evil", b"forged")
        (root / "evil").replace(root / placement.temporary)

    with pytest.raises(PathRefused):
        roots.finish(placement, overwrite=False)

    assert not (root / "out").exists()


def test_a_description_that_names_another_file_moves_nothing(root: Path, roots: Roots) -> None:
    written(root)
    found = (root / "plain.txt").stat()
    forged = Placement((root / "out").as_uri(), "plain.txt", found.st_ino, found.st_size)

    with pytest.raises(PathRefused):
        roots.finish(forged, overwrite=True)
    with pytest.raises(PathRefused):
        roots.finish(replace(forged, temporary="../root/plain.txt"), overwrite=True)
    with pytest.raises(PathRefused):
        roots.discard(forged.url, forged.temporary)

    assert names(root) == ["plain.txt"]


def test_a_temporary_file_is_discarded_once_or_twice(root: Path, roots: Roots) -> None:
    url = (root / "out").as_uri()
    with roots.prepare(url, "job-1", overwrite=False) as pending:
        pending.discard()
        pending.discard()
    settled(roots, url)
    roots.discard(url, temporary_name("job-1"))
    roots.discard(url, temporary_name("job-1"))

    assert names(root) == []


def test_two_attempts_do_not_share_a_temporary_file(root: Path, roots: Roots) -> None:
    url = (root / "out").as_uri()
    settled(roots, url, "job-1")

    with pytest.raises(PathRefused):
        roots.prepare(url, "job-1", overwrite=False)
    settled(roots, url, "job-2")

    assert len(names(root)) == 2


def test_a_planted_link_is_not_written_through(tmp_path: Path, root: Path, roots: Roots) -> None:
    (root / temporary_name("job-1")).symlink_to(tmp_path / "victim")

    with pytest.raises(PathRefused):
        roots.prepare((root / "out").as_uri(), "job-1", overwrite=False)

    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("tag", ["", "a/b", "..", "a.b", "x" * 65, "ü"])
def test_a_tag_is_a_plain_word(tag: str) -> None:
    with pytest.raises(ValueError, match="tag"):
        temporary_name(tag)


def test_no_descriptor_outlives_its_block(root: Path, roots: Roots) -> None:
    before = len(names(Path("/dev/fd")))
    roots.finish(settled(roots, (root / "out").as_uri()), overwrite=False)
    with pytest.raises(TargetExists):
        roots.prepare((root / "out").as_uri(), "job-2", overwrite=False)

    assert len(names(Path("/dev/fd"))) == before


@pytest.mark.parametrize("overwrite", [False, True], ids=["create", "overwrite"])
def test_a_finished_target_survives_a_power_cut(
    root: Path, roots: Roots, monkeypatch: pytest.MonkeyPatch, *, overwrite: bool
) -> None:
    disk = recorded(monkeypatch)
    placement = settled(roots, (root / "out").as_uri(), overwrite=overwrite)
    before = len(disk.steps)
    roots.finish(placement, overwrite=overwrite)

    assert ("sync", root) in disk.steps[:before], "a commit was described whose temporary file may vanish"
    disk.assert_survives(root / "out")


def test_each_new_directory_survives_a_power_cut(
    root: Path, roots: Roots, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = recorded(monkeypatch)
    roots.make_parents((root / "a/b/out").as_uri())

    a, b = root / "a", root / "a/b"
    assert disk.steps == [("mkdir", a), ("sync", root), ("mkdir", b), ("sync", a)]
