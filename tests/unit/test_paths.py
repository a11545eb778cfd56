"""Paths of jobs: what may be named, opened and put in place. No permission bits: root runs this too."""

import errno
import os
import socket
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms_core.errors import (
    ConfigurationError,
    InvalidRequest,
    PathRefused,
    SpoolFull,
    TargetExists,
    Unavailable,
)
from kms_core.jobs.paths import Placement, Roots, file_errors, parse, temporary_name

NAMES = st.text(
    st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"], exclude_characters="/"),
    min_size=1,
    max_size=40,
).filter(lambda name: name not in {".", ".."} and not name.lower().startswith(".kms-"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "root"
    directory.mkdir()
    return directory


@pytest.fixture
def roots(root: Path) -> Roots:
    return Roots([root])


def written(root: Path, name: str = "plain.txt", data: bytes = b"salary") -> str:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path.as_uri()


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def settled(roots: Roots, url: str, tag: str = "job-1", *, overwrite: bool = False) -> Placement:
    with roots.prepare(url, tag, overwrite=overwrite) as pending:
        os.write(pending.fd, b"sealed")
        return pending.settle()


# -- URLs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        pytest.param("file:///srv/a", "/srv/a", id="plain"),
        pytest.param("file://localhost/srv/a", "/srv/a", id="localhost"),
        pytest.param("file:///srv/a%20b", "/srv/a b", id="space"),
        pytest.param("file:///srv/%252e%252e", "/srv/%2e%2e", id="decoded-once"),
        pytest.param("file:///srv/%C3%BC", "/srv/ü", id="utf-8"),
        pytest.param("file:///srv/ü", "/srv/ü", id="unencoded"),
        pytest.param("file:///srv/...", "/srv/...", id="three-dots"),
        pytest.param("file:///srv/a\\..\\b", "/srv/a\\..\\b", id="backslash-is-a-letter"),
    ],
)
def test_a_url_names_one_path(url: str, expected: str) -> None:
    assert str(parse(url)) == expected


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("", id="empty"),
        pytest.param("/srv/a", id="bare-path"),
        pytest.param("s3://bucket/a", id="other-scheme"),
        pytest.param("file:/srv/a", id="one-slash"),
        pytest.param("file://srv/a", id="host"),
        pytest.param("file://localhost", id="no-path"),
        pytest.param("file://user@localhost/srv/a", id="user"),
        pytest.param("file://localhost:80/srv/a", id="port"),
        pytest.param(" file:///srv/a", id="leading-space"),
        pytest.param("file:///", id="slash"),
        pytest.param("file:////srv/a", id="four-slashes"),
        pytest.param("file:///srv//a", id="double-slash"),
        pytest.param("file:///srv/a/", id="trailing-slash"),
        pytest.param("file:///srv/./a", id="dot"),
        pytest.param("file:///srv/../a", id="dot-dot"),
        pytest.param("file:///srv/%2e%2e/a", id="encoded-dot-dot"),
        pytest.param("file:///srv/.%2E/a", id="half-encoded-dot-dot"),
        pytest.param("file:///srv/..%2fa", id="encoded-slash"),
        pytest.param("file:///srv/a%00b", id="nul"),
        pytest.param("file:///srv/a%0ab", id="encoded-newline"),
        pytest.param("file:///srv/a\nb", id="newline"),
        pytest.param("file:///srv/a\tb", id="tab"),
        pytest.param("file:///srv/a\u2028b", id="line-separator"),
        pytest.param("file:///srv/a\udc80b", id="surrogate"),
        pytest.param("file:///srv/%ff", id="not-utf-8"),
        pytest.param("file:///srv/%c0%ae%c0%ae", id="overlong-dots"),
        pytest.param("file:///srv/100%", id="lone-percent"),
        pytest.param("file:///srv/%zz", id="bad-escape"),
        pytest.param("file:///srv/a?b", id="query"),
        pytest.param("file:///srv/a#b", id="fragment"),
        pytest.param("file:///srv/.kms-job-1.tmp", id="temporary-name"),
        pytest.param("file:///srv/%2Ekms-job-1.TMP", id="temporary-name-in-disguise"),
        pytest.param("file:///" + "a" * 20_000, id="too-long"),
    ],
)
def test_a_url_that_could_be_read_in_two_ways_is_refused(url: str) -> None:
    with pytest.raises(PathRefused):
        parse(url)


