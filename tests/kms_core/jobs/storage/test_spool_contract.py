"""The spool, wherever it rests: sealed, bound to its job, bounded, and clean after every failure."""

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pyrage
import pytest
from pyrage import x25519

from kms_core.age import header
from kms_core.age.stream import SEALED_CHUNK
from kms_core.backends.age import AgeBackend
from kms_core.backends.key_files import KeyFiles
from kms_core.jobs.storage.s3 import MultipartJournal
from kms_core.jobs.storage.spool import ITEMS, NO_ATTEMPT, UPLOAD, Label, Spool
from kms_core.jobs.storage.spool_folder import SpoolFolder
from kms_core.payload.files import RangeSource
from kms_protocol.errors import RecordRefused, ResultExpired, SpoolFull
from support import blob_stores
from support.blob_stores import JOB, MIB, OTHER, SECRET_TEXT, BlobStoreCase, label, read, write
from support.waiting import RealTime

UPLOADED = f"{JOB}/upload"
DOCUMENT = b"".join(number.to_bytes(4, "big") for number in range(70_000))
"""280,000 bytes: four chunks and a part of one."""
SIZES = [0, 1, 65_535, 65_536, 65_537, MIB, 3 * MIB + 1, 8 * MIB - 5000, 8 * MIB, 8 * MIB + 1, 21 * MIB]

Change = Callable[[bytes], bytes]


@pytest.fixture(params=blob_stores.KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlobStoreCase]:
    found = blob_stores.make(request.param, tmp_path)
    yield found
    found.close()


@pytest.fixture
def spool(place: BlobStoreCase, key: AgeBackend) -> Spool:
    return made(place, key)


def made(place: BlobStoreCase, key: AgeBackend, max_bytes: int = 64 * MIB) -> Spool:
    return Spool(place.store, key, max_bytes)


def break_off(spool: Spool, at: Label, pieces: int = 1) -> None:
    with spool.writing(at) as out:
        for _ in range(pieces):
            out.write(os.urandom(MIB))
        raise ConnectionError


def parts(data: bytes) -> tuple[bytes, list[bytes]]:
    """The header with its nonce, and the sealed chunks."""
    at = header.parse(data, header.FILE_LIMITS).payload_offset
    return data[:at], [data[start : start + SEALED_CHUNK] for start in range(at, len(data), SEALED_CHUNK)]


def flipped(at: int) -> Change:
    """The same blob with a bit changed."""

    def change(data: bytes) -> bytes:
        damaged = bytearray(data)
        damaged[at] ^= 1
        return bytes(damaged)

    return change


def chunks(*order: int) -> Change:
    """The same blob with chunks in another order."""

    def change(data: bytes) -> bytes:
        head, found = parts(data)
        return head + b"".join(found[number] for number in order)

    return change


