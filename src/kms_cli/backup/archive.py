"""The archive of a backup: a tar file in an age file. Stock ``age -d`` and ``tar`` open it.

Its last member is a manifest with size and SHA-256 of each file before it. Memory is constant but for the
manifest. It holds plain files only: no link, no device, no path out of the folder that it is read into.
"""

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import PurePosixPath
from typing import IO, BinaryIO, Final, cast

import msgspec

from kms_cli.age_file.codec import AgeFile
from kms_cli.backup.sources import MANIFEST, FilesKeepChanging, Source, is_safe_name
from kms_core.envelope.sealing import Sealing
from kms_core.payload.streaming import RangeReader, SlabSealer
from kms_protocol.errors import BadInput
from kms_protocol.wire import NOT_JSON

VERSION: Final = 1
_MODE: Final = 0o600
_LAST_TIME: Final = 2**33  # seconds since the epoch: the year 2242
_READ_BYTES: Final = 1024 * 1024
_MANIFEST_BYTES: Final = 256 * 1024 * 1024


class NotABackup(BadInput):
    """A damaged archive, or one that ``kms backup`` did not write."""

    hint = "take another backup; nothing was restored"


class SavedFile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A file of a backup. ``origin`` is its path, if it was not in the state directory."""

    name: str
    size: int
    sha256: str
    origin: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The last member of a backup. ``left_out`` says what belongs to the install and is not in it."""

    version: int = VERSION
    service: str
    made_at: datetime
    host: str
    install_id: str
    state_dir: str
    files: tuple[SavedFile, ...]
    left_out: tuple[str, ...]

    @property
    def size(self) -> int:
        """The sizes of all files in bytes."""
        return sum(file.size for file in self.files)


class ArchiveWriter:
    """Writes an archive to a stream, which is complete after ``finish``."""

    def __init__(self, begun: Sealing, target: BinaryIO) -> None:
        self._target, self._sealer = target, SlabSealer(begun.payload_key)
        self.files: list[SavedFile] = []
        target.write(begun.head)

    def add(self, source: Source, origin: str = "") -> None:
        """Write a file. Raises FilesKeepChanging if it was cut, or changed as its source may not be."""
        before, digest = _stamp(source), hashlib.sha256()
        self._put(_header(source.name, source.size, before[1] // 10**9))
        for part in _first_bytes(source):
            digest.update(part)
            self._put(part)
        self._put(bytes(-source.size % tarfile.BLOCKSIZE))
        after = _stamp(source)
        has_grown = source.change == "append" and after[0] > before[0]
        if after != before and not has_grown and source.change != "any":
            raise FilesKeepChanging(f"{source.path} was changed while it was read")
        self.files.append(
            SavedFile(name=source.name, size=source.size, sha256=digest.hexdigest(), origin=origin)
        )

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest and the end."""
        content = msgspec.json.encode(manifest)
        self._put(_header(MANIFEST, len(content), int(manifest.made_at.timestamp())) + content)
        self._put(bytes(-len(content) % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE))  # filler, and the end
        self._target.write(self._sealer.finish())

    def _put(self, data: bytes) -> None:
        for slab in self._sealer.feed(data):
            self._target.write(slab)


def _header(name: str, size: int, mtime: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime, entry.mode = size, mtime, _MODE
    return entry.tobuf(tarfile.PAX_FORMAT)


def _first_bytes(source: Source) -> Iterator[bytes]:
    left = source.size
    while left:
        part = source.file.read(min(left, _READ_BYTES))
        if not part:
            raise FilesKeepChanging(f"{source.path} was cut while it was read")
        left -= len(part)
        yield part


def _stamp(source: Source) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds."""
    found = os.fstat(source.file.fileno())
    return found.st_size, found.st_mtime_ns


KeepFile = Callable[[tarfile.TarInfo, Iterator[bytes]], object]
"""Takes the entry of a file, and its content in parts."""


def read_archive(sealed: AgeFile, key: bytes, keep: KeepFile) -> Manifest:
    """Read an archive, and pass each file to ``keep``.

    Return the manifest, which describes all files. Until then nothing of what was passed is verified. Raises
    NotABackup if ``ArchiveWriter`` did not write it, DecryptFailed for a forgery.
    """
    if sealed.file_range is None:
        raise NotABackup("A backup is a file without armor, and no pipe")
    found, last, names = list[SavedFile](), b"", set[str]()
    plaintext = cast("BinaryIO", _Plaintext(RangeReader(key, sealed.file_range)))
    try:
        with tarfile.open(fileobj=plaintext, mode="r|", bufsize=_READ_BYTES) as tar:
            for entry in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                content = None if last else _content(tar, entry, names)
                if content is None:
                    raise NotABackup("A file follows the manifest")
                if entry.name == MANIFEST:
                    last = content.read(_MANIFEST_BYTES)
                    continue
                digest = hashlib.sha256()
                parts = _parts(content, digest.update)
                keep(entry, parts)
                for _ in parts:
                    """Content that was not kept is verified all the same."""
                found.append(SavedFile(name=entry.name, size=entry.size, sha256=digest.hexdigest()))
    except (tarfile.TarError, ValueError, EOFError) as exc:
        raise NotABackup("The file holds no archive of `kms backup`") from exc
    while plaintext.read(_READ_BYTES):
        """Filler after the archive, which must be genuine too."""
    return _verified(last, found)


class _Plaintext:
    """The plaintext as a stream, of which ``tarfile`` uses nothing but ``read``."""

    def __init__(self, payload: RangeReader) -> None:
        self._payload, self._position = payload, 0

    def read(self, size: int) -> bytes:
        part = self._payload.read_at(self._position, size)
        self._position += len(part)
        return part


def _content(tar: tarfile.TarFile, entry: tarfile.TarInfo, names: set[str]) -> IO[bytes] | None:
    """The content of a plain file. Raises NotABackup for any other entry, and for an unsafe name."""
    is_plain = entry.type in {tarfile.REGTYPE, tarfile.AREGTYPE} and not entry.issparse()
    is_timed = 0 <= entry.mtime < _LAST_TIME
    if not is_plain or not is_timed or entry.mode != _MODE or not is_safe_name(entry.name):
        raise NotABackup(f"{entry.name!r} is no plain file (0600) in the folder of the archive")
    folders = {str(folder) for folder in PurePosixPath(entry.name).parents}
    if entry.name in names or f"{entry.name}/" in names or folders & names:
        raise NotABackup(f"{entry.name!r} is in the archive twice, as a file or as a folder")
    names |= {entry.name, *(f"{folder}/" for folder in folders)}
    return tar.extractfile(entry)


def _parts(content: IO[bytes], update: Callable[[bytes], object]) -> Iterator[bytes]:
    while part := content.read(_READ_BYTES):
        update(part)
        yield part


def _verified(raw: bytes, found: list[SavedFile]) -> Manifest:
    """The manifest, which lists exactly the files that were found. Raises NotABackup."""
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (*NOT_JSON, msgspec.ValidationError) as exc:
        raise NotABackup("The archive has no manifest at its end: it is incomplete, or no backup") from exc
    if manifest.version != VERSION:
        raise NotABackup(
            f"The backup has version {manifest.version}: use the `kms` that wrote it, {manifest.service}"
        )
    listed = [msgspec.structs.replace(file, origin="") for file in manifest.files]
    if listed != found:
        names = {file.name for file in {*listed} ^ {*found}}
        raise NotABackup(
            f"The manifest does not describe what is in the archive: {', '.join(sorted(names)[:5])}"
        )
    return manifest
