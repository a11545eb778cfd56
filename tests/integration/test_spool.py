"""The spool on a real disk: sealed at rest, bound to its job, bounded, and clean after every failure."""

import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from pyrage import x25519

from kms_core.age import header
from kms_core.backends.age import AgeBackend, KeyFiles
from kms_core.jobs.sealed_records import RecordKey
from kms_core.jobs.storage.multipart_journal import MultipartJournal
from kms_core.jobs.storage.spool import ITEMS, UPLOAD, Label, Spool
from kms_protocol.errors import (
    DecryptFailed,
    NotACiphertext,
    RecordRefused,
    ResultExpired,
    SpoolFull,
    Unavailable,
)
from smalldisk import small_disk

JOB = "11111111-1111-1111-1111-111111111111"
OTHER = "22222222-2222-2222-2222-222222222222"
SECRET = b"Kanarienvogel-4711 " * 1000
CIPHERTEXT = b"age-encryption.org/v1\n-> whatever"
MIB = 1024 * 1024
BLOCK = 131_072


@pytest.fixture
def key(tmp_path: Path) -> AgeBackend:
    path = tmp_path / "spool.key"
    path.write_text(str(x25519.Identity.generate()))
    path.chmod(0o600)
    return AgeBackend(KeyFiles(path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "spool").mkdir(0o700)
    return tmp_path / "spool"


@pytest.fixture
def spool(folder: Path, key: AgeBackend) -> Spool:
    return made(folder, key)


def made(folder: Path, key: AgeBackend, max_bytes: int = 64 * MIB) -> Spool:
    return Spool(folder, key, RecordKey(key.secrets()), max_bytes)


VALID = header.render([header.Stanza(("X25519", "x"), bytes(32))], bytes(16)) + bytes(16)
"""A header by the grammar, and a nonce."""
CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "a byte less": lambda data: data[:-1],
    "a block less": lambda data: data[: 2 * BLOCK],
    "a byte more": lambda data: data + b"x",
    "a block more": lambda data: data + data[-BLOCK:],
    "blocks exchanged": lambda data: (
        data[:BLOCK] + data[2 * BLOCK : 3 * BLOCK] + data[BLOCK : 2 * BLOCK] + data[3 * BLOCK :]
    ),
    "a block twice": lambda data: data[:BLOCK] + data[:BLOCK] + data[2 * BLOCK :],
    "content without MACs": lambda data: data[:-64],
    "MACs exchanged": lambda data: data[:-64] + data[-48:-32] + data[-64:-48] + data[-32:],
}


def content_of(spool: Spool, at: Label) -> bytes:
    with spool.blob(at) as blob:
        return blob.file.read_at(0, blob.file.size)


def label(job_id: str = JOB, role: str = UPLOAD, tenant: str = "default", attempt: int = 0) -> Label:
    return Label(tenant, job_id, role, attempt)


def write(spool: Spool, at: Label, *pieces: bytes, sealed: bool = True) -> Label:
    """Write a blob; the label that reads it."""
    with spool.writing(at, sealed=sealed) as out:
        for piece in pieces or (SECRET,):
            out.write(piece)
    return replace(at, ref=out.ref)


def break_off(spool: Spool, at: Label) -> None:
    with spool.writing(at) as out:
        out.write(SECRET)
        raise ConnectionError


def read(spool: Spool, at: Label) -> bytes:
    with spool.opened(at) as reader:
        return b"".join(reader.slabs())


def content(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, MIB, 3 * MIB + 1], ids=str)
@pytest.mark.parametrize("step", [1000, 65_536, 10 * MIB], ids=str)
def test_what_is_written_in_pieces_is_read_whole(spool: Spool, size: int, step: int) -> None:
    data = os.urandom(size)
    written = write(spool, label(), *(data[start : start + step] for start in range(0, max(1, size), step)))

    assert read(spool, written) == data


def test_nothing_of_the_plaintext_rests(spool: Spool, folder: Path) -> None:
    write(spool, label())

    assert SECRET[:19] not in (folder / JOB / "upload").read_bytes()


