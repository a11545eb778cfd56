"""The Age backend: native identities in local files, offline; reads the files again when they change.

``private_key`` is an age identity file and may hold several identities; ``public_key`` names the recipient
in use. A key version is the first 8 hex digits of the SHA-256 of the recipient string. Rotation appends an
identity and replaces the recipient; running processes pick that up within a second.
"""

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, parse_qs, unquote

import structlog

from kms_core.age import mlkem768x25519
from kms_core.age.header import FILE_KEY_BYTES, Stanza
from kms_core.age.recipients import Identity, Recipient, parse_identity, parse_recipient, version_of
from kms_core.age.x25519 import NoMatch
from kms_core.backends import Health, KeyVersion
from kms_core.backends.age_rotation import append_identity
from kms_core.envelope import binding
from kms_core.envelope.binding import KeyRef
from kms_core.secure_files import open_to_others
from kms_core.settings.model import Settings
from kms_protocol import small_files
from kms_protocol.errors import BackendUnavailable, ConfigurationError

RECHECK_S: Final = 0.5
_CREATED: Final = "# created: "
_MAKE_KEYS: Final = "make a pair with `kms keygen -o {private}` and `kms keygen -y {private} > {public}`"
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class KeyFiles:
    """Where a pair lives, and whether open permissions are an error (prod) or a warning (dev).

    Without a public file the last identity of the private one is in use.
    """

    private: Path
    public: Path | None = None
    strict: bool = False

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.private, self.public) if self.public else (self.private,)


@dataclass(frozen=True, slots=True)
class _KeyFiles:
    """The content of the two files at one moment."""

    identities: dict[str, Identity] = field(repr=False)
    origin_keys: dict[str, bytes] = field(repr=False)
    versions: tuple[KeyVersion, ...]
    current: str
    stamp: tuple[tuple[int, ...], ...]


class AgeBackend:
    """One age key: the identities of one file, of which one is in use for wrapping."""

    name = "age"
    blocks = False

    def __init__(self, files: KeyFiles, *, data_keys: bool = False, recheck_s: float = RECHECK_S) -> None:
        """Read both files; ConfigurationError, saying what to do, if that cannot be done.

        ``recheck_s``: how long the files are taken to be unchanged after a look at them.
        """
        self.data_keys = data_keys
        self._files = files
        self._recheck_s = recheck_s
        self._keys = _load(files)
        self._checked = time.monotonic()
        self._trouble = ""

    def wrap(self, file_key: bytes, key: KeyRef, aad: bytes) -> Stanza:
        """A native stanza. The AAD is bound by the origin stanza instead (see ``origin_key``)."""
        del aad
        return self._identity(key).recipient.wrap(file_key)

    def unwrap(self, stanza: Stanza, key: KeyRef, aad: bytes) -> bytes:
        """The file key, by the identity of this key version alone; NoMatch, DecryptFailed as the types do."""
        del aad
        return self._identity(key).unwrap(stanza)

    def origin_key(self, key: KeyRef) -> bytes:
        """The MAC key, derived from the identity, that proves who sealed a file."""
        keys = self._fresh()
        if key.version not in keys.origin_keys:
            raise NoMatch
        return keys.origin_keys[key.version]

    def current_version(self) -> str:
        return self._fresh().current

    def versions(self) -> Sequence[KeyVersion]:
        return self._fresh().versions

    def health_check(self) -> Health:
        """Wrap and unwrap with the current version; unhealthy while changed key files cannot be read."""
        now, keys = datetime.now(UTC), self._fresh()
        identity, probe = keys.identities[keys.current], os.urandom(FILE_KEY_BYTES)
        healthy = identity.unwrap(identity.recipient.wrap(probe)) == probe
        return Health(healthy=healthy and not self._trouble, checked_at=now, detail=self._trouble)

    def rotate(self) -> KeyVersion:
        """A new identity of the same type, in use at once here and within a second in other processes."""
        keys = self._fresh()
        post_quantum = isinstance(keys.identities[keys.current], mlkem768x25519.HybridIdentity)
        append_identity(self._files.private, self._files.public, post_quantum=post_quantum)
        self._checked = -math.inf
        made = self._fresh().versions[-1]
        if self._trouble:
            raise BackendUnavailable(f"The age key was rotated, but cannot be read: {self._trouble}")
        return made

    def for_job(self) -> "AgeBackend":
        """Itself: a wrap costs no call."""
        return self

    def secrets(self) -> tuple[bytes, ...]:
        """A 32-byte MAC key of each version, the current one last: the spool derives its record keys here."""
        keys = self._fresh()
        return tuple(keys.origin_keys[version.version] for version in keys.versions)

    def _identity(self, key: KeyRef) -> Identity:
        identity = self._fresh().identities.get(key.version)
        if identity is None:
            raise NoMatch
        return identity

    def _fresh(self) -> _KeyFiles:
        """The keys, read again if the files changed. Bad new files leave the old keys in use, in the open."""
        now = time.monotonic()
        if now - self._checked < self._recheck_s:
            return self._keys
        self._checked = now
        try:
            if self._trouble or _stamp(self._files) != self._keys.stamp:
                self._keys = _load(self._files)
                self._trouble = ""
                _log.info("key.reloaded", backend=self.name, key_version=self._keys.current)
        except (ConfigurationError, OSError) as exc:
            self._trouble = str(exc)
            _log.warning("key.reload_failed", backend=self.name, reason=self._trouble)
        return self._keys


