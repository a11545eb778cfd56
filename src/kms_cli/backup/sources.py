"""The files of an install that a backup holds, opened one after another in an order that is consistent.

1. Redis, if it is the embedded server: its append-only files as they are at one moment.
2. Anchors of documents, then public keys, then the other files of the state directory. An anchor must not be
   newer than its document, nor a recipient newer than its identity.
3. The audit log, which must not be older than its anchors in Redis.
4. The spool. Whatever a record names was in it before the record was written, and an input stays there for
   ``input_grace_s`` after the end of its job.
"""

import errno
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final, Literal
from urllib.parse import urlsplit

import msgspec

from kms_cli.local import installation
from kms_core.backends.age import parts_of
from kms_core.backends.age_settings import AgeSection
from kms_core.settings.load import DEFAULT_REDIS_URL
from kms_core.settings.model import Settings
from kms_protocol.errors import Unavailable

MANIFEST: Final = "kms-backup.json"
SETTINGS: Final = "kms.toml"
_AOF: Final = Path("valkey/appendonlydir")
_AOF_MANIFEST: Final = "appendonly.aof.manifest"
_INSTALL: Final = "hosts/install"
_LIVE_ONLY: Final = ("valkey", "run", "log", "prometheus")  # data of Valkey is read by itself
_TRIES: Final = 50


Change = Literal["never", "append", "any"]


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
        embedded = {DEFAULT_REDIS_URL, installation.embedded_url(self._folder, self.environ)}
        has_data = (self._folder / _AOF / _AOF_MANIFEST).exists()
        if has_data and self.settings.kms.redis.url in embedded:
            return True
        self.notes.append("Redis, which is not the embedded Valkey: back it up before this command runs")
        return False

    def _valkey(self) -> Iterator[Source]:
        """The files that the manifest of Valkey names, as long as they were at one moment.

        Valkey only appends to them. A rewrite makes others, replaces the manifest and deletes the old files:
        opened ones stay, with all commands up to the moment when Valkey changed over.
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
        own |= {Path(urlsplit(url).path): "" for url in documents if url.startswith("file:")}
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
            self.notes.append(f"{path}, whose name an archive may not have")
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
