"""Paths of jobs: what may be named and opened. Root runs this too, as another user if modes count."""

import errno
import os
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms_core.jobs.file_patterns import Tree, parse_file_url
from kms_core.jobs.storage.local import ListedFile, Roots, file_errors, walk
from kms_protocol.errors import ConfigurationError, InvalidRequest, PathRefused, SpoolFull, Unavailable
from support.file_tree import (
    a_directory,
    a_fifo,
    a_hard_link,
    a_link_to_a_file,
    a_link_to_a_file_beneath,
    a_name_too_long,
    beneath_a_file,
    beneath_a_linked_directory,
    beneath_a_missing_directory,
    missing,
    names,
    outside_the_root,
    the_root_itself,
    write_file_uri,
)

NAMES = st.text(
    st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"], exclude_characters="/"),
    min_size=1,
    max_size=40,
).filter(lambda name: name not in {".", ".."} and not name.lower().startswith(".kms-"))


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
    assert str(parse_file_url(url)) == expected


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
        parse_file_url(url)


@given(st.lists(NAMES, min_size=1, max_size=5))
def test_every_plain_path_survives_its_url(names: list[str]) -> None:
    path = "/" + "/".join(names)

    assert str(parse_file_url("file://" + quote(path))) == path


@given(st.text(alphabet="/.%2eEfF5a?#:\x00\\ü", max_size=30))
def test_no_url_leads_out_of_its_root(tail: str) -> None:
    try:
        path = parse_file_url("file:///srv/root/" + tail)
    except PathRefused:
        return

    assert path.parts[:3] == ("/", "srv", "root")
    assert ".." not in path.parts


# -- roots -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given_root",
    [Path("data"), Path("/"), Path("/usr/.."), Path("/no/such/directory"), Path(__file__)],
    ids=["relative", "all", "dot-dot", "missing", "file"],
)
def test_a_root_that_allows_too_much_or_is_not_there_stops_the_start(given_root: Path) -> None:
    with pytest.raises(ConfigurationError):
        Roots([given_root])


@pytest.mark.parametrize("private", ["root", "root/spool", "."], ids=["same", "within", "around"])
def test_a_root_never_overlaps_what_the_service_keeps_to_itself(
    tmp_path: Path, root: Path, private: str
) -> None:
    (tmp_path / "link").symlink_to(root)

    for name in ("root", "link"):
        with pytest.raises(ConfigurationError):
            Roots([tmp_path / name], [tmp_path / private])


def test_a_root_beside_what_the_service_keeps_is_fine(tmp_path: Path, root: Path) -> None:
    url = write_file_uri(root)

    Roots([root], [tmp_path / "spool", tmp_path / "root.key"]).check(url)


def test_a_path_beneath_no_root_is_refused(tmp_path: Path, root: Path, roots: Roots) -> None:
    beside, beneath = write_file_uri(tmp_path, "root2/a"), write_file_uri(root)

    for checked, url in ((roots, beside), (Roots([]), beneath)):
        with pytest.raises(PathRefused):
            checked.check(url)


def test_a_root_behind_a_link_is_known_by_both_names(tmp_path: Path, root: Path) -> None:
    write_file_uri(root)
    (tmp_path / "link").symlink_to(root)
    roots = Roots([tmp_path / "link"])

    for directory in (root, tmp_path / "link"):
        with roots.open_source((directory / "plain.txt").as_uri()) as source:
            assert source.reader.size == 6


# -- sources -----------------------------------------------------------------------------------------


def opened(roots: Roots, url: str) -> None:
    with roots.open_source(url):
        pass


def test_a_source_in_a_subdirectory_is_read(root: Path, roots: Roots) -> None:
    url = write_file_uri(root, "a/b/ü %.txt")

    with roots.open_source(url) as source:
        data = os.read(source.fd, 100)
        source.check_unchanged()

    assert data == b"salary"
    assert source.reader.size == 6


@pytest.mark.parametrize(
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
def test_anything_but_a_plain_file_beneath_the_root_is_refused(
    make: Callable[[Path, Path], Path], tmp_path: Path, root: Path, roots: Roots
) -> None:
    outside = tmp_path / "outside"
    write_file_uri(outside, "secret", b"other")
    path = make(root, outside)

    with pytest.raises(PathRefused) as refused:
        opened(roots, path.as_uri())

    assert str(tmp_path) not in refused.value.detail
    assert "secret" not in refused.value.detail


def test_a_socket_and_a_device_are_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        for root, name in ((tmp_path, "s"), (Path("/dev"), "zero")):
            with pytest.raises(PathRefused):
                opened(Roots([root]), (root / name).as_uri())


def test_a_refusal_keeps_no_descriptor_open(root: Path, roots: Roots) -> None:
    a_directory(root, root)
    before = len(names(Path("/dev/fd")))
    for name in ("dir", "missing", "missing/a", "dir/a/b"):
        with pytest.raises(PathRefused):
            opened(roots, (root / name).as_uri())

    assert len(names(Path("/dev/fd"))) == before


@pytest.mark.parametrize("data", [b"salarY", b"salary!", b""], ids=["other", "longer", "cut"])
def test_a_source_that_is_written_to_meanwhile_is_noticed(root: Path, roots: Roots, data: bytes) -> None:
    url = write_file_uri(root)
    os.utime(root / "plain.txt", ns=(0, 0))

    with roots.open_source(url) as source:
        (root / "plain.txt").write_bytes(data)

        with pytest.raises(InvalidRequest):
            source.check_unchanged()


def test_a_source_that_is_replaced_meanwhile_is_read_as_it_was(root: Path, roots: Roots) -> None:
    url = write_file_uri(root)

    with roots.open_source(url) as source:
        write_file_uri(root, "new", b"other!")
        (root / "new").replace(root / "plain.txt")
        data = os.read(source.fd, 100)
        source.check_unchanged()

    assert data == b"salary"


def test_a_directory_that_turns_into_a_link_leads_nowhere(tmp_path: Path, root: Path, roots: Roots) -> None:
    """Another thread swaps directory and link; each open gives the file beneath the root or a refusal."""
    write_file_uri(tmp_path, "outside/plain.txt", b"secret")
    url = write_file_uri(root, "dir/plain.txt")
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


# -- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, SpoolFull),
        (errno.EDQUOT, SpoolFull),
        (errno.EACCES, PathRefused),
        (errno.EROFS, PathRefused),
        (errno.EFBIG, PathRefused),
        (errno.ENOTSUP, PathRefused),
        (errno.EIO, Unavailable),
        (errno.EMFILE, Unavailable),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
def test_what_the_kernel_says_is_an_error_of_ours(number: int, expected: type[Exception]) -> None:
    with pytest.raises(expected) as raised, file_errors():
        raise OSError(number, os.strerror(number), "/home/other/secret")

    assert "/home/other" not in str(raised.value)


def test_a_directory_that_may_be_listed_and_not_entered_ends_no_listing() -> None:
    """Opening its files gives the error of each."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as folder:  # not that of pytest
        Path(folder).chmod(0o755)
        write_file_uri(root := Path(folder, "root"), "closed/file")
        (root / "closed").chmod(0o444)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            found = [*walk(Roots([root]), Tree.parse(f"{root.as_uri()}/**"))]
        finally:
            os.seteuid(user)
            (root / "closed").chmod(0o700)

    assert found == [ListedFile("closed/file", 0)]
