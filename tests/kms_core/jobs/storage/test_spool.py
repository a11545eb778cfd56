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

from kms_core.backends.age import AgeBackend
from kms_core.backends.key_files import KeyFiles
from kms_core.jobs.storage.s3 import MultipartJournal
from kms_core.jobs.storage.spool import NO_ATTEMPT, UPLOAD, Label, Spool
from kms_core.jobs.storage.spool_folder import DiskSync, SpoolFolder
from kms_protocol.errors import (
    RecordRefused,
    ResultExpired,
    SpoolFull,
    Unavailable,
)
from support.small_disk import small_disk

JOB = "11111111-1111-1111-1111-111111111111"
OTHER = "22222222-2222-2222-2222-222222222222"
SECRET = b"Kanarienvogel-4711 " * 1000
MIB = 1024 * 1024


@pytest.fixture
def key(tmp_path: Path) -> AgeBackend:
    path = tmp_path / "spool.key"
    path.write_text(str(x25519.Identity.generate()))
    path.chmod(0o600)
    return AgeBackend(KeyFiles(path), native=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "spool").mkdir(0o700)
    return tmp_path / "spool"


@pytest.fixture
def spool(folder: Path, key: AgeBackend) -> Spool:
    return made(folder, key)


def made(folder: Path, key: AgeBackend, max_bytes: int = 64 * MIB) -> Spool:
    return Spool(SpoolFolder(folder, DiskSync(folder)), key, max_bytes)


def label(job_id: str = JOB, role: str = UPLOAD, tenant: str = "default", attempt: str = NO_ATTEMPT) -> Label:
    return Label(tenant, job_id, role, attempt)


def write(spool: Spool, at: Label, *pieces: bytes) -> Label:
    """Write a blob; the label that reads it."""
    with spool.writing(at) as out:
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


def test_only_the_service_may_read(spool: Spool, folder: Path) -> None:
    write(spool, label())
    write(spool, label(role="head", attempt="1"))

    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode) for path in [folder / JOB, *(folder / JOB).iterdir()]
    }
    assert modes == {JOB: 0o700, "upload": 0o600, "head.1": 0o600}


def test_blob_changed_while_it_is_open_is_refused(spool: Spool, folder: Path) -> None:
    written = write(spool, label(), bytes(500_000))

    with ExitStack() as stack:
        content = stack.enter_context(spool.opened(written))
        assert content.read_at(400_000, 10) == bytes(10)
        os.pwrite(stack.enter_context((folder / JOB / "upload").open("r+b")).fileno(), b"x", 140_000)
        assert content.read_at(1, 10) == bytes(10)
        for slabs in (content.slabs(140_000, 140_010), content.sealed_slabs(140_000, 140_010)):
            with pytest.raises(RecordRefused):
                next(slabs)


def test_blob_cut_while_it_is_open_is_refused(spool: Spool, folder: Path) -> None:
    written = write(spool, label(), bytes(500_000))

    with spool.opened(written) as content:
        os.truncate(folder / JOB / "upload", 136_000)
        with pytest.raises(RecordRefused):
            content.read_at(200_000, 10)


# -- failures ------------------------------------------------------------------------------------------


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
        write(spool, label(role="head", attempt="1"), bytes(5000))

    assert content(full_disk) == [JOB, f"{JOB}/upload", "filler"]


# -- deleting ------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("other", OTHERS)
def test_only_plain_files_are_read(
    spool: Spool, folder: Path, tmp_path: Path, other: Callable[[Path, Path], None]
) -> None:
    written = write(spool, label())
    other(folder / JOB / "upload", tmp_path / "kept")

    with pytest.raises(RecordRefused):
        read(spool, written)


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
        spool.remove(JOB, "upload")

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
    notes, url = MultipartJournal(SpoolFolder(folder, DiskSync(folder))), "s3://bucket/key"
    notes.add(JOB, "1", url, "upload-1")
    assert [note.upload for note in notes.noted([url])] == ["upload-1"]
    (path,) = (folder / "multipart").iterdir()
    other(path, tmp_path / "kept")

    assert not list(notes.noted([url]))
    notes.forget(JOB, "1", url)
    assert (tmp_path / "kept").exists()


def test_no_note_is_written_through_a_link(folder: Path, tmp_path: Path) -> None:
    notes, url = MultipartJournal(SpoolFolder(folder, DiskSync(folder))), "s3://bucket/key"
    notes.add(JOB, "1", url, "upload-1")
    (path,) = (folder / "multipart").iterdir()
    (tmp_path / "kept").write_bytes(b"mine")
    path.with_name(f"{path.name}.tmp").symlink_to(tmp_path / "kept")

    notes.add(JOB, "1", url, "upload-2")

    assert (tmp_path / "kept").read_bytes() == b"mine"
    assert [note.upload for note in notes.noted([url])] == ["upload-2"]


def test_old_folders_are_candidates_for_the_sweep(spool: Spool, folder: Path) -> None:
    write(spool, label())
    write(spool, label(OTHER))
    (folder / "lost+found").mkdir()
    past = time.time() - 100
    for path in (folder / JOB, folder / "lost+found"):
        os.utime(path, (past, past))

    assert list(spool.folders(older_than_s=50)) == [JOB]


# -- folders that others made ----------------------------------------------------------------------------


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
