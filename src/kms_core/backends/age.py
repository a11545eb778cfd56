"""The Age backend: native identities in local files or a shared document, read again when they change.

The private file is an age identity file with one or more identities; the public file names the recipient in
use. A key version is the first 8 hex digits of the SHA-256 of the recipient string.

Rotation appends an identity to the private file, then replaces the recipient, each durably before the next
step: every reader, also after a crash in between, finds a recipient with its identity. Running processes use
the new identity within a second.

The private file may be sealed (``envelope.sealed_files``). Its content is then as above. While its root is
away, each call raises BackendUnavailable; a rotation waits until the other processes opened the new identity.
The same holds for a document, which has the content of both files.
"""

import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, parse_qs, unquote

import structlog

from kms_core.age import mlkem768x25519, x25519
from kms_core.age.header import FILE_KEY_BYTES, Stanza
from kms_core.age.recipients import (
    Identity,
    Recipient,
    identities_of,
    identity_file,
    key_lines,
    parse_identity,
    parse_recipient,
)
from kms_core.age.x25519 import NoMatch
from kms_core.backends import Health, KeyVersion, NotRotated
from kms_core.backends.age_settings import AgeSection, document_of
from kms_core.backends.key_files import KeyFiles
from kms_core.envelope import binding
from kms_core.envelope.binding import DEFAULT_KEY_ID, KeyRef, Wrap, version_of
from kms_core.envelope.sealed_files import NotOpenedYet, SealedFiles
from kms_core.http_client import Unreachable
from kms_core.key_source import KeySource
from kms_core.secure_files import in_shell
from kms_protocol.errors import BackendUnavailable, ConfigurationError, RotationRefused

RECHECK_S: Final = 0.5
SOUGHT_EVERY_S: Final = 1.0
"""An unknown version has the files read again at most so often (s): callers may name any number of them."""
OPEN_S: Final = 60.0
"""The longest wait of a rotation for the parent process to open the new identity (s)."""
_POLL_S: Final = 0.05
_VERSION: Final = re.compile("[0-9a-f]{8}")
_SEVERAL_HOSTS: Final = (
    "The hosts {} have files of their own for this key, and would not know its new version: append a new "
    "identity to the private file of all hosts, then replace the public file on all (docs/hosts.md, Rotation)"
)
_UNKNOWN: Final = "Here is no identity of the version {}: copy the private file of a host that has it ({})"
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _KeyFiles:
    """The keys of the source, as last read."""

    identities: dict[str, Identity] = field(repr=False)
    origin_keys: dict[str, bytes] = field(repr=False)
    versions: tuple[KeyVersion, ...]
    """The one that wraps is the last."""
    stamp: object