def test_only_the_service_may_read(spool: Spool, folder: Path) -> None:
    write(spool, label())
    write(spool, label(role="head", attempt=1), CIPHERTEXT, sealed=False)

    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode) for path in [folder / JOB, *(folder / JOB).iterdir()]
    }
    assert modes == {JOB: 0o700, "upload": 0o600, "head.1": 0o600}


@pytest.mark.parametrize(
    "other",
    [label(OTHER), label(role=ITEMS), label(tenant="another"), label(attempt=1)],
    ids=["job", "role", "tenant", "attempt"],
)
def test_blob_passes_for_no_other(spool: Spool, folder: Path, other: Label) -> None:
    written = write(spool, label())
    target = folder / other.job_id / other.name
    target.parent.mkdir(exist_ok=True)
    if other.tenant == "default":
        (folder / JOB / "upload").rename(target)

    for ref in (written.ref, b""):
        with pytest.raises(RecordRefused if ref else DecryptFailed):
            read(spool, replace(other, ref=ref))


PLACES = {
    "version line": 0,
    "stanza": 40,
    "first block": 30_000,
    "last byte of a block": BLOCK - 1,
    "first byte of the second block": BLOCK,
    "last byte of the last block": -65,
    "first MAC": -64,
    "last MAC": -1,
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "as-is"])
def test_damaged_blob_is_refused(spool: Spool, folder: Path, place: int, *, sealed: bool) -> None:
    written = write(spool, label(), VALID + bytes(500_000), sealed=sealed)
    path = folder / JOB / "upload"
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 1
    path.write_bytes(damaged)

    with pytest.raises(RecordRefused):
        content_of(spool, written)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "as-is"])
def test_blob_of_another_size_or_order_is_refused(
    spool: Spool, folder: Path, change: Callable[[bytes], bytes], *, sealed: bool
) -> None:
    written = write(spool, label(), VALID + os.urandom(500_000), sealed=sealed)
    path = folder / JOB / "upload"
    path.write_bytes(change(path.read_bytes()))

    with pytest.raises(RecordRefused):
        content_of(spool, written)


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "as-is"])
def test_earlier_blob_of_the_same_name_is_refused(spool: Spool, folder: Path, *, sealed: bool) -> None:
    write(spool, label(), VALID + b"old", sealed=sealed)
    old = (folder / JOB / "upload").read_bytes()
    written = write(spool, label(), VALID + b"new", sealed=sealed)
    (folder / JOB / "upload").write_bytes(old)

    with pytest.raises(RecordRefused):
        content_of(spool, written)


def test_blob_of_the_same_key_and_content_passes_for_no_other(spool: Spool, folder: Path) -> None:
    """What rests as it is holds no names of ours: only its MACs tell one place from another."""
    written = write(spool, label(), VALID, sealed=False)
    mine = (folder / JOB / "upload").read_bytes()
    for other in (label(role="head", attempt=1), label(OTHER), label(tenant="another")):
        theirs = write(spool, other, VALID, sealed=False)
        (folder / other.job_id / other.name).write_bytes(mine)

        for ref in (written.ref, theirs.ref):
            with pytest.raises(RecordRefused):
                content_of(spool, replace(other, ref=ref))


@pytest.mark.parametrize("size", [22, 131_071, 131_072, 131_073, 262_144, 600_000], ids=str)
def test_any_part_of_a_blob_is_read(spool: Spool, size: int) -> None:
    data = (VALID + os.urandom(600_000))[: max(size, len(VALID))]
    written = write(
        spool, label(), *(data[at : at + 70_001] for at in range(0, len(data), 70_001)), sealed=False
    )
    edges = {0, 1, 100, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, len(data) - 1, len(data)}

    with spool.blob(written) as blob:
        assert blob.file.size == len(data)
        for start in edges:
            for stop in edges:
                assert blob.file.read_at(start, stop - start) == data[start:stop]
                view = bytearray(max(0, stop - start))
                whole = blob.file.read_into([memoryview(view)], start)
                assert whole == (start + len(view) <= len(data))
                assert not whole or bytes(view) == data[start : start + len(view)]
        tail = blob.file.tail(100)
        assert (tail.read_at(0, 170_000), tail.size) == (data[100:170_100], len(data) - 100)


