"""The files of an install that a backup holds, and the archive of them.

They are opened one after another, in an order that is consistent:

1. Redis, if it is the embedded server: its append-only files as they are at one moment.
2. Anchors of documents, then public keys, then the other files of the state directory. An anchor must not be
   newer than its document, nor a recipient newer than its identity.
3. The audit log, which must not be older than its anchors in Redis.
4. The spool. Whatever a record names was in it before the record was written, and an input stays there for
   ``input_grace_s`` after the end of its job.
"""

import errno
import hashlib
import os
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, Final, Literal, cast
from urllib.parse import unquote, urlsplit

import msgspec

from kms_cli.age_files import AgeFile
from kms_cli.local.valkey import embedded_url
from kms_core.backends.age import parts_of
from kms_core.backends.age_settings import AgeSection
from kms_core.envelope.sealing import Sealing
from kms_core.payload.streaming import RangeReader, SlabSealer
from kms_core.settings.load import DEFAULT_REDIS_URL
from kms_core.settings.model import Settings
from kms_protocol.errors import BadInput, Unavailable
from kms_protocol.wire import NOT_JSON

MANIFEST: Final = "kms-backup.json"
SETTINGS: Final = "kms.toml"
_AOF: Final = Path("valkey/appendonlydir")
_AOF_MANIFEST: Final = "appendonly.aof.manifest"
_INSTALL: Final = "hosts/install"
_LIVE_ONLY: Final = ("valkey", "run", "log", "prometheus")  # data of Valkey is read by itself
_TRIES: Final = 50


Change = Literal["never", "append", "any"]
VERSION: Final = 1
_MODE: Final = 0o600
_LAST_TIME: Final = 2**33  # seconds since the epoch: the year 2242
_READ_BYTES: Final = 1024 * 1024
_MANIFEST_BYTES: Final = 256 * 1024 * 1024
Advance = Callable[[int], object]
"""Takes the size in bytes of each part that was written or read, to show progress."""
KeepFile = Callable[[tarfile.TarInfo, Iterator[bytes]], object]
"""Takes the entry of a file, and its content in parts."""


class FilesKeepChanging(Unavailable):
    """Files were replaced or cut each time they were read."""

    hint = "try again; if it happens each time, stop the service, take the backup, and start the service"


@dataclass(frozen=True, slots=True)
class Source:
    """An open file of the install: its first ``size`` bytes under the name that it has in the archive.

    ``change`` says how the service changes such a file in place: never, by appending, or in any way.
    """

    name: str
    path: Path
    file: BinaryIO
    size: int
    change: Change = "never"


