"""The spool in a directory: ``<spool>/<folder>/<name>`` on a disk that all processes share, 0600 in 0700."""

import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kms_core.jobs.storage import plain_files
from kms_core.jobs.storage.blob_store import SpoolNote, WriteBlob
from kms_core.jobs.storage.disk_sync import DiskSync, disk_errors
from kms_core.payload import files
from kms_core.payload.files import FileRange

_USAGE_CACHE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class SpoolFolder:
    """A directory as ``BlobStore``."""

    path: Path
    sync: DiskSync
    usage_cache_s: float = _USAGE_CACHE_S
    is_remote: bool = False
    is_away: bool = False

    @contextmanager
    def create(self, folder: str, name: str, declared_bytes: int = 0) -> Iterator[WriteBlob]:
        del declared_bytes  # the kernel holds what is written
        with plain_files.create(self.path / folder, name) as file:

            def write(data: memoryview, position: int) -> None:
                with disk_errors():
                    files.write_all(file.fd, data, position)

            yield write
            self.sync.new_file(*file)

    @contextmanager
    def open(self, folder: str, name: str) -> Iterator[FileRange]:
        with plain_files.open_(self.path / folder, name) as fd:
            yield FileRange(fd, os.fstat(fd).st_size)

    def put(self, folder: str, name: str, data: bytes, *, durable: bool) -> None:
        written = f"{name}.tmp" if durable else name
        with plain_files.create(self.path / folder, written) as file:
            files.write_all(file.fd, memoryview(data), 0)
            if durable:
                (self.path / folder / written).rename(self.path / folder / name)
                self.sync.new_file(*file)

    def get(self, folder: str, name: str, most_bytes: int) -> SpoolNote:
        with plain_files.open_(self.path / folder, name) as fd:
            return SpoolNote(os.pread(fd, most_bytes, 0), os.fstat(fd).st_mtime)

    def names(self, folder: str, young_s: float = math.inf) -> list[str]:
        del young_s  # to read them takes little time
        return plain_files.names(self.path / folder)

    def remove(self, folder: str, name: str) -> None:
        plain_files.remove(self.path / folder, name)

    def remove_folder(self, folder: str) -> bool:
        return plain_files.remove_folder(self.path / folder)

    def folders(self, older_than_s: float) -> Iterator[str]:
        limit = time.time() - older_than_s
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.stat(follow_symlinks=False).st_mtime < limit:
                    yield entry.name

    def sweep(self) -> None:
        """Nothing: each file has its name from the beginning."""

    def used_bytes(self) -> int:
        """Bytes of all files below; those deleted during the count, or unreadable, count as 0."""
        total = 0
        for folder, _, names in os.walk(self.path):
            for name in names:
                with suppress(OSError):
                    total += Path(folder, name).lstat().st_size
        return total

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.path).free