def test_blob_changed_while_it_is_open_is_refused(spool: Spool, folder: Path) -> None:
    written = write(spool, label(), VALID + bytes(500_000), sealed=False)

    with ExitStack() as stack:
        blob = stack.enter_context(spool.blob(written))
        assert blob.file.read_at(140_000, 10) == bytes(10)
        os.pwrite(stack.enter_context((folder / JOB / "upload").open("r+b")).fileno(), b"x", 140_000)
        blob.file.read_at(1, 10)
        with pytest.raises(RecordRefused):
            blob.file.read_at(140_000, 10)


def test_blob_cut_while_it_is_open_is_refused(spool: Spool, folder: Path) -> None:
    written = write(spool, label(), VALID + bytes(500_000), sealed=False)

    with spool.blob(written) as blob:
        os.truncate(folder / JOB / "upload", BLOCK + 5000)
        with pytest.raises(RecordRefused):
            blob.file.read_at(200_000, 10)


def test_blobs_without_macs_are_those_of_0_1(spool: Spool, folder: Path) -> None:
    """A record that names no ref is of 0.1: its blobs are read as they were written then."""
    (folder / JOB).mkdir()
    (folder / JOB / "upload").write_bytes(VALID + b"payload")

    with spool.blob(label()) as blob:
        assert blob.file.read_at(0, 10_000) == VALID + b"payload"


def test_key_that_was_rotated_still_opens(
    spool: Spool, folder: Path, key: AgeBackend, tmp_path: Path
) -> None:
    before = write(spool, label())
    with (tmp_path / "spool.key").open("a") as file:
        file.write(f"\n{x25519.Identity.generate()}\n")
    rotated = made(folder, AgeBackend(KeyFiles(tmp_path / "spool.key")))
    after = write(rotated, label(OTHER))

    assert read(rotated, before) == read(rotated, after) == SECRET
    assert key.current_version() != AgeBackend(KeyFiles(tmp_path / "spool.key")).current_version()


# -- failures ------------------------------------------------------------------------------------------


def test_broken_writing_leaves_nothing(spool: Spool, folder: Path) -> None:
    with pytest.raises(ConnectionError):
        break_off(spool, label())

    assert content(folder) == []


def test_broken_writing_leaves_the_other_blobs_of_its_job(spool: Spool, folder: Path) -> None:
    write(spool, label())

    with pytest.raises(ConnectionError):
        break_off(spool, label(role="result", attempt=1))

    assert content(folder) == [JOB, f"{JOB}/upload"]


def test_half_of_an_attempt_that_died_is_written_over(spool: Spool, folder: Path) -> None:
    write(spool, label(role="result", attempt=1))
    os.truncate(folder / JOB / "result.1", 300)

    written = write(spool, label(role="result", attempt=1), b"whole")

    assert read(spool, written) == b"whole"


def test_spool_above_its_limit_is_full(key: AgeBackend, folder: Path) -> None:
    small = made(folder, key, 100_000)

    with pytest.raises(SpoolFull):
        write(small, label(), bytes(60_000), bytes(60_000))

    assert content(folder) == []


def test_limit_counts_what_is_there_already(key: AgeBackend, folder: Path) -> None:
    write(made(folder, key, 100_000), label(), bytes(60_000))

    with pytest.raises(SpoolFull):
        write(made(folder, key, 100_000), label(OTHER), bytes(60_000))

    assert content(folder) == [JOB, f"{JOB}/upload"]