@dataclass(slots=True)
class InstalledFiles:
    """The files of one install. ``notes`` says what ``all`` left out, once it has ended.

    Names are paths in the state directory; files elsewhere have their default name there, or ``outside/…``.
    """

    settings: Settings
    environ: Mapping[str, str]
    config: Path | None
    with_spool: bool = True
    notes: list[str] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)
    """The paths of files that were not in the state directory, by name."""

    def all(self) -> Iterator[Source]:
        """Open each file. Raises OSError, and FilesKeepChanging where a file is gone that must be there."""
        if self._is_embedded():
            yield from self._valkey()
        yield from self._state()
        audit, spool = self.settings.kms.audit.path.absolute(), self.settings.kms.jobs.spool_dir.absolute()
        for path, size in _standing(audit):
            try:
                yield from self._opened(path, f"audit/{path.relative_to(audit)}", "append", size)
            except FileNotFoundError as exc:
                raise FilesKeepChanging(f"{path} was removed before it was read") from exc
        if self.settings.kms.jobs.spool_bucket is not None:
            self.notes.append("the spool, which is in a bucket")
        elif self.with_spool:
            for path, _ in _walk(spool):
                with suppress(FileNotFoundError):  # of a job that has ended
                    yield from self._opened(path, f"spool/{path.relative_to(spool)}", "any")
        else:
            self.notes.append("the spool: jobs that need it end with result_expired")
            with suppress(FileNotFoundError):
                yield from self._opened(spool / _INSTALL, f"spool/{_INSTALL}")
        self._note_others()

    @property
    def _folder(self) -> Path:
        return self.settings.state_dir.absolute()

    # -- Redis ----------------------------------------------------------------------------------------

    def _is_embedded(self) -> bool:
        """Return whether the jobs are in the embedded Valkey of this state directory."""
        embedded = {DEFAULT_REDIS_URL, embedded_url(self._folder, self.environ)}
        has_data = (self._folder / _AOF / _AOF_MANIFEST).exists()
        if has_data and self.settings.kms.redis.url in embedded:
            return True
        self.notes.append("Redis, which is not the embedded Valkey: back it up before this command runs")
        return False

    def _valkey(self) -> Iterator[Source]:
        """The manifest of Valkey and the files that it names, each with its size at one moment.

        Valkey only appends to these files, so what they have up to that size does not change. To rewrite
        them, Valkey makes other files, replaces the manifest and deletes the old files. Those that are open
        here stay readable; they have every command up to that replacement. Raises FilesKeepChanging if files
        were deleted before they were opened, in each of several attempts.
        """
        folder = self._folder / _AOF
        for _ in range(_TRIES):
            with ExitStack() as stack, suppress(FileNotFoundError):
                listed = stack.enter_context((folder / _AOF_MANIFEST).open("rb"))
                lines = [line.split() for line in listed.read().decode().splitlines()]
                files = {_AOF_MANIFEST: listed}
                for name in (line[1] for line in lines if line[-1] != "h"):  # h: replaced by a rewrite
                    files[name] = stack.enter_context((folder / name).open("rb"))
                sizes = [os.fstat(file.fileno()).st_size for file in files.values()]
                listed.seek(0)
                for (name, file), size in zip(files.items(), sizes, strict=True):
                    yield Source(str(_AOF / name), folder / name, file, size, "append")
                return
        raise FilesKeepChanging(f"Valkey replaces its files in {folder} all the time")

    # -- the state directory --------------------------------------------------------------------------

    def _state(self) -> Iterator[Source]:
        named = self._named()
        jobs, apart = self.settings.kms.jobs, {self._folder / name for name in _LIVE_ONLY}
        roots = {root.absolute() for root in jobs.roots}
        apart |= {self.settings.kms.audit.path.absolute(), jobs.spool_dir.absolute(), *roots}
        found = sorted(path for path, _ in _walk(self._folder, apart))
        anchors = [path for path in found if path.suffix == ".anchor"]
        for path in dict.fromkeys((*anchors, *named, *found)):
            name = str(path.relative_to(self._folder)) if path.is_relative_to(self._folder) else ""
            if path != self._folder / MANIFEST:
                with suppress(FileNotFoundError):
                    yield from self._opened(path, name or named[path], link=path in named)

    def _named(self) -> dict[Path, str]:
        """The files that settings name, public keys first, and their default names."""
        kms, age = self.settings.kms, self.settings.backend(AgeSection)
        own = {age.public_key_path: "age/public_key.txt"}
        keys = [parts_of(parts, age) for _, uri in kms.key_uris if (parts := urlsplit(uri)).scheme == "age"]
        documents = [str(place) for place, _, _ in keys if not isinstance(place, Path)] + [
            kms.auth.tokens or ""
        ]
        own |= {public: "" for _, public, _ in keys if public is not None}
        own |= {place: "" for place, _, _ in keys if isinstance(place, Path)}
        own |= {Path(unquote(urlsplit(url).path)): "" for url in documents if url.startswith("file:")}
        own |= {
            age.private_key_path: "age/private_key.txt",
            kms.jobs.spool_identity_path: "spool.key",
            kms.jobs.intake_identity_path: "intake.key",
            kms.audit.key_path: "audit.key",
            kms.audit.signing_key_path: "audit-signing.key",
            kms.audit.signing_key_path.with_suffix(".pub"): "audit-signing.pub",
            kms.auth.tokens_path: "tokens.json",
        }
        if self.config is not None:
            own[self.config] = SETTINGS
        self.notes += [f"{url}, which is in a bucket" for url in documents if url.startswith("s3:")]
        return {path.absolute(): self._free_name(path.absolute(), name) for path, name in own.items()}

    def _free_name(self, path: Path, name: str) -> str:
        return name if name and not (self._folder / name).exists() else f"outside{path}"

    def _opened(
        self, path: Path, name: str, change: Change = "never", size: int | None = None, *, link: bool = False
    ) -> Iterator[Source]:
        """Open a plain file; ``link``: also by a symbolic link. Raises OSError."""
        if not is_safe_name(name):
            self.notes.append(f"{str(path)!a}, whose name an archive may not have")
            return
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if link else os.O_NOFOLLOW)
        with open(os.open(path, flags), "rb") as file:  # noqa: PTH123 -- a descriptor, not a path
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "not a plain file", str(path))
            if path != self._folder / name:
                self.origins[name] = str(path)
            yield Source(name, path, file, found.st_size if size is None else size, change)

    def _note_others(self) -> None:
        """Note which other files the settings name, and which keys are in the servers of backends."""
        roots, held = self.settings.kms.jobs.roots, {*self.origins.values()}
        self.notes += [f"{root}, files of callers" for root in roots if root.is_dir()]
        self.notes += [
            f"keys of {scheme}, in its server" for scheme in sorted(self.settings.used_backends - {"age"})
        ]
        files = filter(os.path.isfile, _paths_of(self.settings))  # without those that may not be looked at
        others = {path.absolute() for path in files}
        self.notes += [
            f"{path}, which the settings name"
            for path in sorted(others)
            if str(path) not in held and not path.is_relative_to(self._folder)
        ]


