"""What a program asks of the disk, in order, since a test cannot cut the power.

A file survives a power cut where its content was synced before it got its name, and the folder afterwards.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest


@dataclass
class DiskSteps:
    """Steps of this process: ``sync``, ``name`` (rename, link), ``mkdir``; paths, and sizes in bytes."""

    steps: list[tuple[str, Path]] = field(default_factory=list)
    synced_bytes: dict[int, int] = field(default_factory=dict)  # by inode

    def assert_survives(self, path: Path) -> None:
        """The content was synced before the file got this name, and the folder after."""
        named = max(number for number, step in enumerate(self.steps) if step == ("name", path))
        found = path.stat()
        assert self.synced_bytes.get(found.st_ino) == found.st_size, f"{path} was not synced as it is"
        assert ("sync", path.parent) in self.steps[named + 1 :], f"{path.parent} was not synced afterwards"


def recorded(monkeypatch: pytest.MonkeyPatch) -> DiskSteps:
    """Note the steps of this process from now on; each is done as well."""
    disk = DiskSteps()
    mkdir = os.mkdir

    def note_mkdir(path: str | Path, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        mkdir(path, mode, dir_fd=dir_fd)
        disk.steps.append(("mkdir", _absolute(path, dir_fd)))

    monkeypatch.setattr(os, "mkdir", note_mkdir)
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, _noting_sync(disk, getattr(os, name)))
    for name in ("rename", "replace", "link"):
        monkeypatch.setattr(os, name, _noting(disk, getattr(os, name)))
    return disk


def _noting_sync(disk: DiskSteps, real: Callable[[int], None]) -> Callable[[int], None]:
    def note(fd: int) -> None:
        real(fd)
        path, found = Path(f"/proc/self/fd/{fd}").readlink(), os.fstat(fd)
        disk.steps.append(("sync", path))
        disk.synced_bytes[found.st_ino] = found.st_size

    return note


def _noting(disk: DiskSteps, real: Callable[..., None]) -> Callable[..., None]:
    def note(source: Path | str, target: Path | str, **options: int) -> None:
        inode = os.stat(source, dir_fd=options.get("src_dir_fd"), follow_symlinks=False).st_ino
        assert inode in disk.synced_bytes, f"{source} gets another name before its content was synced"
        real(source, target, **options)
        disk.steps.append(("name", _absolute(target, options.get("dst_dir_fd"))))

    return note


def _absolute(path: str | Path, dir_fd: int | None) -> Path:
    folder = Path.cwd() if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink()
    return folder / path
