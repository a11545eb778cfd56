"""The vault-kv backend: our wrapping key as a secret of a KV engine, for servers without transit.

Weaker than transit: every reader of the secret has the key, this process included, and the server's audit log
shows reads of the secret, not unwraps. The secret is one document, ``{"1": "<base64 of 32 bytes>"}``, with an
entry for each version. The highest version wraps; removing an entry revokes its wraps. Keys stay in memory
for ``cache_s`` (60 seconds by default): a removal takes effect after that time, and calls succeed that long
while the server is down.

An operator or ``rotate`` makes the first version; a read never does, since a mistyped path would get a key
unnoticed. On KV version 2 each write is a check-and-set, so that concurrent writers make one key. KV version
1, the only one of RustyVault, has no such check, and the service never writes there.

A wrap is a salt of 32 bytes, and ChaCha20-Poly1305 with the AAD under HKDF-SHA256(wrapping key, salt): no
nonce can repeat for any number of files. 64 bytes for a file key.
"""

import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Final, Literal
from urllib.parse import SplitResult

import msgspec

from kms_core.backends import KeyMissing, KeyVersion
from kms_core.backends.remote import RemoteBackend
from kms_core.backends.vault.client import EngineAnswer, VaultClient, connect, located, path_of, said
from kms_core.backends.vault.settings import VaultKvSection
from kms_core.envelope import binding
from kms_core.http_client import Busy, PeerAnswer, Unreachable
from kms_protocol.errors import BackendUnavailable, ConfigurationError, DecryptFailed

KEY_BYTES: Final = 32
_INFO: Final = b"kms-service/vault-kv/1"
_VERSION: Final = re.compile(r"[1-9][0-9]{0,8}")


class _Key(msgspec.Struct, omit_defaults=True):
    """One version as ``rotate`` writes it; an operator may write only the base64."""

    key: bytes
    created_at: datetime | None = None


class _Metadata(msgspec.Struct):
    version: int


class _Secret(msgspec.Struct):
    """``GET <mount>/data/<path>`` of KV version 2; on version 1 that is an ordinary path."""

    data: msgspec.Raw = msgspec.Raw(b"null")
    metadata: _Metadata | None = None


@dataclass(frozen=True, slots=True)
class _Document:
    """The secret at one time. ``cas`` is the version that the next write must name."""

    keys: Mapping[int, _Key] = field(repr=False)
    cas: int
    read_at: float


