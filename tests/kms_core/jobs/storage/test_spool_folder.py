"""The spool in a directory of a real disk: private, plain files alone, durable before their job is stored."""

import errno
import os
import shutil
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from kms_core.backends.age import AgeBackend
from kms_core.jobs.storage.s3 import MultipartJournal
from kms_core.jobs.storage.spool import UPLOAD, Spool
from kms_core.jobs.storage.spool_folder import DiskSync, GroupSync, SpoolFolder
from kms_core.secure_files import make_folders
from kms_protocol.errors import RecordRefused, ResultExpired, SpoolFull, SpoolUnavailable
from support.audit_logs import room_for
from support.blob_stores import JOB, MIB, OTHER, SECRET_TEXT, label, read, write
from support.small_disk import small_disk
from support.synced_disk import SyncedDisk, install
from support.waiting import until

URL = "s3://bucket/key"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "spool").mkdir(0o700)
    return tmp_path / "spool"


@pytest.fixture
def spool(folder: Path, key: AgeBackend) -> Spool:
    return made(folder, key)


@pytest.fixture
def notes(folder: Path) -> MultipartJournal:
    """Notes of uploads, with one."""
    notes = MultipartJournal(SpoolFolder(folder, DiskSync(folder)))
    notes.add(JOB, "1", URL, "upload-1")
    assert noted(notes) == ["upload-1"]
    return notes


def noted(notes: MultipartJournal) -> list[str]:
    return [note.upload for note in notes.noted([URL])]


def made(folder: Path, key: AgeBackend, *, enabled: bool = True) -> Spool:
    return Spool(SpoolFolder(folder, DiskSync(folder, enabled=enabled)), key, 64 * MIB)


def content(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_only_the_service_may_read(spool: Spool, folder: Path) -> None:
    write(spool, label())
    write(spool, label(role="head", attempt="1"))

    paths = [folder / JOB, *(folder / JOB).iterdir()]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in paths}
    assert modes == {JOB: 0o700, "upload": 0o600, "head.1": 0o600}


def test_blob_changed_or_cut_while_it_is_open_is_refused(spool: Spool, folder: Path) -> None:
    written, path = write(spool, label(), bytes(500_000)), folder / JOB / "upload"

    with spool.opened(written) as content, path.open("r+b") as file:
        assert content.read_at(400_000, 10) == bytes(10)
        os.pwrite(file.fileno(), b"x", 140_000)
        assert content.read_at(1, 10) == bytes(10)
        for slabs in (content.slabs(140_000, 140_010), content.sealed_slabs(140_000, 140_010)):
            with pytest.raises(RecordRefused):
                next(slabs)
        os.truncate(path, 136_000)
        with pytest.raises(RecordRefused):
            content.read_at(200_000, 10)


def test_full_disk_is_a_full_spool(key: AgeBackend, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", MIB) as disk:
        spool = made(disk, key)
        with pytest.raises(SpoolFull):
            write(spool, label(), bytes(2 * MIB))
        assert content(disk) == []

        write(spool, label())
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))
        with pytest.raises(SpoolFull):
            write(spool, label(role="head", attempt="1"), bytes(5000))
        assert content(disk) == [JOB, f"{JOB}/upload", "filler"]


@pytest.mark.parametrize("name", ["note", "n" * 300], ids=["too-large", "too-long-a-name"])
def test_note_that_the_disk_refuses_is_an_error_of_the_spool(spool: Spool, folder: Path, name: str) -> None:
    with room_for(MIB), pytest.raises(SpoolUnavailable):
        spool.store.put(JOB, name, bytes(MIB + 1), durable=True)

    assert content(folder) in ([], [JOB])


def test_a_directory_that_is_gone_is_a_spool_that_is_away(spool: Spool, folder: Path) -> None:
    assert not spool.use().is_away
    shutil.rmtree(folder)

    assert spool.use().is_away
    with pytest.raises(SpoolUnavailable):
        write(spool, label(), bytes(5000))


def test_a_folder_that_another_process_removes_hides_no_other(folder: Path) -> None:
    for name in (JOB, OTHER):
        (folder / name).mkdir()
    found = SpoolFolder(folder, DiskSync(folder)).folders(older_than_s=-60)
    gone = ({JOB, OTHER} - {next(found)}).pop()
    (folder / gone).rmdir()

    assert list(found) == []


# -- names, links and folders of others --------------------------------------------------------------------


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
    link(path.parent, kept)


def file_as_folder(path: Path, kept: Path) -> None:
    path.parent.rename(kept)
    path.parent.touch()


Change = Callable[[Path, Path], None]
in_its_place = pytest.mark.parametrize("other", [link, pipe, directory, folder_link, file_as_folder])


