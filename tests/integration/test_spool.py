"""The spool on a real disk: sealed at rest, bound to its job, bounded, and clean after every failure."""

import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyrage import x25519

from kms_core.backends.age import AgeBackend, KeyFiles
from kms_core.envelope import header
from kms_core.errors import DecryptFailed, NotACiphertext, ResultExpired, SpoolFull
from kms_core.jobs.blobs import ITEMS, UPLOAD, Label, Spool, Unsealed
from smalldisk import small_disk

JOB = "11111111-1111-1111-1111-111111111111"
OTHER = "22222222-2222-2222-2222-222222222222"
SECRET = b"Kanarienvogel-4711 " * 1000
MIB = 1024 * 1024


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
    return Spool(folder, key, 64 * MIB)


def label(job_id: str = JOB, role: str = UPLOAD, tenant: str = "default", attempt: int = 0) -> Label:
    return Label(tenant, job_id, role, attempt)


def write(spool: Spool, at: Label, *pieces: bytes, sealed: bool = True) -> None:
    with spool.writing(at, sealed=sealed) as out:
        for piece in pieces or (SECRET,):
            out.write(piece)


def break_off(spool: Spool, at: Label) -> None:
    with spool.writing(at) as out:
        out.write(SECRET)
        raise ConnectionError


def read(spool: Spool, at: Label) -> bytes:
    with spool.blob(at) as blob:
        return b"".join(Unsealed(blob, spool.unseal(at, blob.head)).reader().slabs())


def content(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, MIB, 3 * MIB + 1], ids=str)
@pytest.mark.parametrize("step", [1000, 65_536, 10 * MIB], ids=str)
def test_what_is_written_in_pieces_is_read_whole(spool: Spool, size: int, step: int) -> None:
    data = os.urandom(size)
    write(spool, label(), *(data[start : start + step] for start in range(0, max(1, size), step)))

    assert read(spool, label()) == data


def test_nothing_of_the_plaintext_rests(spool: Spool, folder: Path) -> None:
    write(spool, label())

    assert SECRET[:19] not in (folder / JOB / "upload").read_bytes()


def test_only_the_service_may_read(spool: Spool, folder: Path) -> None:
    write(spool, label())
    spool.put(label(role="head", attempt=1), b"header")

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
    write(spool, label())
    target = folder / other.job_id / other.name
    target.parent.mkdir(exist_ok=True)
    if other.tenant == "default":
        (folder / JOB / "upload").rename(target)

    with pytest.raises(DecryptFailed):
        read(spool, other)


def test_damaged_blob_is_refused(spool: Spool, folder: Path) -> None:
    write(spool, label())
    path = folder / JOB / "upload"
    damaged = bytearray(path.read_bytes())
    damaged[-20] ^= 1
    path.write_bytes(damaged)

    with pytest.raises(DecryptFailed):
        read(spool, label())


def test_blob_cut_at_a_chunk_is_refused(spool: Spool, folder: Path) -> None:
    write(spool, label(), bytes(200_000))
    path = folder / JOB / "upload"
    head = header.parse(path.read_bytes(), header.FILE_LIMITS)
    os.truncate(path, head.payload_offset + 2 * (65_536 + 16))

    with pytest.raises(DecryptFailed):
        read(spool, label())


def test_key_that_was_rotated_still_opens(
    spool: Spool, folder: Path, key: AgeBackend, tmp_path: Path
) -> None:
    write(spool, label())
    with (tmp_path / "spool.key").open("a") as file:
        file.write(f"\n{x25519.Identity.generate()}\n")
    rotated = Spool(folder, AgeBackend(KeyFiles(tmp_path / "spool.key")), 64 * MIB)
    write(rotated, label(OTHER))

    assert read(rotated, label()) == read(rotated, label(OTHER)) == SECRET
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

    write(spool, label(role="result", attempt=1), b"whole")

    assert read(spool, label(role="result", attempt=1)) == b"whole"


def test_spool_above_its_limit_is_full(key: AgeBackend, folder: Path) -> None:
    small = Spool(folder, key, 100_000)

    with pytest.raises(SpoolFull):
        write(small, label(), bytes(60_000), bytes(60_000))

    assert content(folder) == []


def test_limit_counts_what_is_there_already(key: AgeBackend, folder: Path) -> None:
    write(Spool(folder, key, 100_000), label(), bytes(60_000))

    with pytest.raises(SpoolFull):
        write(Spool(folder, key, 100_000), label(OTHER), bytes(60_000))

    assert content(folder) == [JOB, f"{JOB}/upload"]


def test_announced_size_is_refused_before_a_byte(key: AgeBackend, folder: Path) -> None:
    with pytest.raises(SpoolFull), Spool(folder, key, 100_000).writing(label(), declared_bytes=100_001):
        pytest.fail("the body must not be read")

    assert content(folder) == []


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 1 MiB."""
    with small_disk(tmp_path / "disk", MIB) as disk:
        yield disk


def test_disk_that_fills_up_is_a_full_spool(key: AgeBackend, full_disk: Path) -> None:
    spool = Spool(full_disk, key, 64 * MIB)

    with pytest.raises(SpoolFull):
        write(spool, label(), bytes(2 * MIB))

    assert content(full_disk) == []
    write(spool, label(OTHER))


def test_disk_that_is_full_refuses_a_head(key: AgeBackend, full_disk: Path) -> None:
    spool = Spool(full_disk, key, 64 * MIB)
    write(spool, label())
    (full_disk / "filler").write_bytes(bytes(shutil.disk_usage(full_disk).free))

    with pytest.raises(SpoolFull):
        spool.put(label(role="head", attempt=1), bytes(5000))

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
    sealed = b"age-encryption.org/v1\n-> whatever"
    write(spool, label(), *(bytes([byte]) for byte in sealed), sealed=False)

    assert (folder / JOB / "upload").read_bytes() == sealed


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
def test_only_job_ids_name_folders(spool: Spool, name: str) -> None:
    with pytest.raises(ResultExpired):
        write(spool, label(name))
    with pytest.raises(ResultExpired):
        spool.delete(name)


def test_symbolic_link_is_not_followed(spool: Spool, folder: Path, tmp_path: Path) -> None:
    write(spool, label())
    kept = tmp_path / "kept"
    (folder / JOB / "upload").rename(kept)
    (folder / JOB / "upload").symlink_to(kept)

    with pytest.raises(OSError, match="symbolic"):
        read(spool, label())


def test_old_folders_are_candidates_for_the_sweep(spool: Spool, folder: Path) -> None:
    write(spool, label())
    write(spool, label(OTHER))
    (folder / "lost+found").mkdir()
    past = time.time() - 100
    for path in (folder / JOB, folder / "lost+found"):
        os.utime(path, (past, past))

    assert list(spool.folders(older_than_s=50)) == [JOB]
