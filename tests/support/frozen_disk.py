"""A disk that hangs: an ext4 file system in a file, frozen by fsfreeze(8) as a dead mount would be.

A process that writes there waits in the kernel and cannot be killed (state D) until the disk is thawed.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from support.power_cut import NO_LOOP

MIB: Final = 1024 * 1024


class FrozenDisk:
    """A mounted disk. ``with disk.frozen()`` makes it hang."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let nobody write until the block ends."""
        subprocess.run(["fsfreeze", "--freeze", str(self.folder)], check=True)
        try:
            yield
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", str(self.folder)], check=True)


@contextmanager
def frozen_disk(folder: Path) -> Iterator[FrozenDisk]:
    """Mount a small disk at ``folder``, which is made; skips the test where none can be mounted."""
    with disk_or_none(folder, 32 * MIB) as disk:
        if disk is None:
            pytest.skip(NO_LOOP)
        yield disk


@contextmanager
def disk_or_none(folder: Path, size_bytes: int) -> Iterator[FrozenDisk | None]:
    """Mount a disk at ``folder``, which is made; its image lies beside it. None where that cannot be done."""
    folder.mkdir(parents=True, exist_ok=True)
    image = folder.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(size_bytes)
    try:
        _run("mkfs.ext4", "-q", "-E", "root_owner=0:0", str(image))
        _run("mount", "-o", "loop", str(image), str(folder))
    except (OSError, subprocess.CalledProcessError):
        image.unlink()
        yield None
        return
    try:
        yield FrozenDisk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        image.unlink()


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)


def state_of(pid: int) -> str:
    """The state of a process, as ps(1) shows it: ``D`` waits for a disk. Empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
