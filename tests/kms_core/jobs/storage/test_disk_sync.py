"""What is on disk before its job is stored: files of the spool, with their names, or an error."""

import errno
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from pyrage import x25519

from kms_core.backends.age import AgeBackend
from kms_core.backends.key_files import KeyFiles
from kms_core.jobs.storage.s3 import MultipartJournal
from kms_core.jobs.storage.spool import UPLOAD, Label, Spool
from kms_core.jobs.storage.spool_folder import DiskSync, GroupSync, SpoolFolder
from kms_core.secure_files import make_folders
from kms_protocol.errors import ResultExpired, SpoolFull, SpoolUnavailable
from support.synced_disk import SyncedDisk, install
from support.waiting import until

JOB = "11111111-1111-1111-1111-111111111111"
HEAD = "head"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "spool").mkdir(0o700)
    return tmp_path / "spool"


@pytest.fixture
def disk(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> SyncedDisk:
    disk = SyncedDisk(tmp_path / "synced")
    disk.sync_all(folder)
    return install(disk, monkeypatch.setattr)


@pytest.fixture
def key(tmp_path: Path) -> AgeBackend:
    path = tmp_path / "spool.key"
    path.write_text(str(x25519.Identity.generate()))
    path.chmod(0o600)
    return AgeBackend(KeyFiles(path), native=False)


def spool_of(folder: Path, key: AgeBackend, *, enabled: bool = True) -> Spool:
    return Spool(SpoolFolder(folder, DiskSync(folder, enabled=enabled)), key, 1 << 30)


def write(spool: Spool, label: Label, data: bytes) -> Label:
    with spool.writing(label) as out:
        out.write(data)
    return replace(label, ref=out.ref)


def read(spool: Spool, label: Label) -> bytes:
    with spool.opened(label) as reader:
        return b"".join(reader.slabs())


@pytest.mark.parametrize("size", [0, 100, 300_000])
def test_blob_survives_a_power_cut(folder: Path, key: AgeBackend, disk: SyncedDisk, size: int) -> None:
    data, spool = os.urandom(size), spool_of(folder, key)
    upload = write(spool, Label("default", JOB, UPLOAD), data)
    head = write(spool, Label("default", JOB, HEAD, "1"), b"later")

    disk.cut(folder)

    assert read(spool, upload) == data
    assert read(spool, head) == b"later"


def test_blob_that_is_only_written_does_not_survive(folder: Path, key: AgeBackend, disk: SyncedDisk) -> None:
    """Shows that the test above can fail."""
    spool = spool_of(folder, key, enabled=False)
    upload = write(spool, Label("default", JOB, UPLOAD), b"data")
    assert read(spool, upload) == b"data"

    disk.cut(folder)

    with pytest.raises(ResultExpired):
        read(spool, upload)


def test_note_of_a_multipart_upload_survives_a_power_cut(folder: Path, disk: SyncedDisk) -> None:
    notes = MultipartJournal(SpoolFolder(folder, DiskSync(folder)))
    notes.add(JOB, "1", "s3://bucket/key", "upload-1")

    disk.cut(folder)

    assert [note.upload for note in notes.noted(["s3://bucket/key"])] == ["upload-1"]


def test_missing_folders_survive_a_power_cut(tmp_path: Path, disk: SyncedDisk) -> None:
    top = tmp_path / "top"
    top.mkdir()

    make_folders(top / "state" / "spool")
    make_folders(top / "state" / "spool")
    disk.cut(top)

    assert (top / "state" / "spool").is_dir()


FAILURES: dict[str, Callable[[Path], bool]] = {
    "file": lambda path: path.name == UPLOAD,
    "folder": lambda path: path.name == JOB,
    "spool": lambda path: path.name == "spool",
}


def held_in(folder: Path) -> int:
    """The number of open files in a folder, itself among them."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found += link.readlink().is_relative_to(folder)
    return found


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("fails", FAILURES.values(), ids=FAILURES)
def test_failed_sync_drops_the_blob_and_is_not_tried_again(
    folder: Path,
    key: AgeBackend,
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[[Path], bool],
    number: int,
) -> None:
    real = os.fsync
    failed: list[tuple[Path, int]] = []
    synced: list[tuple[Path, int]] = []

    def sync(fd: int) -> None:
        path, inode = Path(f"/proc/self/fd/{fd}").readlink(), os.fstat(fd).st_ino
        if fails(path) and not failed:
            failed.append((path, inode))
            os.dup(fd)  # or the next file gets this inode
            raise OSError(number, os.strerror(number))
        synced.append((path, inode))
        real(fd)

    monkeypatch.setattr(os, "fsync", sync)
    spool, label = spool_of(folder, key), Label("default", JOB, UPLOAD)
    before = held_in(folder)

    expected = SpoolUnavailable if number == errno.EIO else SpoolFull
    with pytest.raises(expected) as caught:
        write(spool, label, b"first")

    assert list(folder.iterdir()) == []
    assert held_in(folder) == before + 1
    assert caught.value.code in {"spool_unavailable", "spool_full"}
    written = write(spool, label, b"second")
    assert read(spool, written) == b"second"
    assert failed[0] not in synced or failed[0][0] == folder  # the spool itself has no second life


class Kernel:
    """A sync that ends when it is told to."""

    def __init__(self) -> None:
        self.begun = 0
        self.go = threading.Semaphore(0)
        self.fails: set[int] = set()

    def sync(self) -> None:
        self.begun += 1
        mine = self.begun
        assert self.go.acquire(timeout=10)
        if mine in self.fails:
            raise OSError(errno.EIO, "broken")


class Queue:
    """A lock that counts the threads that have asked for it."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self.asked.append(threading.get_ident())
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def queued(group: GroupSync) -> Queue:
    group._one_at_a_time = queue = Queue()  # type: ignore[assignment]  # noqa: SLF001 -- locks do not count
    return queue


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


def test_threads_that_come_during_a_sync_share_the_next_one() -> None:
    kernel, ends = Kernel(), list[str]()
    group = GroupSync(kernel.sync)
    queue = queued(group)
    first = started(group, ends)
    until(lambda: kernel.begun == 1, "the first sync runs")
    others = [started(group, ends) for _ in range(8)]
    until(lambda: len(queue.asked) == 9, "8 threads wait")

    kernel.go.release()
    first.join(10)
    until(lambda: kernel.begun == 2, "the second sync runs")
    assert ends == ["synced"]  # a sync that began before they asked is none for the others
    kernel.go.release()
    for thread in others:
        thread.join(10)

    assert ends == ["synced"] * 9
    assert kernel.begun == 2


def test_failed_sync_fails_for_all_that_shared_it_and_for_no_other() -> None:
    kernel, ends, later = Kernel(), list[str](), list[str]()
    kernel.fails = {1}
    group = GroupSync(kernel.sync)
    queue = queued(group)
    first = started(group, ends)
    until(lambda: kernel.begun == 1, "the first sync runs")
    kernel.fails = {1, 2}
    others = [started(group, ends) for _ in range(3)]
    until(lambda: len(queue.asked) == 4, "3 threads wait")
    kernel.go.release(2)
    for thread in (first, *others):
        thread.join(10)

    last = started(group, later)
    kernel.go.release()
    last.join(10)

    assert ends == ["EIO"] * 4
    assert later == ["synced"]
    assert kernel.begun == 3


def test_forked_process_waits_for_no_thread_of_its_parent() -> None:
    kernel, ends = Kernel(), list[str]()
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