class AgeBackend:
    """One age key: the identities of one source, one of which wraps."""

    name = "age"
    server = None

    def __init__(
        self,
        source: KeySource,
        *,
        data_keys: bool = False,
        native: bool = True,
        recheck_s: float = RECHECK_S,
    ) -> None:
        """Read the source. Raises ConfigurationError, which names the remedy.

        ``native``: new files get a native stanza, which stock age opens, rather than a wrap under a key
        derived from the identity, which spares two X25519 multiplications. Both kinds are unwrapped.
        ``recheck_s``: seconds between two checks whether the source has changed.
        """
        self.data_keys = data_keys
        self.native = native
        self.elsewhere: Callable[..., Sequence[str]] = lambda **_: ()
        """The hosts that have files of their own for this key; with ``asks=True`` as Redis tells now."""
        self.source = source
        self._recheck_s = recheck_s
        self._sought = -math.inf
        self._keys: _KeyFiles | None = None
        self._checked = time.monotonic()
        self._error = ""
        try:
            self._keys = _load(source)
        except BackendUnavailable as exc:
            self._error = exc.detail

    def wrap(self, file_key: bytes, key: KeyRef, aad: bytes) -> Stanza:
        """A native stanza, where the origin stanza binds the AAD; with ``native`` off a wrap stanza."""
        identity = self._identity(key)
        if self.native:
            return identity.recipient.wrap(file_key)
        return binding.age_wrap(identity.secret, file_key, key, aad)

    def unwrap(self, stanza: Stanza, key: KeyRef, aad: bytes) -> bytes:
        """The file key, by the identity of this key version only. Raises NoMatch, DecryptFailed."""
        identity = self._identity(key)
        if stanza.type == binding.WRAP:
            return binding.open_age_wrap(identity.secret, stanza, key, aad)
        return identity.unwrap(stanza)

    def origin_key(self, key: KeyRef) -> bytes:
        """The MAC key, derived from the identity, that proves the origin of a file."""
        keys = self._fresh()
        if key.version not in keys.origin_keys:
            raise NoMatch
        return keys.origin_keys[key.version]

    def versions(self) -> Sequence[KeyVersion]:
        return self._fresh().versions

    def was_silent(self) -> bool:
        """False: no call waits for a network."""
        return False

    def health_check(self) -> Health:
        """Wrap and unwrap with the current version; unhealthy while changed key files cannot be read."""
        try:
            keys = self._fresh()
        except BackendUnavailable as exc:
            return Health(healthy=False, detail=exc.detail)
        identity, probe = keys.identities[keys.versions[-1].version], os.urandom(FILE_KEY_BYTES)
        healthy = identity.unwrap(identity.recipient.wrap(probe)) == probe
        return Health(healthy=healthy and not self._error, detail=self._error)

    def rotate(self) -> KeyVersion:
        """A new identity of the same type, in use at once here and within a second in other processes.

        The identity of a sealed file is in use once the other processes have opened it, some seconds later.
        Raises RotationRefused where hosts have files of their own, TooManyVersions, NotRotated where the root
        of a sealed file does not answer, BackendUnavailable if nothing was changed or the new identity cannot
        be used.
        """
        if others := self.elsewhere(asks=True):
            raise RotationRefused(_SEVERAL_HOSTS.format(", ".join(others)))
        keys = self._fresh()
        post_quantum = isinstance(keys.identities[keys.versions[-1].version], mlkem768x25519.HybridIdentity)
        kind = mlkem768x25519.HybridIdentity if post_quantum else x25519.X25519Identity
        identity = kind.generate()
        try:
            if self.source.add(identity_file(identity)):
                self._wait_for(version_of(identity.recipient))
        except Unreachable as exc:  # the root, without which no version is put into use
            raise NotRotated(exc.detail) from exc
        self.source.use(str(identity.recipient))
        self._checked = -math.inf
        made = self._fresh().versions[-1]
        if self._error:
            raise BackendUnavailable(f"The age key was rotated, but cannot be read: {self._error}")
        return made

    def _wait_for(self, version: str) -> None:
        """Wait until this process, and then the others, opened a version. Raises BackendUnavailable."""
        until = time.monotonic() + OPEN_S
        while version not in self._fresh().identities:
            if time.monotonic() > until:
                raise BackendUnavailable(
                    f"The new identity is in {self.source.private}, but was not opened; the old one stays in "
                    f"use. Rotate again when the root answers. {self._error}".strip()
                )
            time.sleep(_POLL_S)
            self._checked = -math.inf
        time.sleep(self.source.publish_s)

    def is_ready(self, tenant: str, key_id: str, wrap: Wrap | None) -> bool:
        """True: no call waits for a network."""
        del tenant, key_id, wrap
        return True

    def for_job(self) -> "AgeBackend":
        """The backend itself, since a wrap needs no call."""
        return self

    def secrets(self) -> tuple[bytes, ...]:
        """A 32-byte MAC key of each version, the current one last. The spool derives keys from them."""
        keys = self._fresh()
        return tuple(keys.origin_keys[version.version] for version in keys.versions)

    def _identity(self, key: KeyRef) -> Identity:
        return self._fresh().identities.get(key.version) or self._seek(key.version)

    def _seek(self, version: str) -> Identity:
        """Read the source again for a version that it did not have.

        Raises NoMatch; Unreachable where another host may have it, and it did not arrive here yet.
        """
        now = time.monotonic()
        if now - self._sought >= SOUGHT_EVERY_S:
            self._sought = now
            self._read_again(forced=True)
        keys = self._fresh()
        found = keys.identities.get(version)
        if found is not None:
            return found
        if not _VERSION.fullmatch(version):
            raise NoMatch
        if reason := self.source.behind(keys.stamp):
            raise Unreachable(reason)
        if others := self.elsewhere(asks=False):
            raise Unreachable(_UNKNOWN.format(version, ", ".join(others)))
        raise NoMatch

    def _fresh(self) -> _KeyFiles:
        """The keys, read again if the files changed. Raises BackendUnavailable if they were never readable.

        Unusable files leave the old keys in use; health reports it.
        """
        now = time.monotonic()
        if now - self._checked >= self._recheck_s:
            self._checked = now
            self._read_again()
        if self._keys is None:
            raise BackendUnavailable(self._error)
        return self._keys

    def _read_again(self, *, forced: bool = False) -> None:
        try:
            if forced or self._error or self._keys is None or self.source.stamp() != self._keys.stamp:
                self._keys = _load(self.source)
                self._error = ""
                _log.info("key.reloaded", backend=self.name, key_version=self._keys.versions[-1].version)
        except NotOpenedYet as exc:  # the next check finds it open, and the old keys work until then
            self._error = self._error if self._keys else exc.detail
        except (ConfigurationError, BackendUnavailable, OSError) as exc:
            self._error, before = str(exc), self._error
            if self._error != before:
                _log.warning("key.reload_failed", backend=self.name, reason=self._error)