def _stamp(files: KeyFiles) -> tuple[tuple[int, ...], ...]:
    found = (path.stat() for path in files.paths)
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in found)


def _load(files: KeyFiles) -> _KeyFiles:
    stamp, private, public = _read(files)
    _check_mode(files)
    identities: dict[str, Identity] = {}
    versions: dict[str, KeyVersion] = {}  # an identity that stands twice is one version
    current = ""
    for identity, created in _identities(private, files.private):
        current = version_of(identity.recipient)
        identities[current] = identity
        versions[current] = KeyVersion(current, created)
    if files.public:
        current = version_of(_recipient(public, files.public))
        if current not in identities:
            raise ConfigurationError(
                f"The recipient in {files.public} has no identity in {files.private}: "
                f"write it anew with `kms keygen -y {files.private} > {files.public}`"
            )
    in_order = sorted(versions.values(), key=lambda version: version.version == current)
    origin_keys = {version: binding.origin_key(identity.secret) for version, identity in identities.items()}
    return _KeyFiles(identities, origin_keys, tuple(in_order), current, stamp)


def _read(files: KeyFiles) -> tuple[tuple[tuple[int, ...], ...], str, str]:
    """Stamp and texts. The stamp comes first: a change in between is read again, never missed."""
    try:
        stamp = _stamp(files)
        texts = [small_files.text(path) for path in files.paths]
    except OSError as exc:
        hint = _MAKE_KEYS.format(private=files.private, public=files.public or "public_key.txt")
        raise ConfigurationError(
            f"Cannot read the age key file {exc.filename} ({exc.strerror}): {hint}"
        ) from exc
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"The age key files {files.private}, {files.public} are not text") from exc
    return stamp, texts[0], texts[-1]


def _check_mode(files: KeyFiles) -> None:
    mode = open_to_others(files.private)
    if not mode:
        return
    advice = f"{files.private} can be read by others (mode {mode:04o}): run `chmod 600 {files.private}`"
    if files.strict:
        raise ConfigurationError(advice)
    _log.warning("key.file_open_to_others", path=str(files.private), mode=f"{mode:04o}", advice=advice)


def _identities(text: str, path: Path) -> Iterator[tuple[Identity, datetime | None]]:
    created: datetime | None = None
    count = 0
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if line.startswith(_CREATED):
            created = _timestamp(line.removeprefix(_CREATED))
        if not line or line.startswith("#"):
            continue
        try:
            yield parse_identity(line), created
        except ValueError as exc:
            raise ConfigurationError(f"Line {number} of {path} is not an age identity ({exc})") from exc
        created = None
        count += 1
    if not count:
        raise ConfigurationError(f"{path} holds no age identity: make one with `kms keygen -o {path}`")


def _recipient(text: str, path: Path) -> Recipient:
    lines = [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]
    if len(lines) != 1:
        raise ConfigurationError(f"{path} must hold one recipient (age1…), it holds {len(lines)}")
    try:
        return parse_recipient(lines[0])
    except ValueError as exc:
        raise ConfigurationError(f"{path} does not hold an age recipient ({exc})") from exc


def _timestamp(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def open_key(uri: SplitResult | None, settings: Settings) -> AgeBackend:
    """``age:///path/to/private_key.txt?public=/path/to/public_key.txt``; None means ``[kms.age]``."""
    age, strict = settings.kms.age, settings.is_prod
    if uri is None:
        files = KeyFiles(age.private_key_path, age.public_key_path, strict)
        return AgeBackend(files, data_keys=age.data_keys)
    options = parse_qs(uri.query, keep_blank_values=True)
    public_paths = options.pop("public", [])
    stray = uri.netloc or uri.fragment or options or len(public_paths) > 1 or "" in public_paths
    if stray or not uri.path.startswith("/"):
        raise ConfigurationError(
            "An age key is age:///path/to/private_key.txt?public=/path/to/public_key.txt"
        )
    public = Path(public_paths[0]) if public_paths else None
    return AgeBackend(KeyFiles(Path(unquote(uri.path)), public, strict), data_keys=age.data_keys)
