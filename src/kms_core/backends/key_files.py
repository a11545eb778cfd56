"""The identities of an Age key in two files of this host: made, read and rotated."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from kms_core.age.header import is_age_file
from kms_core.age.recipients import identity_file
from kms_core.age.x25519 import X25519Identity
from kms_core.envelope.sealed_files import SealedFiles
from kms_core.key_source import StoredKeys
from kms_core.reload import stamp_of
from kms_core.secure_files import check_secret, create, in_shell, lock, make_folders, replace_kept
from kms_protocol import small_files
from kms_protocol.errors import BackendUnavailable, ConfigurationError, TooManyVersions

PUBLISH_S: Final = 2.0
"""Twice the time in which the processes of this host read changed files (s)."""
MOST_BYTES: Final = small_files.MAX_BYTES // 2
"""Bytes of identities that a rotation may write: about 2,800 versions, or 240 of hybrid keys.

The other half is for the sealing and for what operators add by hand: what was written is always read.
"""
_MAKE_KEYS: Final = "make a pair with `kms keygen -o {0}` and `kms keygen -y {0} > {1}`"
_MAKE_KEY: Final = "make it with `kms keygen -o {0}` as the user of the service; all hosts have the same file"
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class KeyFiles:
    """Paths of a key pair, and whether open permissions are an error (prod) or a warning (dev).

    Without a public file the last identity of the private one is in use. A sealed private file is opened by
    ``sealed`` as ``name``; without ``sealed`` it is refused, with ``sealed_only`` a plain one is.
    """

    private: Path
    public: Path | None = None
    strict: bool = False
    name: str = ""
    sealed: SealedFiles | None = None
    sealed_only: bool = False

    publish_s = PUBLISH_S
    is_late = False

    @property
    def _paths(self) -> tuple[Path, ...]:
        return (self.private, self.public) if self.public else (self.private,)

    def stamp(self) -> object:
        return stamp_of(self._paths)

    def read(self) -> StoredKeys:
        """Read both files. Their stamp is taken first, so that a change in between is read again."""
        try:
            stamp = stamp_of(self._paths)
            contents = [small_files.read(path) for path in self._paths]
        except OSError as exc:
            make = _MAKE_KEYS if self.public else _MAKE_KEY
            hint = make.format(in_shell(self.private), in_shell(self.public))
            if not isinstance(exc, FileNotFoundError):
                hint = "check the path and its mode, and run this as the user of the service"
            raise ConfigurationError(
                f"Cannot read the age key file {exc.filename} ({exc.strerror}): {hint}"
            ) from exc
        check_secret(self.private, _log.warning, "key.file_open_to_others", strict=self.strict)
        return StoredKeys(stamp, self._identities_in(contents[0]), contents[1] if self.public else None)

    def _identities_in(self, private: bytes) -> bytes:
        """The content of a private file, opened if sealed. Raises ConfigurationError, BackendUnavailable."""
        if not is_age_file(private):
            if self.sealed_only:
                raise ConfigurationError(
                    f"{self.private} is a plain key file, and sealed_only under [kms.age] allows none: seal "
                    f"it with `kms keygen --sealed-by KEY --for {self.name} --from {in_shell(self.private)}`"
                )
            return private
        if self.sealed is None:
            raise ConfigurationError(
                f"{self.private} is sealed: a key that seals others may not be, and this program opens none"
            )
        try:
            return self.sealed.open(self.name, private)
        except ConfigurationError as exc:
            raise ConfigurationError(f"The key file {self.private} cannot be opened: {exc.detail}") from exc

    def add(self, block: bytes) -> bool:
        """Append an identity to the private file by a durable rename, which keeps its owner and mode.

        Returns True for a sealed file, which processes must open before ``use``. Raises BackendUnavailable if
        it cannot be opened, sealed or written, TooManyVersions as ``appended``.
        """
        with _changing(self.private):
            stored = small_files.read(self.private)
            after = appended(self._identities_in(stored), block)
            if not is_age_file(stored):
                replace_kept(self.private, after)
                return False
            if self.sealed is None or self.public is None:
                raise BackendUnavailable(
                    "Cannot rotate the sealed age key: without a public file it would be in use before the "
                    "other processes opened it. Name one: age:///PRIVATE?public=/PUBLIC"
                )
            replace_kept(self.private, self.sealed.seal_again(self.name, after, stored))
            return True

    def use(self, recipient: str) -> None:
        if self.public:
            with _changing(self.private):
                replace_kept(self.public, f"{recipient}\n".encode())

    def behind(self, stamp: object) -> str:
        del stamp
        return ""


def make_identity(path: Path) -> bool:
    """Write a new X25519 identity to ``path`` (0600), as age-keygen. Return False if it exists.

    Of two processes that do so at once, one succeeds. Raises ConfigurationError.
    """
    if path.exists():
        return False
    try:
        make_folders(path.parent)
        return create(path, identity_file(X25519Identity.generate()))
    except OSError as exc:
        raise ConfigurationError(f"Cannot write the key {path}: {exc.strerror}") from exc


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    """Exclude other processes. Raises BackendUnavailable if the files cannot be opened or written."""
    try:
        with lock(path.parent):
            yield
    except OSError as exc:
        raise BackendUnavailable(
            f"Cannot rotate the age key: {exc.filename or path}: {exc.strerror}. "
            "Let the service write the key's directory, or add an identity by hand with `kms keygen`"
        ) from exc
    except ConfigurationError as exc:  # which ends a start, and would show the caller a path of ours
        raise BackendUnavailable(f"Cannot rotate the age key: {exc.detail}") from exc


def appended(content: bytes, block: bytes) -> bytes:
    """Lines after others, which may lack their last line end. Raises TooManyVersions above ``MOST_BYTES``."""
    after = content + (b"" if content.endswith(b"\n") else b"\n") + block
    if len(after) > MOST_BYTES:
        raise TooManyVersions
    return after