@in_its_place
def test_only_plain_files_are_read(spool: Spool, folder: Path, tmp_path: Path, other: Change) -> None:
    written = write(spool, label())
    other(folder / JOB / "upload", tmp_path / "kept")

    with pytest.raises(RecordRefused):
        read(spool, written)


@pytest.mark.parametrize("other", [directory, folder_link, file_as_folder])
def test_nothing_is_written_elsewhere(spool: Spool, folder: Path, tmp_path: Path, other: Change) -> None:
    write(spool, label())
    kept = tmp_path / "kept"
    other(folder / JOB / "upload", kept)
    before = content(kept), kept.stat().st_mtime_ns

    with pytest.raises(SpoolUnavailable):
        write(spool, label())
    if other is not directory:
        spool.remove(JOB, "upload")

    assert (content(kept), kept.stat().st_mtime_ns) == before


@pytest.mark.parametrize("other", [link, pipe])
def test_a_link_or_a_pipe_is_written_over(spool: Spool, folder: Path, tmp_path: Path, other: Change) -> None:
    write(spool, label())
    other(folder / JOB / "upload", tmp_path / "kept")
    before = (tmp_path / "kept").read_bytes()

    assert read(spool, write(spool, label(), b"new")) == b"new"
    assert (tmp_path / "kept").read_bytes() == before


def test_hard_link_to_another_blob_is_refused(spool: Spool, folder: Path) -> None:
    written, other = write(spool, label()), write(spool, label(OTHER))
    (folder / JOB / "upload").unlink()
    (folder / JOB / "upload").hardlink_to(folder / OTHER / "upload")

    with pytest.raises(RecordRefused):
        read(spool, written)
    assert read(spool, other) == SECRET_TEXT


@in_its_place
def test_notes_of_uploads_are_plain_files(
    notes: MultipartJournal, folder: Path, tmp_path: Path, other: Change
) -> None:
    """Their text goes to an object store: a link would send it another file's."""
    (path,) = (folder / "multipart").iterdir()
    other(path, tmp_path / "kept")

    assert noted(notes) == []
    notes.forget(JOB, "1", URL)
    assert (tmp_path / "kept").exists()


def test_no_note_is_written_through_a_link(notes: MultipartJournal, folder: Path, tmp_path: Path) -> None:
    (path,) = (folder / "multipart").iterdir()
    (tmp_path / "kept").write_bytes(b"mine")
    path.with_name(f"{path.name}.tmp").symlink_to(tmp_path / "kept")

    notes.add(JOB, "1", URL, "upload-2")

    assert (tmp_path / "kept").read_bytes() == b"mine"
    assert noted(notes) == ["upload-2"]


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


# -- a power cut -------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> SyncedDisk:
    disk = SyncedDisk(tmp_path / "synced")
    disk.sync_all(folder)
    return install(disk, monkeypatch.setattr)


@pytest.mark.parametrize("size", [0, 100, 300_000])
def test_blob_survives_a_power_cut(disk: SyncedDisk, spool: Spool, folder: Path, size: int) -> None:
    data = os.urandom(size)
    upload = write(spool, label(), data)
    head = write(spool, label(role="head", attempt="1"), b"later")

    disk.cut(folder)

    assert read(spool, upload) == data
    assert read(spool, head) == b"later"


def test_blob_that_is_only_written_does_not_survive(disk: SyncedDisk, folder: Path, key: AgeBackend) -> None:
    """Shows that the test above can fail."""
    spool = made(folder, key, enabled=False)
    upload = write(spool, label())
    assert read(spool, upload) == SECRET_TEXT

    disk.cut(folder)

    with pytest.raises(ResultExpired):
        read(spool, upload)


def test_note_of_a_multipart_upload_survives_a_power_cut(
    disk: SyncedDisk, notes: MultipartJournal, folder: Path
) -> None:
    disk.cut(folder)

    assert noted(notes) == ["upload-1"]


def test_note_whose_sync_fails_takes_no_name(disk: SyncedDisk, notes: MultipartJournal, folder: Path) -> None:
    before = content(folder)
    disk.broken.touch()

    with pytest.raises(SpoolUnavailable):
        notes.add(JOB, "1", URL, "upload-2")
    with pytest.raises(SpoolUnavailable):
        notes.add(OTHER, "1", URL, "upload-3")
    assert noted(notes) == ["upload-1"]
    assert content(folder) == before


