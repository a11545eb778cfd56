"""A wrapping key of ours kept as a secret of a KV engine: for RustyVault, and a Vault without transit.

Weaker than transit: whoever reads the secret holds the key, this process holds it too, and the server's
audit shows reads of the secret, not unwraps. The secret is one document, ``{"1": "<base64 of 32 bytes>"}``,
with an entry for each version; the highest wraps, and an entry that is removed revokes what it wrapped.
Keys stay in memory for ``cache_s`` (default a minute): so long does a removal take to be noticed, and so
long do calls go on without the server. When that time is over, a server that does not answer fails calls.

A first version is made by an operator, or by ``rotate``, never by the way: a path with a typing error would
quietly get a key. On KV version 2 each write checks that nobody else wrote (CAS), so a race makes one key.
KV version 1, all that RustyVault has, cannot check; there the service never writes.

A wrap is a salt of 32 bytes, and ChaCha20-Poly1305 with the AAD under HKDF-SHA256(wrapping key, salt): no
nonce can repeat, however many files one version wraps. 64 bytes for a file key.
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
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from kms_core.age.kdf import hkdf
from kms_core.backends import KeyMissing, KeyVersion
from kms_core.backends.remote import RemoteBackend
from kms_core.backends.vault.client import EngineAnswer, VaultClient, connect, located, path_of, said
from kms_core.http_client import Busy, Unreachable
from kms_core.http_client.peer import PeerAnswer
from kms_core.settings.model import Settings
from kms_protocol.errors import BackendUnavailable, ConfigurationError, DecryptFailed

KEY_BYTES: Final = 32
SALT_BYTES: Final = 32
_INFO: Final = b"kms-service/vault-kv/1"
_NONCE: Final = bytes(12)  # each derived key seals once
_VERSION: Final = re.compile(r"[1-9][0-9]{0,8}")


class _Key(msgspec.Struct, omit_defaults=True):
    """One version as ``rotate`` writes it; an operator may write the base64 alone."""

    key: bytes
    created_at: datetime | None = None


class _Metadata(msgspec.Struct):
    version: int


class _Secret(msgspec.Struct):
    """``GET <mount>/data/<path>`` of KV version 2; on version 1 that is a path like any other."""

    data: msgspec.Raw = msgspec.Raw(b"null")
    metadata: _Metadata | None = None


@dataclass(frozen=True, slots=True)
class _Document:
    """The secret at one moment. ``cas`` is the number that a write must name to follow it."""

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
        """``mount`` and ``path`` as the operator writes them. Raises ConfigurationError; calls nobody."""
        self._vault = vault
        self._mount = path_of(mount, "The mount of a vault-kv key")
        self._path = path_of(path, "The path of a vault-kv key")
        self._checks = kv_version == 2  # noqa: PLR2004 -- the version that can check and set
        self._cache_s = cache_s
        self._lock = threading.Lock()
        self._document: _Document | None = None

    def encrypt(self, secret: bytes, version: str, aad: bytes) -> bytes:
        """Salt and sealed secret, 48 bytes more than the secret."""
        key = self._key(version)
        if key is None:
            raise self._error(f"has no version {version}")
        salt = os.urandom(SALT_BYTES)
        return salt + _aead(key, salt).encrypt(_NONCE, secret, aad)

    def decrypt(self, wrapped: bytes, version: str, aad: bytes) -> bytes:
        """The secret again."""
        key = self._key(version)
        if key is None:
            raise DecryptFailed
        try:
            return _aead(key, wrapped[:SALT_BYTES]).decrypt(_NONCE, wrapped[SALT_BYTES:], aad)
        except InvalidTag as exc:
            raise DecryptFailed from exc

    def versions(self) -> Sequence[KeyVersion]:
        """All of the document, read at this moment."""
        return _versions(self._read(time.monotonic()))

    def rotate(self) -> KeyVersion:
        """Add a version, or make the first. Where somebody else did so meanwhile, theirs is the answer.

        Each of its three calls has a timeout of its own, so that an unclear outcome can still be looked at.
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
            raise self._error("was changed by somebody else meanwhile; try again")
        return _versions(after)[-1]

    # -- the document -------------------------------------------------------------------------------

    def _key(self, version: str) -> bytes | None:
        """The key of a version; one not known yet may have been made by another process just now."""
        if not _VERSION.fullmatch(version):
            return None
        number, now = int(version), time.monotonic()
        with self._vault.one_timeout():
            document = self._read(now - self._cache_s)
            if number not in document.keys:
                document = self._read(now)
        found = document.keys.get(number)
        return found.key if found else None

    def _read(self, since: float, *, may_be_absent: bool = False) -> _Document:
        """The document as it is in memory, if it was read since then, or as the server has it.

        One caller asks; those that wait for it take what came of that, and their time goes on meanwhile.
        """
        with self._vault.one_timeout(), self._lock:
            document = self._document
            if document is None or document.read_at < since:
                document = self._ask()
            if not document.keys and not may_be_absent:
                raise self._error(f"is not there: make it with `{self._make}`", KeyMissing)
            return document

    def _ask(self) -> _Document:
        """Under the lock. A server that is away leaves us the keys for their time; one that refuses, not."""
        try:
            document = self._fetch(time.monotonic())
        except (Unreachable, Busy):
            raise
        except BackendUnavailable:
            self._document = None
            raise
        self._document = document if document.keys else None
        return document

    def _fetch(self, now: float) -> _Document:
        answer = self._vault.call("GET", self._url)
        if answer.status == HTTPStatus.NOT_FOUND:
            return self._absent(answer, now)
        if not answer.ok:
            said(answer)
            raise answer.odd()
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
            raise self._error("was deleted: bring it back with `bao kv undelete`, or write it anew there")
        kind = "kv-v2" if self._checks else "kv"
        enable = f"bao secrets enable -path={self._mount} {kind}"
        error = self._vault.no_engine(answer, self._mount, enable)
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
        """A write that is refused because another came first is no error here: the reading after it tells."""
        data = {str(number): keys[number] for number in sorted(keys)}
        answer = self._vault.call("POST", self._url, {"options": {"cas": cas}, "data": data})
        if answer.ok or (answer.status == HTTPStatus.BAD_REQUEST and "check-and-set" in said(answer)):
            return
        said(answer)
        raise answer.odd()

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


def _aead(key: bytes, salt: bytes) -> ChaCha20Poly1305:
    return ChaCha20Poly1305(hkdf(key, salt=salt, info=_INFO))


def open_key(uri: SplitResult | None, settings: Settings) -> RemoteBackend:
    """``vault-kv:<path>`` or ``vault-kv:<path>?mount=<mount>``; None means ``path`` of ``[kms.vault_kv]``."""
    section = settings.kms.vault_kv
    mount, path = section.mount, section.path
    if uri is not None:
        usage = "A vault-kv key is vault-kv:<path>, or vault-kv:<path>?mount=<mount>"
        mount, path = located(uri, mount, usage)
    if path is None:
        raise ConfigurationError("kms.vault_kv.path is missing: name the secret that holds the wrapping key")
    vault = connect(section, "kms.vault_kv", strict=settings.is_prod)
    cipher = KvCipher(vault, mount, path, kv_version=section.kv_version, cache_s=section.cache_s)
    return RemoteBackend(cipher, data_keys=section.data_keys)
