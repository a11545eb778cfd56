"""A disk that keeps nothing but what was synced, in the strictest reading of POSIX.

``install`` records, at each fsync of a process, the file's bytes or the directory's entries. ``cut`` then
makes a directory what a disk may hold after a power cut: a file is there only if its directory was synced
with it, and has the bytes of its last sync. Real file systems keep more (ext4 syncs a new name with its
file), so this also finds what they hide. It needs no privilege. ``python -m support.synced_disk DIR MODULE``
runs a program on such a disk; while ``DIR/broken`` exists, every sync there fails with EIO.
"""

import errno
import json
import os
import runpy
import shutil
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

SetAttribute = Callable[[object, str, object], None]


class SyncedDisk:
    """What was synced, by inode: the file in ``<inode>.file``, names and inodes in ``<inode>.folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.broken = folder / "broken"
        self.syncs: list[Path] = []
        """Of this process, in order."""

    def synced(self, fd: int) -> None:
        """Note that the kernel has synced an open file or directory."""
        found = os.fstat(fd)
        self.syncs.append(Path(os.readlink(f"/proc/self/fd/{fd}")))  # noqa: PTH115 -- may be deleted
        if stat.S_ISDIR(found.st_mode):
            with os.scandir(fd) as entries:
                names = {entry.name: entry.inode() for entry in entries}
            self._put(self._of(found.st_ino, "folder"), json.dumps(names).encode())
            self._of(found.st_ino, "file").unlink(missing_ok=True)  # of a file that had this inode before
        else:
            self._put(self._of(found.st_ino, "file"), Path(f"/proc/self/fd/{fd}").read_bytes(), fd)
            self._of(found.st_ino, "folder").unlink(missing_ok=True)

    def forget(self, inode: int) -> None:
        """Forget what was synced when the inode was another file's."""
        for kind in ("file", "folder"):
            self._of(inode, kind).unlink(missing_ok=True)

    def keep(self, path: Any, dir_fd: int | None) -> None:  # noqa: ANN401 -- as os has it
        """Keep a file that is about to lose its only name: a power cut before a sync brings it back."""
        with suppress(FileNotFoundError, FileExistsError):
            found = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
            if found.st_nlink == 1 and self._of(found.st_ino, "file").exists():
                os.link(path, self._of(found.st_ino, "kept"), src_dir_fd=dir_fd, follow_symlinks=False)

    def sync_all(self, folder: Path) -> None:
        """Sync all that is there: the state from which a test begins."""
        for above, _, names in os.walk(folder):
            for path in (*(Path(above, name) for name in names), Path(above)):
                fd = os.open(path, os.O_RDONLY)
                self.synced(fd)
                os.close(fd)

    def cut(self, folder: Path) -> None:
        """Leave in ``folder`` only what was synced. No process may use it."""
        kept = folder.with_name(f"{folder.name}.cut")
        found = (*self.folder.glob("*.kept"), *folder.rglob("*"))
        there = {path.lstat().st_ino: path for path in found}
        self._restore(folder.stat().st_ino, kept, there, set())
        shutil.rmtree(folder)
        kept.rename(folder)

    def _restore(self, inode: int, path: Path, there: dict[int, Path], moved: set[int]) -> None:
        """Make a directory of what was synced. Files are moved into it, since a copy has another inode."""
        path.mkdir(mode=0o700)
        folder = self._of(inode, "folder")
        for name, each in json.loads(folder.read_bytes()).items() if folder.exists() else ():
            content, at = self._of(each, "file"), path / name
            if not content.exists():
                self._restore(each, at, there, moved)
                continue
            if each in moved:
                at.hardlink_to(there[each])
            elif each in there:  # else its name was removed, and that was not synced
                there[each] = there[each].rename(at)
                moved.add(each)
            at.write_bytes(content.read_bytes())
            for attribute in os.listxattr(at):
                os.removexattr(at, attribute)
            shutil.copystat(content, at)

    def _of(self, inode: int, kind: str) -> Path:
        return self.folder / f"{inode}.{kind}"

    @staticmethod
    def _put(path: Path, content: bytes, like: int | None = None) -> None:
        temporary = path.with_name(f"{path.name}.{os.urandom(8).hex()}")
        temporary.write_bytes(content)
        if like is not None:
            shutil.copystat(f"/proc/self/fd/{like}", temporary)
        temporary.rename(path)


def install(disk: SyncedDisk, patch: SetAttribute = setattr) -> SyncedDisk:
    """Record the syncs of this process, and of those that it forks. ``patch`` sets an attribute."""
    for name in ("fsync", "fdatasync"):
        patch(os, name, _recorded(disk, getattr(os, name)))
    real_open, real_mkdir = os.open, os.mkdir

    def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:  # noqa: ANN401 -- as os has it
        fd = real_open(path, flags, mode, dir_fd=dir_fd)
        if flags & os.O_CREAT and flags & os.O_EXCL:
            disk.forget(os.fstat(fd).st_ino)
        return fd

    def made(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:  # noqa: ANN401 -- as os has it
        real_mkdir(path, mode, dir_fd=dir_fd)
        disk.forget(os.stat(path, dir_fd=dir_fd).st_ino)

    patch(os, "open", opened)
    patch(os, "mkdir", made)
    return disk


def _recorded(disk: SyncedDisk, real: Any) -> Any:  # noqa: ANN401 -- a builtin
    def sync(fd: int) -> None:
        if disk.broken.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)
        disk.synced(fd)

    return sync


def main(folder: str, module: str) -> None:
    """Run a module as the program."""
    install(SyncedDisk(Path(folder)))
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