@given(st.lists(NAMES, min_size=1, max_size=5))
def test_every_plain_path_survives_its_url(names: list[str]) -> None:
    path = "/" + "/".join(names)

    assert str(parse("file://" + quote(path))) == path


@given(st.text(alphabet="/.%2eEfF5a?#:\x00\\ü", max_size=30))
def test_no_url_leads_out_of_its_root(tail: str) -> None:
    try:
        path = parse("file:///srv/root/" + tail)
    except PathRefused:
        return

    assert path.parts[:3] == ("/", "srv", "root")
    assert ".." not in path.parts


# -- roots -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given_root", [Path("data"), Path("/"), Path("/usr/.."), Path("/no/such/directory")], ids=str
)
def test_a_root_that_allows_too_much_or_is_not_there_stops_the_start(given_root: Path) -> None:
    with pytest.raises(ConfigurationError):
        Roots([given_root])


def test_a_file_is_no_root(tmp_path: Path) -> None:
    written(tmp_path, "file")

    with pytest.raises(ConfigurationError):
        Roots([tmp_path / "file"])


@pytest.mark.parametrize("private", ["root", "root/spool", "."], ids=["same", "within", "around"])
def test_a_root_never_overlaps_what_the_service_keeps_to_itself(
    tmp_path: Path, root: Path, private: str
) -> None:
    (tmp_path / "link").symlink_to(root)

    for name in ("root", "link"):
        with pytest.raises(ConfigurationError):
            Roots([tmp_path / name], [tmp_path / private])


def test_a_root_beside_what_the_service_keeps_is_fine(tmp_path: Path, root: Path) -> None:
    url = written(root)

    Roots([root], [tmp_path / "spool", tmp_path / "root.key"]).check(url)


def test_a_neighbour_with_the_same_beginning_is_not_beneath_the_root(tmp_path: Path, roots: Roots) -> None:
    with pytest.raises(PathRefused):
        roots.check(written(tmp_path, "root2/a"))


def test_a_root_behind_a_link_is_known_by_both_names(tmp_path: Path, root: Path) -> None:
    written(root)
    (tmp_path / "link").symlink_to(root)
    roots = Roots([tmp_path / "link"])

    for directory in (root, tmp_path / "link"):
        with roots.open_source((directory / "plain.txt").as_uri()) as source:
            assert source.size_bytes == 6


def test_without_roots_every_path_is_refused(root: Path) -> None:
    with pytest.raises(PathRefused):
        Roots([]).check(written(root))


# -- sources -----------------------------------------------------------------------------------------


def test_a_source_in_a_subdirectory_is_read(root: Path, roots: Roots) -> None:
    url = written(root, "a/b/ü %.txt")

    with roots.open_source(url) as source:
        data = os.read(source.fd, 100)
        source.check_unchanged()

    assert data == b"salary"
    assert source.size_bytes == 6


def a_link_to_a_file(root: Path, outside: Path) -> Path:
    (root / "link").symlink_to(outside / "secret")
    return root / "link"


def a_link_to_a_file_beneath(root: Path, _: Path) -> Path:
    written(root, "inner")
    (root / "link").symlink_to("inner")
    return root / "link"


def beneath_a_linked_directory(root: Path, outside: Path) -> Path:
    (root / "dir").symlink_to(outside, target_is_directory=True)
    return root / "dir/secret"


def a_hard_link(root: Path, outside: Path) -> Path:
    (root / "hard").hardlink_to(outside / "secret")
    return root / "hard"


def a_fifo(root: Path, _: Path) -> Path:
    os.mkfifo(root / "fifo")
    return root / "fifo"


def a_directory(root: Path, _: Path) -> Path:
    (root / "dir").mkdir()
    return root / "dir"


def beneath_a_file(root: Path, _: Path) -> Path:
    written(root, "file")
    return root / "file/below"


def missing(root: Path, _: Path) -> Path:
    return root / "missing"


def beneath_a_missing_directory(root: Path, _: Path) -> Path:
    return root / "missing/file"


def the_root_itself(root: Path, _: Path) -> Path:
    return root