def test_announced_size_is_refused_before_a_byte(key: AgeBackend, folder: Path) -> None:
    with pytest.raises(SpoolFull), made(folder, key, 100_000).writing(label(), declared_bytes=100_001):
        pytest.fail("the body must not be read")

    assert content(folder) == []


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 1 MiB."""
    with small_disk(tmp_path / "disk", MIB) as disk:
        yield disk


def test_disk_that_fills_up_is_a_full_spool(key: AgeBackend, full_disk: Path) -> None:
    spool = made(full_disk, key)

    with pytest.raises(SpoolFull):
        write(spool, label(), bytes(2 * MIB))

    assert content(full_disk) == []
    write(spool, label(OTHER))


def test_disk_that_is_full_refuses_a_head(key: AgeBackend, full_disk: Path) -> None:
    spool = made(full_disk, key)
    write(spool, label())
    (full_disk / "filler").write_bytes(bytes(shutil.disk_usage(full_disk).free))

    with pytest.raises(SpoolFull):
        write(spool, label(role="head", attempt=1), CIPHERTEXT + bytes(5000), sealed=False)

    assert content(full_disk) == [JOB, f"{JOB}/upload", "filler"]


# -- uploads that are ciphertexts --------------------------------------------------------------------


@pytest.mark.parametrize(
    "pieces",
    [[b""], [b"age"], [b"hello"], [b"age-encryption.org/v1"], [b"age-encryption.org/v2\n"], [b"a"] * 30],
    ids=repr,
)
def test_ciphertext_is_known_by_its_first_line(spool: Spool, folder: Path, pieces: list[bytes]) -> None:
    with pytest.raises(NotACiphertext):
        write(spool, label(), *pieces, sealed=False)

    assert content(folder) == []


def test_ciphertext_rests_as_it_is(spool: Spool, folder: Path) -> None:
    write(spool, label(), *(bytes([byte]) for byte in CIPHERTEXT), sealed=False)

    assert (folder / JOB / "upload").read_bytes()[:-16] == CIPHERTEXT


# -- deleting ------------------------------------------------------------------------------------------


def test_deleted_job_is_gone_and_deleting_twice_is_no_error(spool: Spool, folder: Path) -> None:
    write(spool, label())
    write(spool, label(OTHER))

    spool.delete(JOB)
    spool.delete(JOB)
    spool.discard(label(OTHER, ITEMS))

    assert content(folder) == [OTHER, f"{OTHER}/upload"]
    with pytest.raises(ResultExpired):
        read(spool, label())


@pytest.mark.parametrize(
    "name", ["..", "../spool", "/etc", "", "x", JOB + "/../" + OTHER, JOB.upper() + "x"], ids=repr
)
def test_only_job_ids_name_folders(spool: Spool, folder: Path, name: str) -> None:
    with pytest.raises(ResultExpired):
        write(spool, label(name))
    spool.delete(name)  # of what is no id of a job there is nothing

    assert sorted(folder.parent.iterdir()) == [folder, folder.parent / "spool.key"]


def link(path: Path, kept: Path) -> None:
    path.rename(kept)
    path.symlink_to(kept)


def pipe(path: Path, kept: Path) -> None:
    path.rename(kept)
    os.mkfifo(path)


def directory(path: Path, kept: Path) -> None:
    path.rename(kept)
    path.mkdir()


def folder_link(path: Path, kept: Path) -> None:
    path.parent.rename(kept)
    path.parent.symlink_to(kept)


def file_as_folder(path: Path, kept: Path) -> None:
    path.parent.rename(kept)
    path.parent.touch()


OTHERS = [link, pipe, directory, folder_link, file_as_folder]


@pytest.mark.parametrize("ref", [True, False], ids=["with-ref", "of-0.1"])
@pytest.mark.parametrize("other", OTHERS)
def test_only_plain_files_are_read(
    spool: Spool, folder: Path, tmp_path: Path, other: Callable[[Path, Path], None], *, ref: bool
) -> None:
    written = write(spool, label())
    other(folder / JOB / "upload", tmp_path / "kept")

    with pytest.raises(RecordRefused):
        read(spool, written if ref else label())


@pytest.mark.parametrize("other", [directory, folder_link, file_as_folder])
def test_nothing_is_written_elsewhere(
    spool: Spool, folder: Path, tmp_path: Path, other: Callable[[Path, Path], None]
) -> None:
    write(spool, label())
    kept = tmp_path / "kept"
    other(folder / JOB / "upload", kept)
    before = content(kept), kept.stat().st_mtime_ns

    with pytest.raises(Unavailable):
        write(spool, label())
    if other is not directory:
        spool.discard(label())

    assert (content(kept), kept.stat().st_mtime_ns) == before


def test_a_link_or_a_pipe_is_written_over(spool: Spool, folder: Path, tmp_path: Path) -> None:
    for number, other in enumerate((link, pipe)):
        write(spool, label())
        other(folder / JOB / "upload", tmp_path / f"kept{number}")
        before = (tmp_path / f"kept{number}").read_bytes()

        assert read(spool, write(spool, label(), b"new")) == b"new"
        assert (tmp_path / f"kept{number}").read_bytes() == before


def test_hard_link_to_another_blob_is_refused(spool: Spool, folder: Path) -> None:
    written, other = write(spool, label()), write(spool, label(OTHER))
    (folder / JOB / "upload").unlink()
    (folder / JOB / "upload").hardlink_to(folder / OTHER / "upload")

    with pytest.raises(RecordRefused):
        read(spool, written)
    assert read(spool, other) == SECRET


@pytest.mark.parametrize("other", [link, pipe, directory, folder_link, file_as_folder])
def test_notes_of_uploads_are_plain_files(
    folder: Path, tmp_path: Path, other: Callable[[Path, Path], None]
) -> None:
    """Their text goes to an object store: a link would send it another file's."""
    notes, url = MultipartJournal(folder / "multipart"), "s3://bucket/key"
    notes.add(JOB, 1, url, "upload-1")
    assert notes.find(JOB, 1, url) == "upload-1"
    (path,) = (folder / "multipart").iterdir()
    other(path, tmp_path / "kept")

    assert notes.find(JOB, 1, url) is None
    notes.forget(JOB, 1, url)
    assert (tmp_path / "kept").exists()


