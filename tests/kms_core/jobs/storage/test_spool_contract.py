"""The spool, wherever it rests: sealed, bound to its job, bounded, and clean after every failure."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from pyrage import x25519

from kms_core.age import header
from kms_core.backends.age import AgeBackend
from kms_core.backends.key_files import KeyFiles
from kms_core.jobs.sealed_records import RecordKey
from kms_core.jobs.storage.multipart_journal import MultipartJournal
from kms_core.jobs.storage.spool import ITEMS, NO_ATTEMPT, UPLOAD, Label, Spool
from kms_core.jobs.storage.spool_folder import SpoolFolder
from kms_protocol.errors import DecryptFailed, NotACiphertext, RecordRefused, ResultExpired, SpoolFull
from support import blob_stores
from support.blob_stores import Place

JOB = "11111111-1111-1111-1111-111111111111"
OTHER = "22222222-2222-2222-2222-222222222222"
UPLOADED = f"{JOB}/upload"
SECRET = b"Kanarienvogel-4711 " * 1000
CIPHERTEXT = b"age-encryption.org/v1\n-> whatever"
MIB = 1024 * 1024
BLOCK = 131_072
VALID = header.render([header.Stanza(("X25519", "x"), bytes(32))], bytes(16)) + bytes(16)
"""A header by the grammar, and a nonce."""


@pytest.fixture
def key(tmp_path: Path) -> AgeBackend:
    path = tmp_path / "spool.key"
    path.write_text(str(x25519.Identity.generate()))
    path.chmod(0o600)
    return AgeBackend(KeyFiles(path))


@pytest.fixture(params=blob_stores.KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    found = blob_stores.make(request.param, tmp_path)
    yield found
    found.close()


@pytest.fixture
def spool(place: Place, key: AgeBackend) -> Spool:
    return made(place, key)


def made(place: Place, key: AgeBackend, max_bytes: int = 64 * MIB) -> Spool:
    return Spool(place.store, key, RecordKey(key.secrets()), max_bytes)


def label(job_id: str = JOB, role: str = UPLOAD, tenant: str = "default", attempt: str = NO_ATTEMPT) -> Label:
    return Label(tenant, job_id, role, attempt)


def write(spool: Spool, at: Label, *pieces: bytes, sealed: bool = True) -> Label:
    """Write a blob; the label that reads it."""
    with spool.writing(at, sealed=sealed) as out:
        for piece in pieces or (SECRET,):
            out.write(piece)
    return replace(at, ref=out.ref)


def break_off(spool: Spool, at: Label, *pieces: bytes) -> None:
    with spool.writing(at) as out:
        for piece in pieces or (SECRET,):
            out.write(piece)
        raise ConnectionError


def read(spool: Spool, at: Label) -> bytes:
    with spool.opened(at) as reader:
        return b"".join(reader.slabs())


def content_of(spool: Spool, at: Label) -> bytes:
    with spool.blob(at) as blob:
        return blob.file.read_at(0, blob.file.size)


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


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, MIB, 3 * MIB + 1], ids=str)
@pytest.mark.parametrize("step", [1000, 65_536, 10 * MIB], ids=str)
def test_what_is_written_in_pieces_is_read_whole(spool: Spool, size: int, step: int) -> None:
    data = os.urandom(size)
    written = write(spool, label(), *(data[start : start + step] for start in range(0, max(1, size), step)))

    assert read(spool, written) == data


def test_nothing_of_the_plaintext_rests(spool: Spool, place: Place) -> None:
    write(spool, label())

    assert SECRET[:19] not in place.files()[UPLOADED]


@pytest.mark.parametrize(
    "other",
    [label(OTHER), label(role=ITEMS), label(tenant="another"), label(attempt="1")],
    ids=["job", "role", "tenant", "attempt"],
)
def test_blob_passes_for_no_other(spool: Spool, place: Place, other: Label) -> None:
    written = write(spool, label())
    place.change(f"{other.job_id}/{other.name}", place.files()[UPLOADED])

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


@pytest.mark.parametrize("at", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "as-is"])
def test_damaged_blob_is_refused(spool: Spool, place: Place, at: int, *, sealed: bool) -> None:
    written = write(spool, label(), VALID + bytes(500_000), sealed=sealed)
    damaged = bytearray(place.files()[UPLOADED])
    damaged[at] ^= 1
    place.change(UPLOADED, bytes(damaged))

    with pytest.raises(RecordRefused):
        content_of(spool, written)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "as-is"])
def test_blob_of_another_size_or_order_is_refused(
    spool: Spool, place: Place, change: Callable[[bytes], bytes], *, sealed: bool
) -> None:
    written = write(spool, label(), VALID + os.urandom(500_000), sealed=sealed)
    place.change(UPLOADED, change(place.files()[UPLOADED]))

    with pytest.raises(RecordRefused):
        content_of(spool, written)


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "as-is"])
def test_earlier_blob_of_the_same_name_is_refused(spool: Spool, place: Place, *, sealed: bool) -> None:
    write(spool, label(), VALID + b"old", sealed=sealed)
    old = place.files()[UPLOADED]
    spool.discard(label())
    written = write(spool, label(), VALID + b"new", sealed=sealed)
    place.change(UPLOADED, old)

    with pytest.raises(RecordRefused):
        content_of(spool, written)


def test_blob_of_the_same_key_and_content_passes_for_no_other(spool: Spool, place: Place) -> None:
    """What rests as it is holds no names of ours: only its MACs tell one place from another."""
    written = write(spool, label(), VALID, sealed=False)
    mine = place.files()[UPLOADED]
    for other in (label(role="head", attempt="1"), label(OTHER), label(tenant="another")):
        spool.discard(other)
        theirs = write(spool, other, VALID, sealed=False)
        place.change(f"{other.job_id}/{other.name}", mine)

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


def test_blobs_without_macs_are_those_of_0_1(spool: Spool, place: Place) -> None:
    """A record that names no ref is of 0.1: its blobs are read as they were written then."""
    place.change(UPLOADED, VALID + b"payload")

    with spool.blob(label()) as blob:
        assert blob.file.read_at(0, 10_000) == VALID + b"payload"


def test_key_that_was_rotated_still_opens(
    spool: Spool, place: Place, key: AgeBackend, tmp_path: Path
) -> None:
    before, old = write(spool, label()), key.current_version()
    with (tmp_path / "spool.key").open("a") as file:
        file.write(f"\n{x25519.Identity.generate()}\n")
    rotated = made(place, AgeBackend(KeyFiles(tmp_path / "spool.key")))
    after = write(rotated, label(OTHER))

    assert read(rotated, before) == read(rotated, after) == SECRET
    assert AgeBackend(KeyFiles(tmp_path / "spool.key")).current_version() != old


def test_broken_writing_leaves_nothing(spool: Spool, place: Place) -> None:
    with pytest.raises(ConnectionError):
        break_off(spool, label())

    assert (place.files(), place.unfinished()) == ({}, [])


def test_broken_writing_leaves_the_other_blobs_of_its_job(spool: Spool, place: Place) -> None:
    write(spool, label())

    with pytest.raises(ConnectionError):
        break_off(spool, label(role="result", attempt="1"))

    assert list(place.files()) == [UPLOADED]


def test_what_an_attempt_that_died_left_is_written_over(spool: Spool, place: Place) -> None:
    write(spool, label(role="result", attempt="1"))
    place.change(f"{JOB}/result.1", place.files()[f"{JOB}/result.1"][:300])
    if place.store.is_remote:
        time.sleep(3.5)  # what is as old as the write could be another process's

    written = write(spool, label(role="result", attempt="1"), b"whole")

    assert read(spool, written) == b"whole"


def test_spool_above_its_limit_is_full(key: AgeBackend, place: Place) -> None:
    small = made(place, key, 100_000)

    with pytest.raises(SpoolFull):
        write(small, label(), bytes(60_000), bytes(60_000))

    assert (place.files(), place.unfinished()) == ({}, [])


def test_limit_counts_what_is_there_already(key: AgeBackend, place: Place) -> None:
    write(made(place, key, 100_000), label(), bytes(60_000))

    with pytest.raises(SpoolFull):
        write(made(place, key, 100_000), label(OTHER), bytes(60_000))

    assert list(place.files()) == [UPLOADED]


def test_announced_size_is_refused_before_a_byte(key: AgeBackend, place: Place) -> None:
    with pytest.raises(SpoolFull), made(place, key, 100_000).writing(label(), declared_bytes=100_001):
        pytest.fail("the body must not be read")

    assert (place.files(), place.unfinished()) == ({}, [])


@pytest.mark.parametrize(
    "pieces",
    [[b""], [b"age"], [b"hello"], [b"age-encryption.org/v1"], [b"age-encryption.org/v2\n"], [b"a"] * 30],
    ids=repr,
)
def test_ciphertext_is_known_by_its_first_line(spool: Spool, place: Place, pieces: list[bytes]) -> None:
    with pytest.raises(NotACiphertext):
        write(spool, label(), *pieces, sealed=False)

    assert (place.files(), place.unfinished()) == ({}, [])


def test_ciphertext_rests_as_it_is(spool: Spool, place: Place) -> None:
    write(spool, label(), *(bytes([byte]) for byte in CIPHERTEXT), sealed=False)

    assert place.files()[UPLOADED][:-16] == CIPHERTEXT


def test_deleted_job_is_gone_and_deleting_twice_is_no_error(spool: Spool, place: Place) -> None:
    write(spool, label())
    write(spool, label(OTHER))

    spool.delete(JOB)
    spool.delete(JOB)
    spool.discard(label(OTHER, ITEMS))

    assert list(place.files()) == [f"{OTHER}/upload"]
    with pytest.raises(ResultExpired):
        read(spool, label())


# -- parts, notes and orphans --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8 * MIB - 5000, 8 * MIB, 8 * MIB + 1, 21 * MIB], ids=str)
def test_large_blob_is_the_same_whatever_its_parts(spool: Spool, place: Place, size: int) -> None:
    data = os.urandom(size)
    written = write(spool, label(), *(data[at : at + 3 * MIB] for at in range(0, size, 3 * MIB)))

    assert read(spool, written) == data
    assert place.unfinished() == []
    (whole,) = place.files().values()
    content = len(whole) - 16 * -(-(len(whole)) // (BLOCK + 16))
    assert written.ref[16:] == content.to_bytes(8, "big")


def test_large_upload_that_breaks_leaves_nothing(spool: Spool, place: Place) -> None:
    with pytest.raises(ConnectionError):
        break_off(spool, label(), *([os.urandom(5 * MIB)] * 4))

    assert (place.files(), place.unfinished()) == ({}, [])


def test_input_of_an_ended_job_goes_and_its_result_stays(spool: Spool, place: Place) -> None:
    write(spool, label(role=ITEMS))
    write(spool, label(role="result0", attempt="1"))
    write(spool, label(OTHER))

    spool.discard_input(JOB)
    spool.discard_input(OTHER)

    assert list(place.files()) == [f"{JOB}/result0.1"]


def test_upload_with_a_head_is_that_of_the_result(spool: Spool, place: Place) -> None:
    write(spool, label())
    write(spool, label(role="head", attempt="1"), VALID, sealed=False)

    spool.discard_input(JOB)

    assert sorted(place.files()) == [f"{JOB}/head.1", UPLOADED]


def test_use_is_counted(key: AgeBackend, place: Place) -> None:
    write(made(place, key), label(), bytes(60_000))
    spool = made(place, key)
    write(spool, label(OTHER), bytes(1000))

    assert spool.use().used_bytes == sum(map(len, place.files().values()))


def test_old_jobs_are_candidates_for_the_sweep(spool: Spool) -> None:
    write(spool, label())
    time.sleep(2.1)
    write(spool, label(OTHER))

    assert list(spool.folders(older_than_s=1)) == [JOB]
    assert list(spool.folders(older_than_s=100)) == []


def test_old_names_of_a_bucket_can_be_left_out(place: Place) -> None:
    place.store.put("hosts", "old", b"x", durable=True)
    time.sleep(2.1)

    assert place.store.names("hosts", 1) == (["old"] if isinstance(place.store, SpoolFolder) else [])
    assert place.store.names("hosts", 600) == ["old"]


def test_notes_of_uploads_are_found_again(place: Place) -> None:
    notes, url = MultipartJournal(place.store), "s3://bucket/key"
    assert notes.find(JOB, "1", url) is None
    notes.intend(JOB, "1", url)
    assert notes.find(JOB, "1", url) == ""
    notes.add(JOB, "1", url, "upload-1")
    assert notes.find(JOB, "1", url) == "upload-1"

    notes.forget(JOB, "1", url)
    notes.forget(JOB, "1", url)

    assert notes.find(JOB, "1", url) is None
    assert place.files() == {}


def test_blob_that_goes_while_it_is_read_is_an_expired_result(spool: Spool, place: Place) -> None:
    """Of a file that is open nothing goes."""
    written = write(spool, label(), bytes(4 * MIB))

    with spool.opened(written) as reader:
        spool.delete(JOB)
        with pytest.raises(ResultExpired) if place.store.is_remote else nullcontext():
            assert b"".join(reader.slabs()) == bytes(4 * MIB)


def test_blob_that_changes_while_it_is_read_is_refused(spool: Spool, place: Place) -> None:
    written = write(spool, label(), bytes(4 * MIB))

    with spool.opened(written) as reader:
        place.change(UPLOADED, bytes(len(place.files()[UPLOADED])))
        with pytest.raises(RecordRefused):
            b"".join(reader.slabs())