CHANGES: dict[str, Change] = {
    "version line": flipped(0),
    "stanza": flipped(40),
    "first chunk": flipped(30_000),
    "second chunk": flipped(100_000),
    "last chunk": flipped(-65),
    "last tag": flipped(-1),
    "empty": lambda _: b"",
    "a byte less": lambda data: data[:-1],
    "a byte more": lambda data: data + b"x",
    "chunks less": chunks(0, 1, 2),
    "no chunk": chunks(),
    "a chunk more": chunks(0, 1, 2, 3, 4, 4),
    "chunks exchanged": chunks(0, 2, 1, 3, 4),
    "a chunk twice": chunks(0, 0, 2, 3, 4),
    "no first chunk": chunks(1, 2, 3, 4),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("step", [70_001, 10 * MIB], ids=str)
def test_what_is_written_in_pieces_is_read_whole(
    spool: Spool, place: BlobStoreCase, size: int, step: int
) -> None:
    """A bucket has the larger ones from several parts."""
    data = os.urandom(size)
    written = write(spool, label(), *(data[start : start + step] for start in range(0, max(1, size), step)))

    assert read(spool, written) == data
    assert place.unfinished() == []


def test_nothing_of_the_plaintext_rests(spool: Spool, place: BlobStoreCase) -> None:
    write(spool, label())

    assert SECRET_TEXT[:19] not in place.files()[UPLOADED]


@pytest.mark.parametrize(
    "other",
    [label(OTHER), label(role=ITEMS), label(tenant="another"), label(attempt="1")],
    ids=["job", "role", "tenant", "attempt"],
)
def test_blob_passes_for_no_other(spool: Spool, place: BlobStoreCase, other: Label) -> None:
    written = write(spool, label())
    place.change(f"{other.job_id}/{other.name}", place.files()[UPLOADED])

    for ref in (written.ref, write(spool, replace(other, attempt="9")).ref, b""):
        with pytest.raises(RecordRefused):
            read(spool, replace(other, ref=ref))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_damaged_blob_is_refused(spool: Spool, place: BlobStoreCase, change: Change) -> None:
    written = write(spool, label(), DOCUMENT)
    place.change(UPLOADED, change(place.files()[UPLOADED]))

    with pytest.raises(RecordRefused):
        read(spool, written)


def test_earlier_blob_of_the_same_name_is_refused(spool: Spool, place: BlobStoreCase) -> None:
    earlier = write(spool, label(), b"old")
    old = place.files()[UPLOADED]
    spool.remove(JOB, label().name)
    written = write(spool, label(), b"new")
    assert read(spool, written) == b"new"
    place.change(UPLOADED, old)

    with pytest.raises(RecordRefused):
        read(spool, written)
    assert read(spool, earlier) == b"old"


def test_blob_of_another_spool_key_is_refused(spool: Spool, place: BlobStoreCase, tmp_path: Path) -> None:
    """Its recipient is no secret: a file for it is no blob."""
    written = write(spool, label())
    (tmp_path / "other.key").write_text(str(x25519.Identity.generate()))
    (tmp_path / "other.key").chmod(0o600)
    other = made(place, AgeBackend(KeyFiles(tmp_path / "other.key"), native=False))
    other.remove(JOB, label().name)
    forged = write(other, label())

    for ref in (written.ref, forged.ref):
        with pytest.raises(RecordRefused):
            read(spool, replace(label(), ref=ref))


def test_file_for_the_recipient_of_the_spool_is_no_blob(
    spool: Spool, place: BlobStoreCase, tmp_path: Path
) -> None:
    written = write(spool, label())
    recipient = x25519.Identity.from_str((tmp_path / "spool.key").read_text()).to_public()
    place.change(UPLOADED, pyrage.encrypt(SECRET_TEXT, [recipient]))

    with pytest.raises(RecordRefused):
        read(spool, written)


@pytest.mark.parametrize("size", [22, 65_535, 65_536, 65_537, 131_072, 200_000], ids=str)
def test_any_part_of_a_blob_is_read(spool: Spool, place: BlobStoreCase, size: int) -> None:
    data = os.urandom(size)
    written = write(spool, label(), *(data[at : at + 70_001] for at in range(0, len(data), 70_001)))

    with spool.opened(written) as content:
        check_ranges(content, data)
        check_ranges(content.tail(10), data[10:])
        sealed = b"".join(parts(place.files()[UPLOADED])[1])
        for start in (0, 1, 65_552, 65_553, 140_000):
            for stop in (start + 10, len(sealed)):
                assert b"".join(content.sealed_slabs(start, stop)) == sealed[start:stop]


def check_ranges(source: RangeSource, data: bytes) -> None:
    edges = {0, 1, 100, 65_535, 65_536, 65_537, 131_073, len(data) - 1, len(data)}
    assert source.size == len(data)
    for start in edges:
        for stop in edges:
            assert source.read_at(start, max(0, stop - start)) == data[start:stop]
            views = [memoryview(bytearray(max(0, stop - start))), memoryview(bytearray(7))]
            whole = source.read_into(views, start)
            assert whole == (start + sum(map(len, views)) <= len(data))
            assert not whole or b"".join(views) == data[start : max(start, stop) + 7]


def test_key_that_was_rotated_still_opens(
    spool: Spool, place: BlobStoreCase, key: AgeBackend, tmp_path: Path
) -> None:
    before, old = write(spool, label()), key.versions()[-1].version
    with (tmp_path / "spool.key").open("a") as file:
        file.write(f"\n{x25519.Identity.generate()}\n")
    rotated = made(place, AgeBackend(KeyFiles(tmp_path / "spool.key"), native=False))
    after = write(rotated, label(OTHER))

    assert read(rotated, before) == read(rotated, after) == SECRET_TEXT
    assert AgeBackend(KeyFiles(tmp_path / "spool.key")).versions()[-1].version != old


@pytest.mark.parametrize("pieces", [1, 20])
def test_broken_writing_leaves_nothing(spool: Spool, place: BlobStoreCase, pieces: int) -> None:
    with pytest.raises(ConnectionError):
        break_off(spool, label(), pieces)

    assert (place.files(), place.unfinished()) == ({}, [])


def test_broken_writing_leaves_the_other_blobs_of_its_job(spool: Spool, place: BlobStoreCase) -> None:
    write(spool, label())

    with pytest.raises(ConnectionError):
        break_off(spool, label(role="result", attempt="1"))

    assert list(place.files()) == [UPLOADED]


def test_what_an_attempt_that_died_left_is_written_over(spool: Spool, place: BlobStoreCase) -> None:
    write(spool, label(role="result", attempt="1"))
    place.change(f"{JOB}/result.1", place.files()[f"{JOB}/result.1"][:300])
    if place.store.is_remote:
        RealTime.sleep(3.5)  # what is as old as the write could be another process's

    written = write(spool, label(role="result", attempt="1"), b"whole")

    assert read(spool, written) == b"whole"


def test_spool_above_its_limit_is_full(key: AgeBackend, place: BlobStoreCase) -> None:
    small = made(place, key, 100_000)

    with pytest.raises(SpoolFull):
        write(small, label(), bytes(60_000), bytes(60_000))

    assert (place.files(), place.unfinished()) == ({}, [])


def test_limit_counts_what_is_there_already(key: AgeBackend, place: BlobStoreCase) -> None:
    write(made(place, key, 100_000), label(), bytes(60_000))

    with pytest.raises(SpoolFull):
        write(made(place, key, 100_000), label(OTHER), bytes(60_000))

    assert list(place.files()) == [UPLOADED]


def test_announced_size_is_refused_before_a_byte(key: AgeBackend, place: BlobStoreCase) -> None:
    with pytest.raises(SpoolFull), made(place, key, 100_000).writing(label(), declared_bytes=100_001):
        pytest.fail("the body must not be read")

    assert (place.files(), place.unfinished()) == ({}, [])


def test_deleted_job_is_gone_and_deleting_twice_is_no_error(spool: Spool, place: BlobStoreCase) -> None:
    write(spool, label())
    write(spool, label(OTHER))

    spool.delete(JOB)
    spool.delete(JOB)
    spool.remove(OTHER, ITEMS)

    assert list(place.files()) == [f"{OTHER}/upload"]
    with pytest.raises(ResultExpired):
        read(spool, label())


@pytest.mark.parametrize(
    ("roles", "left"),
    [([ITEMS, "result0"], ["result0.1"]), ([UPLOAD], []), ([UPLOAD, "head"], ["head.1", UPLOAD])],
    ids=["items", "upload", "upload-of-the-result"],
)
def test_input_of_an_ended_job_goes_and_its_result_stays(
    spool: Spool, place: BlobStoreCase, roles: list[str], left: list[str]
) -> None:
    for role in roles:
        write(spool, label(role=role, attempt=NO_ATTEMPT if role in {UPLOAD, ITEMS} else "1"))

    spool.discard_input(JOB)

    assert sorted(place.files()) == [f"{JOB}/{name}" for name in left]


def test_use_is_counted(key: AgeBackend, place: BlobStoreCase) -> None:
    write(made(place, key), label(), bytes(60_000))
    spool = made(place, key)
    write(spool, label(OTHER), bytes(1000))

    assert spool.use().used_bytes == sum(map(len, place.files().values()))


def test_old_jobs_are_candidates_for_the_sweep(spool: Spool, place: BlobStoreCase) -> None:
    """Folders of other names are not."""
    write(spool, label())
    place.change("lost+found/x", b"x")
    RealTime.sleep(2.1)
    write(spool, label(OTHER))

    assert list(spool.folders(older_than_s=1)) == [JOB]
    assert list(spool.folders(older_than_s=100)) == []


def test_old_names_of_a_bucket_can_be_left_out(place: BlobStoreCase) -> None:
    place.store.put("hosts", "old", b"x", durable=True)
    RealTime.sleep(2.1)

    assert place.store.names("hosts", 1) == (["old"] if isinstance(place.store, SpoolFolder) else [])
    assert place.store.names("hosts", 600) == ["old"]


def test_notes_of_uploads_are_found_again(place: BlobStoreCase) -> None:
    notes, url = MultipartJournal(place.store), "s3://bucket/key"
    assert not list(notes.noted([url]))
    notes.add(JOB, "1", url)
    assert [note.upload for note in notes.noted([url])] == [""]
    notes.add(JOB, "1", url, "upload-1")
    assert [note.upload for note in notes.noted([url])] == ["upload-1"]

    notes.forget(JOB, "1", url)
    notes.forget(JOB, "1", url)

    assert not list(notes.noted([url]))
    assert place.files() == {}


def test_blob_that_goes_while_it_is_read_is_an_expired_result(spool: Spool, place: BlobStoreCase) -> None:
    """Of a file that is open nothing goes."""
    written = write(spool, label(), bytes(4 * MIB))

    with spool.opened(written) as reader:
        spool.delete(JOB)
        with pytest.raises(ResultExpired) if place.store.is_remote else nullcontext():
            assert b"".join(reader.slabs()) == bytes(4 * MIB)


def test_blob_that_changes_while_it_is_read_is_refused(spool: Spool, place: BlobStoreCase) -> None:
    written = write(spool, label(), bytes(4 * MIB))

    with spool.opened(written) as reader:
        place.change(UPLOADED, bytes(len(place.files()[UPLOADED])))
        with pytest.raises(RecordRefused):
            b"".join(reader.slabs())
