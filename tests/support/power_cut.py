"""Services whose power is cut while they work, and the jobs that they had acknowledged by then.

``OnSyncedDisk`` is left with what it synced, in the strictest reading of POSIX (``synced_disk``), and needs
no privilege. ``OnDiskImage`` has its state in a mounted image: the file system is shut down without a flush,
as xfstests do it, and what the image holds then is mounted again.
"""

import fcntl
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx2 as httpx
import pytest

from kms_core.programs import tether
from support.service import PROGRAMS, Json, Service, b64, unb64
from support.synced_disk import SyncedDisk
from support.waiting import until

NO_LOOP: Final = "no image can be mounted here: it needs root, loop devices and mkfs"
SETTINGS: Final = "[kms.jobs]\nlease_s = 2\n"
_TESTS: Final = Path(__file__).parents[1]
_IMAGE_BYTES: Final = 256 << 20
_GOING_DOWN: Final = 0x8004587D  # _IOR('X', 125, __u32): EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN
_WITHOUT_LOG: Final = 2
_SENDERS: Final = 4


class OnSyncedDisk(Service):
    """A service whose syncs are recorded. ``disk.broken.touch()`` makes them fail."""

    def __init__(self, folder: Path, settings: str = "") -> None:
        super().__init__(folder, settings)
        self.disk = SyncedDisk(folder / "synced")

    def spawn(self, name: str) -> None:
        """Start ``api`` or ``worker``, and wait for nothing."""
        program = ["-m", "support.synced_disk", str(self.disk.folder), PROGRAMS[name]]
        with (self.logs / f"{name}.log").open("ab") as output:
            environ = self.environ | {"PYTHONPATH": str(_TESTS)}
            self._processes[name] = tether.spawn([sys.executable, "-P", *program], env=environ, output=output)

    def sync_disk(self) -> None:
        """Put on disk what the test wrote."""
        self.disk.sync_all(self.files)

    def cut(self) -> None:
        """End all processes at once, and leave of spool and files what was synced."""
        for name in list(self._processes):
            self.kill(name)
        for folder in (self.spool, self.files):
            self.disk.cut(folder)