def test_missing_folders_survive_a_power_cut(disk: SyncedDisk, tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()

    make_folders(top / "state" / "spool")
    make_folders(top / "state" / "spool")
    disk.cut(top)

    assert (top / "state" / "spool").is_dir()


def held_in(folder: Path) -> int:
    """The number of open files in a folder, itself among them."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found += entry.readlink().is_relative_to(folder)
    return found


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", [UPLOAD, JOB, "spool"], ids=["file", "folder", "spool"])
def test_failed_sync_drops_the_blob_and_is_not_tried_again(
    spool: Spool, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    real = os.fsync
    failed: list[tuple[Path, int]] = []
    synced: list[tuple[Path, int]] = []

    def sync(fd: int) -> None:
        path, inode = Path(f"/proc/self/fd/{fd}").readlink(), os.fstat(fd).st_ino
        if path.name == name and not failed:
            failed.append((path, inode))
            os.dup(fd)  # or the next file gets this inode
            raise OSError(number, os.strerror(number))
        synced.append((path, inode))
        real(fd)

    monkeypatch.setattr(os, "fsync", sync)
    before = held_in(folder)

    with pytest.raises(SpoolUnavailable if number == errno.EIO else SpoolFull):
        write(spool, label(), b"first")

    assert list(folder.iterdir()) == []
    assert held_in(folder) == before + 1
    assert read(spool, write(spool, label(), b"second")) == b"second"
    assert failed[0] not in synced or failed[0][0] == folder  # the spool itself has no second life


# -- one sync for several threads --------------------------------------------------------------------------


class SteppedSync:
    """A sync that ends when it is told to; those of these numbers fail."""

    def __init__(self, *fails: int) -> None:
        self.begun = 0
        self.go = threading.Semaphore(0)
        self.fails = fails

    def sync(self) -> None:
        self.begun += 1
        mine = self.begun
        assert self.go.acquire(timeout=10)
        if mine in self.fails:
            raise OSError(errno.EIO, "broken")


class CountingLock:
    """A lock that counts the threads that have asked for it."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self.asked.append(threading.get_ident())
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def started(group: GroupSync, ends: list[str]) -> threading.Thread:
    def wait() -> None:
        try:
            group.wait()
            ends.append("synced")
        except OSError as exc:
            ends.append(errno.errorcode[exc.errno or 0])

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("fails", "first_end", "next_end"),
    [((), "synced", "synced"), ((1,), "EIO", "synced"), ((1, 2), "EIO", "EIO")],
    ids=["none-fails", "first-fails", "both-fail"],
)
def test_threads_that_come_during_a_sync_share_the_next_one_and_its_failure(
    fails: tuple[int, ...], first_end: str, next_end: str
) -> None:
    kernel, queue, ends = SteppedSync(*fails), CountingLock(), list[str]()
    group = GroupSync(kernel.sync)
    group._one_at_a_time = queue  # type: ignore[assignment]  # noqa: SLF001 -- locks do not count
    first = started(group, ends)
    until(lambda: kernel.begun == 1, "the first sync runs")
    others = [started(group, ends) for _ in range(8)]
    until(lambda: len(queue.asked) == 9, "8 threads wait")

    kernel.go.release()
    first.join(10)
    until(lambda: kernel.begun == 2, "the second sync runs")
    assert ends == [first_end]  # a sync that began before they asked is none for the others
    kernel.go.release()
    for thread in others:
        thread.join(10)
    assert ends == [first_end, *[next_end] * 8]
    assert kernel.begun == 2

    kernel.go.release()
    started(group, ends).join(10)
    assert (ends[-1], kernel.begun) == ("synced", 3)


def test_forked_process_waits_for_no_thread_of_its_parent() -> None:
    kernel, ends = SteppedSync(), list[str]()
    group = GroupSync(kernel.sync)
    thread = started(group, ends)
    until(lambda: kernel.begun == 1, "a sync runs")

    pid = os.fork()
    if not pid:
        kernel.go.release()
        group.wait()
        os._exit(7)
    until(lambda: os.waitpid(pid, os.WNOHANG) == (pid, 7 << 8), "the forked process is done")
    kernel.go.release()
    thread.join(10)

    assert ends == ["synced"]


class SlowToCount(SpoolFolder):
    """A directory whose files take as long to count as ``gate`` is closed; each count is old at once."""

    def __init__(self, folder: Path, gate: threading.Event) -> None:
        super().__init__(folder, DiskSync(folder), usage_cache_s=0)
        vars(self).update(gate=gate, counts=[])

    gate: threading.Event
    counts: list[None]

    def used_bytes(self) -> int:
        self.counts.append(None)
        assert self.gate.wait(60)
        return 7


def test_one_caller_counts_at_first_and_none_later(folder: Path, key: AgeBackend) -> None:
    gate = threading.Event()
    store = SlowToCount(folder, gate)
    spool, seen = Spool(store, key, 64 * MIB), list[int]()
    callers = [threading.Thread(target=lambda: seen.append(spool.use().used_bytes)) for _ in range(8)]
    for each in callers:
        each.start()
    until(lambda: store.counts, "the first count")
    gate.set()
    for each in callers:
        each.join(60)
    assert seen == [7] * 8

    gate.clear()
    before = len(store.counts)
    for _ in range(3):
        write(spool, label())
        spool.use()
    assert len(store.counts) <= before + 1
    gate.set()