def _load(source: KeySource) -> _KeyFiles:
    stamp, content, recipient = source.read()
    remedy = f"make one with `kms keygen -o {in_shell(source.private)}`"
    identities: dict[str, Identity] = {}
    versions: dict[str, KeyVersion] = {}  # a repeated identity is one version
    current = ""
    for identity, created in identities_of(content, source.private, parse_identity, remedy=remedy):
        current = version_of(identity.recipient)
        identities[current] = identity
        versions[current] = KeyVersion(current, created)
    if recipient is not None:
        current = version_of(_recipient(recipient, source.public))
        if current not in identities:
            raise ConfigurationError(
                f"The recipient in {source.public} has no identity in {source.private}: "
                f"write it again with `kms keygen -y {in_shell(source.private)} > {in_shell(source.public)}`"
            )
    in_order = sorted(versions.values(), key=lambda version: version.version == current)
    origin_keys = {version: binding.origin_key(identity.secret) for version, identity in identities.items()}
    return _KeyFiles(identities, origin_keys, tuple(in_order), stamp)


def _recipient(content: bytes, path: Path | str | None) -> Recipient:
    try:
        lines = key_lines(content.decode("utf-8"))
        if len(lines) != 1:
            raise ConfigurationError(f"{path} must hold one recipient (age1…), it holds {len(lines)}")
        return parse_recipient(lines[0][1])
    except ValueError as exc:
        raise ConfigurationError(f"{path} does not hold an age recipient ({exc})") from exc


def open_key(
    uri: SplitResult | None,
    section: AgeSection,
    *,
    strict: bool,
    name: str = DEFAULT_KEY_ID,
    sealed: SealedFiles | None = None,
) -> AgeBackend:
    """``age:///path/to/private_key.txt?public=/path/to/public_key.txt``; None means ``[kms.age]``.

    ``age:s3://bucket/key`` is a signed document. With ``native=false`` new files have no native stanza.
    ``name`` and ``sealed`` are for sealed keys (see ``KeyFiles``).
    """
    private, public, native = parts_of(uri, section)
    source: KeySource
    if isinstance(private, Path):
        source = KeyFiles(private, public, strict, name, sealed, section.sealed_only)
    elif sealed is None:
        raise ConfigurationError(f"{private} holds a sealed key: a key that seals others may not be")
    else:
        source = sealed.document(name, private)
    return AgeBackend(source, data_keys=section.data_keys, native=native)


def parts_of(uri: SplitResult | None, section: AgeSection) -> tuple[Path | str, Path | None, bool]:
    """The private file or the URL of the document, the public file if any, and ``native`` of a key.

    A ``uri`` of None means the files of ``[kms.age]``. Raises ConfigurationError.
    """
    if uri is None:
        return section.private_key_path, section.public_key_path, True
    options, document = parse_qs(uri.query.replace("+", "%2B"), keep_blank_values=True), document_of(uri)
    public_paths, native = options.pop("public", []), options.pop("native", ["true"])
    stray = uri.netloc or uri.fragment or options or len(public_paths) > 1 or "" in public_paths
    if native not in (["true"], ["false"]):
        raise ConfigurationError("An age key: native is true, or false for files that stock age cannot open")
    if stray or not (uri.path.startswith("/") or (document and not public_paths)):
        raise ConfigurationError(
            "An age key is age:///path/to/private_key.txt?public=/path/to/public_key.txt, or "
            "age:s3://bucket/key for a document"
        )
    public = Path(public_paths[0]) if public_paths else None
    return document or Path(unquote(uri.path)), public, native == ["true"]