class KvCipher:
    """One secret of one mount."""

    name = "vault-kv"

    def __init__(
        self,
        vault: VaultClient,
        mount: str,
        path: str,
        *,
        kv_version: Literal[1, 2] = 2,
        cache_s: float = 60.0,
    ) -> None:
        """``mount`` and ``path`` as the operator writes them. Raises ConfigurationError; makes no call."""
        self._vault, self.token, self.server = vault, vault.token, vault.server
        self._mount = path_of(mount, "The mount of a vault-kv key")
        self._path = path_of(path, "The path of a vault-kv key")
        self._checks = kv_version == 2  # noqa: PLR2004 -- the version that can check and set
        self._cache_s = cache_s
        self._lock = threading.Lock()
        self._document: _Document | None = None

    def encrypt(self, secret: bytes, version: str, aad: bytes) -> bytes:
        """Salt and sealed secret: 48 bytes more than the secret."""
        key = self._key(version)
        if key is None:
            raise self._error(f"has no version {version}")
        return binding.seal_file_key(key, secret, aad, _INFO)

    def decrypt(self, wrapped: bytes, version: str, aad: bytes) -> bytes:
        """Decrypt what ``encrypt`` returned."""
        key = self._key(version)
        if key is None:
            raise DecryptFailed
        return binding.open_sealed(key, wrapped, aad, _INFO)

    def versions(self) -> Sequence[KeyVersion]:
        """All versions of the document, read now."""
        return _versions(self._read(time.monotonic()))

    def rotate(self) -> KeyVersion:
        """Add a version, or make the first. Returns the version of a concurrent writer if there is one.

        Each of its three calls has its own timeout, so that an unclear outcome can still be checked.
        """
        if not self._checks:
            raise self._error("is on a KV version 1 mount, where a write could undo another: add one by hand")
        before = self._read(time.monotonic(), may_be_absent=True)
        number = max(before.keys, default=0) + 1
        added = {number: _Key(os.urandom(KEY_BYTES), datetime.now(UTC).replace(microsecond=0))}
        try:
            self._write({**before.keys, **added}, before.cas)
        except (Unreachable, Busy):
            if number not in self._read(time.monotonic(), may_be_absent=True).keys:
                raise
        after = self._read(time.monotonic())
        if number not in after.keys:
            raise self._error("was changed by another writer; try again")
        return _versions(after)[-1]

    # -- the document -------------------------------------------------------------------------------

    def _key(self, version: str) -> bytes | None:
        """The key of a version.

        Reads the document again for an unknown one, which another process may have made.
        """
        if not _VERSION.fullmatch(version):
            return None
        number, now = int(version), time.monotonic()
        document = self._read(now - self._cache_s)
        if number not in document.keys:
            document = self._read(now)
        found = document.keys.get(number)
        return found.key if found else None

    def _read(self, since: float, *, may_be_absent: bool = False) -> _Document:
        """The document in memory if it was read after ``since``, else the one on the server.

        One thread asks; threads that wait for it share its result.
        """
        with self._vault.peer.holding(self._lock):
            document = self._document
            if document is None or document.read_at < since:
                document = self._ask()
            if not document.keys and not may_be_absent:
                raise self._error(f"is not there: make it with `{self._make}`", KeyMissing)
            return document

    def _ask(self) -> _Document:
        """Read the document; needs the lock. Keys stay while the server is down, not if it refuses."""
        try:
            document = self._fetch(time.monotonic())
        except BackendUnavailable as exc:
            if not isinstance(exc, Unreachable | Busy):
                self._document = None
            raise
        self._document = document if document.keys else None
        return document

    def _fetch(self, now: float) -> _Document:
        answer = self._vault.call("GET", self._url)
        if answer.status == HTTPStatus.NOT_FOUND:
            return self._absent(answer, now)
        if not answer.ok:
            raise answer.unexpected_error()
        if not self._checks:
            return _Document(self._keys(answer.read(EngineAnswer[msgspec.Raw]).data), 0, now)
        secret = answer.read(EngineAnswer[_Secret]).data
        if secret.metadata is None:
            raise self._error(f"is on a mount of KV version 1: set {self._vault.section}.kv_version = 1")
        return _Document(self._keys(secret.data), secret.metadata.version, now)

    def _absent(self, answer: PeerAnswer, now: float) -> _Document:
        if not self._checks and b"versioned K/V" in answer.body:
            raise self._error(f"is on a mount of KV version 2: set {self._vault.section}.kv_version = 2")
        if b'"deletion_time"' in answer.body:
            raise self._error("was deleted: bring it back with `bao kv undelete`, or write it again")
        kind = "kv-v2" if self._checks else "kv"
        enable = f"bao secrets enable -path={self._mount} {kind}"
        error = self._vault.engine_error(answer, self._mount, enable)
        if error:
            raise error
        return _Document({}, 0, now)

    def _keys(self, raw: msgspec.Raw) -> Mapping[int, _Key]:
        try:
            found = msgspec.json.decode(raw, type=dict[str, _Key | bytes])
        except (msgspec.DecodeError, RecursionError):
            found = {}
        keys = {name: _Key(key) if isinstance(key, bytes) else key for name, key in found.items()}
        ours = all(_VERSION.fullmatch(name) and len(key.key) == KEY_BYTES for name, key in keys.items())
        if not keys or not ours:
            raise self._error(f"holds something else than wrapping keys of {KEY_BYTES} bytes in base64")
        return {int(name): key for name, key in keys.items()}

    def _write(self, keys: Mapping[int, _Key], cas: int) -> None:
        """Write the document.

        A failed check-and-set raises nothing: the next read shows the other writer's version.
        """
        data = {str(number): keys[number] for number in sorted(keys)}
        answer = self._vault.call("POST", self._url, {"options": {"cas": cas}, "data": data})
        if answer.ok or (answer.status == HTTPStatus.BAD_REQUEST and "check-and-set" in said(answer)):
            return
        raise answer.unexpected_error()

    @property
    def _url(self) -> str:
        return f"{self._mount}/data/{self._path}" if self._checks else f"{self._mount}/{self._path}"

    @property
    def _make(self) -> str:
        command = f"bao kv put -cas=0 -mount={self._mount} {self._path}"
        if not self._checks:
            command = f"bao write {self._mount}/{self._path}"
        return f'{command} 1="$(openssl rand -base64 {KEY_BYTES})"'

    def _error(self, text: str, kind: type[BackendUnavailable] = BackendUnavailable) -> BackendUnavailable:
        return kind(f"The wrapping key {self._mount}/{self._path} of {self._vault.server.where} {text}")


def _versions(document: _Document) -> list[KeyVersion]:
    return [KeyVersion(str(number), document.keys[number].created_at) for number in sorted(document.keys)]


def open_key(uri: SplitResult | None, section: VaultKvSection, *, strict: bool) -> RemoteBackend:
    """``vault-kv:<path>`` or ``vault-kv:<path>?mount=<mount>``; None means ``path`` of ``[kms.vault_kv]``."""
    usage = "A vault-kv key is vault-kv:<path>, or vault-kv:<path>?mount=<mount>"
    mount, path = located(uri, section.mount, section.path, usage)
    if path is None:
        raise ConfigurationError("kms.vault_kv.path is missing: name the secret that holds the wrapping key")
    vault = connect(section, "kms.vault_kv", strict=strict)
    cipher = KvCipher(vault, mount, path, kv_version=section.kv_version, cache_s=section.cache_s)
    return RemoteBackend(cipher)