class OnDiskImage(Service):
    """A service whose state, Redis included, is in an image of its own."""

    def __init__(self, folder: Path, settings: str = "", kind: str = "ext4") -> None:
        """Make and mount the image; skips the test where that cannot be done."""
        self._image, self._at = folder / "image", folder / "disk"
        self._at.mkdir()
        with self._image.open("wb") as file:
            file.truncate(_IMAGE_BYTES)
        made = subprocess.run([f"mkfs.{kind}", "-q", self._image], capture_output=True, check=False)
        if made.returncode or not self._mount():
            pytest.skip(NO_LOOP)
        super().__init__(self._at, settings)

    def _mount(self) -> bool:
        """By a device of its own: another mount namespace may have the file system that was shut down."""
        found = subprocess.run(
            ["losetup", "--find", "--show", self._image], capture_output=True, text=True, check=False
        )
        device = found.stdout.strip()
        mounted = subprocess.run(["mount", device, self._at], capture_output=True, check=False)
        subprocess.run(["losetup", "--detach", device], capture_output=True, check=False)
        return not mounted.returncode

    def sync_disk(self) -> None:
        """Put on disk what the test wrote."""
        os.sync()

    def cut(self) -> None:
        """Shut the file system down without a flush, and mount what is in the image then.

        Writes that are under way reach it, in any order, and others do not.
        """
        fd = os.open(self._at, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _GOING_DOWN, struct.pack("I", _WITHOUT_LOG))
        finally:
            os.close(fd)
        for name in list(self._processes):
            self.kill(name)
        self.valkey.stop()
        until(self._unmount, "no process uses the image")
        assert self._mount(), "the image cannot be mounted again"
        self.valkey.start()

    def _unmount(self) -> bool:
        return not subprocess.run(["umount", self._at], capture_output=True, check=False).returncode

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        subprocess.run(["umount", "-l", self._at], check=True)


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A job that was answered with 202, and the check of its result."""

    job_id: str
    name: str
    check: Callable[[str], None]


class Senders:
    """Threads that submit jobs of all kinds until the power is cut."""

    def __init__(self, service: Service, files: int) -> None:
        """``files`` are the sources of jobs from file to file, and of trees, that are made now."""
        self._service = service
        self._numbers = iter(range(files))
        self._next = threading.Lock()
        self._sealed = service.encrypt(b"sealed" * 1000, None)
        self.acknowledged: list[Acknowledged] = []
        for number in range(files):
            (service.files / f"in{number}").mkdir()
            for name in ("a", "b"):
                (service.files / f"in{number}" / name).write_bytes(b"%d" % number * 20_000)
        self._threads = [threading.Thread(target=self._send, daemon=True) for _ in range(_SENDERS)]

    def start(self) -> None:
        """Begin to submit jobs."""
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait until each thread has found the service gone, or has no file left."""
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def succeeded_jobs(self) -> int:
        """The number of jobs that have succeeded."""
        return len(self._service.get("/jobs?state=succeeded&limit=100").json()["jobs"])

    def _send(self) -> None:
        while True:
            with self._next:
                number = next(self._numbers, None)
            if number is None:
                return
            for kind in (self._upload, self._back, self._bulk, self._parts, self._file, self._tree):
                try:
                    kind(number)
                except httpx.HTTPError:
                    return
                except AssertionError:  # an error of the disk that is going down
                    return

    def _note(self, job_id: str, name: str, check: Callable[[str], None]) -> None:
        def ends(job_id: str) -> None:
            self._service.wait(job_id, "succeeded")
            check(job_id)

        self.acknowledged.append(Acknowledged(job_id, name, ends))

    # -- kinds of jobs -------------------------------------------------------------------------------

    def _upload(self, number: int) -> None:
        data = b"%d" % number * 40_000

        def check(job_id: str) -> None:
            assert self._service.decrypt(self._service.result(job_id), None) == data

        self._note(self._service.upload("encrypt", data), "upload", check)

    def _back(self, number: int) -> None:
        def check(job_id: str) -> None:
            assert self._service.result(job_id) == b"sealed" * 1000

        self._note(self._service.upload("decrypt", self._sealed), f"upload back {number}", check)

    def _bulk(self, number: int) -> None:
        self._items(number, 3)

    def _parts(self, number: int) -> None:
        self._items(number, 700)

    def _items(self, number: int, count: int) -> None:
        items = [{"plaintext": b64(b"%d/%d" % (number, index))} for index in range(count)]

        def check(job_id: str) -> None:
            lines = self._service.result(job_id).splitlines()
            assert len(lines) == count
            last: Json = httpx.Response(200, content=lines[-1]).json()
            assert self._service.decrypt(unb64(last["ciphertext"]), None) == b"%d/%d" % (number, count - 1)

        self._note(self._service.submit({"kind": "encrypt", "items": items}), f"{count} items", check)

    def _file(self, number: int) -> None:
        target = self._service.files / f"out{number}"

        def check(_: str) -> None:
            assert self._service.decrypt(target.read_bytes(), None) == b"%d" % number * 20_000

        source = f"file://{self._service.files}/in{number}/a"
        job = {"kind": "encrypt", "source": source, "target": f"file://{target}"}
        self._note(self._service.submit(job), "file", check)

    def _tree(self, number: int) -> None:
        target = self._service.files / f"many{number}"

        def check(_: str) -> None:
            for name in ("a.age", "b.age"):
                assert self._service.decrypt((target / name).read_bytes(), None) == b"%d" % number * 20_000

        source = f"file://{self._service.files}/in{number}/*"
        job = {"kind": "encrypt", "source": source, "target": f"file://{target}/"}
        self._note(self._service.submit(job), "tree", check)


def _trouble(job: Acknowledged) -> str:
    try:
        job.check(job.job_id)
    except (AssertionError, OSError) as exc:
        return f"{job.name} {job.job_id}: {str(exc)[:300]}"
    return ""


def jobs_lost_to_power_cut(service: OnSyncedDisk | OnDiskImage, files: int) -> list[str]:
    """Cut the power of a service under load, start it again, and name the acknowledged jobs that are lost.

    Only jobs that were acknowledged before count: ext4 answers syncs that it cannot finish while it shuts
    down, some of them with success.
    """
    service.start()
    senders = Senders(service, files)
    service.sync_disk()
    senders.start()
    until(lambda: senders.succeeded_jobs() > files // 2, "some jobs have succeeded", poll_s=0.05)
    acknowledged = [*senders.acknowledged]
    service.cut()
    senders.join()
    service.start()
    assert acknowledged
    return [trouble for job in acknowledged if (trouble := _trouble(job))]