def test_no_note_is_written_through_a_link(folder: Path, tmp_path: Path) -> None:
    notes, url = MultipartJournal(folder / "multipart"), "s3://bucket/key"
    notes.add(JOB, 1, url, "upload-1")
    (path,) = (folder / "multipart").iterdir()
    (tmp_path / "kept").write_bytes(b"mine")
    path.with_name(f"{path.name}.tmp").symlink_to(tmp_path / "kept")

    notes.add(JOB, 1, url, "upload-2")

    assert (tmp_path / "kept").read_bytes() == b"mine"
    assert notes.find(JOB, 1, url) == "upload-2"


def test_old_folders_are_candidates_for_the_sweep(spool: Spool, folder: Path) -> None:
    write(spool, label())
    write(spool, label(OTHER))
    (folder / "lost+found").mkdir()
    past = time.time() - 100
    for path in (folder / JOB, folder / "lost+found"):
        os.utime(path, (past, past))

    assert list(spool.folders(older_than_s=50)) == [JOB]


# -- folders that others made ----------------------------------------------------------------------------


def nested(at: Path, levels: int) -> None:
    """Folders in folders, deeper than any path can name."""
    inner = os.open(at, os.O_DIRECTORY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=inner)
        lower = os.open("d", os.O_DIRECTORY, dir_fd=inner)
        os.close(inner)
        inner = lower
    os.close(inner)


def test_folders_in_folders_stop_no_upload_and_are_deleted(
    spool: Spool, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "kept").write_bytes(b"x")
    for name in (JOB, "others"):
        (folder / name).mkdir()
        nested(folder / name, 1100)
    (folder / JOB / "d" / "link").symlink_to(tmp_path)

    write(spool, label(OTHER))
    assert spool.delete(JOB)

    assert not (folder / JOB).exists()
    assert (tmp_path / "kept").exists()
    (folder / "others").rename(folder / JOB)  # or the cleaning up would fail
    assert spool.delete(JOB)


def test_a_folder_that_cannot_be_entered_or_deleted_stops_nothing(
    spool: Spool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / JOB / "inner").mkdir(parents=True)
    real = os.scandir

    def refusing(path: int | str | Path) -> object:
        if JOB in str(Path(f"/proc/self/fd/{path}").readlink() if isinstance(path, int) else path):
            raise PermissionError
        return real(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refusing)
        write(spool, label(OTHER))
        assert not spool.delete(JOB)

    assert spool.delete(JOB)