def a_name_too_long(root: Path, _: Path) -> Path:
    return root / ("a" * 256)


def outside_the_root(_: Path, outside: Path) -> Path:
    return outside / "secret"


type_of_refusal = pytest.mark.parametrize(
    "make",
    [
        a_link_to_a_file,
        a_link_to_a_file_beneath,
        beneath_a_linked_directory,
        a_hard_link,
        a_fifo,
        a_directory,
        beneath_a_file,
        missing,
        beneath_a_missing_directory,
        the_root_itself,
        a_name_too_long,
        outside_the_root,
    ],
)


@type_of_refusal
def test_anything_but_a_plain_file_beneath_the_root_is_refused(
    make: Callable[[Path, Path], Path], tmp_path: Path, root: Path, roots: Roots
) -> None:
    outside = tmp_path / "outside"
    written(outside, "secret", b"other")
    path = make(root, outside)

    with pytest.raises(PathRefused) as refused:
        roots.open_source(path.as_uri())

    assert str(tmp_path) not in refused.value.detail
    assert "secret" not in refused.value.detail


def test_a_socket_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))

        with pytest.raises(PathRefused):
            Roots([tmp_path]).open_source((tmp_path / "s").as_uri())


def test_a_device_is_refused() -> None:
    with pytest.raises(PathRefused):
        Roots([Path("/dev")]).open_source("file:///dev/zero")


def test_a_refusal_keeps_no_descriptor_open(root: Path, roots: Roots) -> None:
    a_directory(root, root)
    before = len(names(Path("/dev/fd")))
    for name in ("dir", "missing", "missing/a", "dir/a/b"):
        with pytest.raises(PathRefused):
            roots.open_source((root / name).as_uri())

    assert len(names(Path("/dev/fd"))) == before


@pytest.mark.parametrize("data", [b"salarY", b"salary!", b""], ids=["other", "longer", "cut"])
def test_a_source_that_is_written_to_meanwhile_is_noticed(root: Path, roots: Roots, data: bytes) -> None:
    url = written(root)
    os.utime(root / "plain.txt", ns=(0, 0))

    with roots.open_source(url) as source:
        (root / "plain.txt").write_bytes(data)

        with pytest.raises(InvalidRequest):
            source.check_unchanged()


def test_a_source_that_is_replaced_meanwhile_is_read_as_it_was(root: Path, roots: Roots) -> None:
    url = written(root)

    with roots.open_source(url) as source:
        written(root, "new", b"other!")
        (root / "new").replace(root / "plain.txt")
        data = os.read(source.fd, 100)
        source.check_unchanged()

    assert data == b"salary"


def test_a_directory_that_turns_into_a_link_leads_nowhere(tmp_path: Path, root: Path, roots: Roots) -> None:
    """Another thread swaps directory and link; each open gives the file beneath the root or a refusal."""
    written(tmp_path, "outside/plain.txt", b"secret")
    url = written(root, "dir/plain.txt")
    (root / "link").symlink_to(tmp_path / "outside", target_is_directory=True)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for old, new in (("dir", "away"), ("link", "dir"), ("dir", "link"), ("away", "dir")):
                (root / old).rename(root / new)

    swapper = threading.Thread(target=swap)
    swapper.start()
    seen: set[bytes] = set()
    try:
        for _ in range(500):
            try:
                with roots.open_source(url) as source:
                    seen.add(os.read(source.fd, 100))
            except PathRefused:
                continue
    finally:
        stop.set()
        swapper.join()

    assert seen <= {b"salary"}


# -- targets -----------------------------------------------------------------------------------------


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


# -- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, SpoolFull),
        (errno.EDQUOT, SpoolFull),
        (errno.EACCES, PathRefused),
        (errno.EROFS, PathRefused),
        (errno.EIO, Unavailable),
        (errno.EMFILE, Unavailable),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
def test_what_the_kernel_says_is_an_error_of_ours(number: int, expected: type[Exception]) -> None:
    with pytest.raises(expected) as raised, file_errors():
        raise OSError(number, os.strerror(number), "/home/other/secret")

    assert "/home/other" not in str(raised.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_full_disk_is_told_as_such() -> None:
    with pytest.raises(SpoolFull), file_errors(), Path("/dev/full").open("wb", buffering=0) as full:
        full.write(b"x")