def is_safe_name(name: str) -> bool:
    """Return whether an archive may have a file of this name: relative, in one form, printable."""
    path = PurePosixPath(name)
    return str(path) == name and name.isprintable() and not path.is_absolute() and ".." not in path.parts


def _walk(folder: Path, apart: frozenset[Path] | set[Path] = frozenset()) -> Iterator[tuple[Path, int]]:
    """The plain files below a folder and their sizes; no temporary file, no lock, no folder of ``apart``."""
    for at, folders, names in os.walk(folder, onerror=_unless_gone):
        folders[:] = [name for name in folders if Path(at, name) not in apart]
        for path in (Path(at, name) for name in names):
            is_live = path.name.startswith(".") or path.name == "lock" or path.suffix == ".lock"
            with suppress(FileNotFoundError):
                found = path.lstat()
                if not is_live and stat.S_ISREG(found.st_mode):
                    yield path, found.st_size


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _standing(folder: Path) -> list[tuple[Path, int]]:
    """The files below a folder and their sizes, read twice without a change in between, if that succeeds.

    Chains of the audit log name each other's ends: what one names must be in the other.
    """
    found = sorted(_walk(folder))
    for _ in range(_TRIES):
        before, found = found, sorted(_walk(folder))
        if before == found:
            break
    return found


def _paths_of(settings: Settings) -> Sequence[Path]:
    """All paths in the settings."""
    found: list[Path] = []
    msgspec.to_builtins(settings, enc_hook=found.append)  # paths are the only values that are no builtins
    return found


# The archive of a backup: a tar file in an age file. Stock ``age -d`` and ``tar`` open it.
#
# Its last member is a manifest with size and SHA-256 of each file before it. Memory is constant but for the
# manifest. It holds plain files only: no link, no device, no path out of the folder that it is read into.


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

    def __init__(self, begun: Sealing, target: BinaryIO, advance: Advance = lambda _: None) -> None:
        self._target, self._sealer, self._advance = target, SlabSealer(begun.payload_key), advance
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
        self._advance(len(data))


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


def read_archive(sealed: AgeFile, key: bytes, keep: KeepFile, advance: Advance = lambda _: None) -> Manifest:
    """Read an archive, and pass each file to ``keep``, and the sizes of its parts to ``advance``.

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
                parts = _parts(content, digest.update, advance)
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


def _parts(content: IO[bytes], update: Callable[[bytes], object], advance: Advance) -> Iterator[bytes]:
    while part := content.read(_READ_BYTES):
        update(part)
        advance(len(part))
        yield part


def _verified(raw: bytes, found: list[SavedFile]) -> Manifest:
    """The manifest, which lists exactly the files that were found. Raises NotABackup."""
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except NOT_JSON as exc:
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
