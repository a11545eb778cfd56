"""A small disk, for what happens when it is full."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Mount such a disk at ``folder``; skips the test where none can be mounted."""
    with small_disk_or_none(folder, size_bytes) as disk:
        if disk is None:
            pytest.skip(f"no small disk can be mounted here, as user {os.geteuid()}")
        yield disk


@contextmanager
def small_disk_or_none(folder: Path, size_bytes: int) -> Iterator[Path | None]:
    """Mount a disk in memory at ``folder``, which is made. None where that cannot be done."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={size_bytes},mode=700"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
