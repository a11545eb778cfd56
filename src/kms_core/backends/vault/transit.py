"""The transit engine of OpenBao or Vault: the server wraps file keys, its key never leaves it.

What is stored of ``vault:v<version>:<base64>`` is the decoded base64 alone (nonce, ciphertext, tag; 44 bytes
for a file key under AES-GCM): the version stands in the stanza, and decryption puts the prefix before it
again. The AAD always goes as ``associated_data``. It never goes as ``context``, which transit ignores
without a word for keys that are not derived; keys that are derived, or of a type without AEAD, are refused.
"""

import base64
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Final, NoReturn
from urllib.parse import SplitResult

import msgspec
import structlog

from kms_core.backends import KeyMissing, KeyVersion
from kms_core.backends.remote import RemoteBackend
from kms_core.backends.vault.client import EngineAnswer, VaultClient, connect, located, path_of, said
from kms_core.http_client import Busy, Unreachable
from kms_core.http_client.peer import PeerAnswer
from kms_core.settings.model import Settings
from kms_protocol.errors import BackendUnavailable, ConfigurationError, DecryptFailed

TYPES: Final = frozenset({"aes128-gcm96", "aes256-gcm96", "chacha20-poly1305", "xchacha20-poly1305"})
_NAME: Final = re.compile(r"\w(?:[\w.-]*\w)?", re.ASCII)  # as the engine has it
_VERSION: Final = re.compile(r"[1-9][0-9]{0,8}")  # "0" would mean 1, "01" too
_LAST_SECOND: Final = 253_402_300_800  # the year 10000
_NO_UPSERT: Final = "none"
"""A key type that is none: encrypt would otherwise make a key that is absent, where our policy allows it."""

_DAMAGED: Final = ("message authentication failed", "invalid ciphertext", "disallowed by policy")
_ABSENT: Final = "is not there: make it with `bao write -f {path}`"
_DELETED: Final = "is deleted: restore it with `bao write -f {path}/soft-delete-restore`"
_REFUSALS: Final = (  # the first whose words the server says; the last for anything else
    ("key not found", _ABSENT),
    ("unknown key type", _ABSENT),
    ("soft-deleted", _DELETED),
    ("version", "no longer encrypts with the version in use until now; try again in half a minute"),
    ("", "cannot be used: look at it with `bao read {path}`"),
)
_log = structlog.get_logger(__name__)


class _Encrypt(msgspec.Struct):
    plaintext: bytes  # msgspec writes and reads bytes as base64
    associated_data: bytes
    key_version: int
    type: str = _NO_UPSERT


class _Decrypt(msgspec.Struct):
    ciphertext: str
    associated_data: bytes


class _Ciphertext(msgspec.Struct):
    ciphertext: str


class _Plaintext(msgspec.Struct):
    plaintext: bytes


class _Record(msgspec.Struct):
    """``GET transit/keys/<name>``: ``keys`` are the version numbers and, of a symmetric key, Unix seconds."""

    type: str
    latest_version: int
    keys: dict[int, object] = {}  # an HMAC key has none
    min_decryption_version: int = 1
    min_available_version: int = 0
    derived: bool = False
    soft_deleted: bool = False  # OpenBao
    exportable: bool = False
    allow_plaintext_backup: bool = False


class TransitCipher:
    """One key of one mount."""

    name = "transit"

    def __init__(self, vault: VaultClient, mount: str, key: str) -> None:
        """``mount`` and ``key`` as the operator writes them. Raises ConfigurationError; calls nobody."""
        self._vault = vault
        self._mount = path_of(mount, "The mount of a transit key")
        if not _NAME.fullmatch(key):
            raise ConfigurationError(
                "The name of a transit key: expected letters, digits and _ . - between them"
            )
        self._key = key
        self._warned = False

    def encrypt(self, secret: bytes, version: str, aad: bytes) -> bytes:
        """Under exactly this version, or not at all."""
        if not _VERSION.fullmatch(version):
            raise self._error(f"has no version {version}")
        document = _Encrypt(secret, aad, int(version))
        answer = self._vault.call("POST", f"{self._mount}/encrypt/{self._key}", document)
        if not answer.ok:
            self._refused(answer)
        return _raw(answer.read(EngineAnswer[_Ciphertext]).data.ciphertext, version, answer)

    def decrypt(self, wrapped: bytes, version: str, aad: bytes) -> bytes:
        """The secret again."""
        if not _VERSION.fullmatch(version):
            raise DecryptFailed
        document = _Decrypt(f"vault:v{version}:{base64.b64encode(wrapped).decode('ascii')}", aad)
        answer = self._vault.call("POST", f"{self._mount}/decrypt/{self._key}", document)
        if answer.status == HTTPStatus.BAD_REQUEST and any(word in said(answer) for word in _DAMAGED):
            raise DecryptFailed
        if not answer.ok:
            self._refused(answer)
        return answer.read(EngineAnswer[_Plaintext]).data.plaintext

    def versions(self) -> Sequence[KeyVersion]:
        """Those that the server still decrypts, the latest last."""
        return _versions(self._record())

    def rotate(self) -> KeyVersion:
        """Ask for a new version once; where the outcome is unclear, look whether there is one.

        Each of its three calls has a timeout of its own, so that there is time to look.
        """
        before = self._record().latest_version
        try:
            answer = self._vault.call("POST", f"{self._mount}/keys/{self._key}/rotate", {})
        except (Unreachable, Busy):
            record = self._record()
            if record.latest_version == before:
                raise
        else:
            if not answer.ok:
                self._refused(answer)
            record = self._record()
        return _versions(record)[-1]

    def _record(self) -> _Record:
        answer = self._vault.call("GET", f"{self._mount}/keys/{self._key}")
        if not answer.ok:
            self._refused(answer)
        record = answer.read(EngineAnswer[_Record]).data
        self._check(record)
        if record.latest_version not in record.keys:
            raise answer.odd()
        return record

    def _check(self, record: _Record) -> None:
        make = f"make another with `bao write -f {self._mount}/keys/<name>`"
        if record.derived:
            raise self._error(f"is derived, so it would need a context that transit can read: {make}")
        if record.type not in TYPES:
            raise self._error(f"is of a type that cannot bind contexts: {make}")
        if record.soft_deleted:
            raise self._error(_DELETED)
        if (record.exportable or record.allow_plaintext_backup) and not self._warned:
            self._warned = True
            _log.warning("key.exportable", backend=self.name, key=self._path, advice=make)

    def _refused(self, answer: PeerAnswer) -> NoReturn:
        """Raise for an answer that is not 2xx and does not mean a damaged wrap."""
        words = said(answer)
        if answer.status == HTTPStatus.NOT_FOUND:
            enable = f"bao secrets enable -path={self._mount} transit"
            raise self._vault.no_engine(answer, self._mount, enable) or self._error(_ABSENT)
        if answer.status != HTTPStatus.BAD_REQUEST:
            raise answer.odd()
        raise self._error(next(text for word, text in _REFUSALS if word in words))

    def _error(self, text: str) -> BackendUnavailable:
        kind = KeyMissing if text is _ABSENT else BackendUnavailable
        return kind(f"The key {self._path} of {self._vault.server.where} {text.format(path=self._path)}")

    @property
    def _path(self) -> str:
        return f"{self._mount}/keys/{self._key}"


def _raw(ciphertext: str, version: str, answer: PeerAnswer) -> bytes:
    """What stands after the prefix of exactly this version; else the answer is another server's."""
    before, prefix, text = ciphertext.partition(f"vault:v{version}:")
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        raise answer.odd() from None
    if before or not prefix or not raw:
        raise answer.odd()
    return raw


def _versions(record: _Record) -> list[KeyVersion]:
    lowest = max(record.min_decryption_version, record.min_available_version, 1)
    return [
        KeyVersion(str(number), _moment(record.keys[number]))
        for number in sorted(record.keys)
        if lowest <= number <= record.latest_version
    ]


def _moment(seconds: object) -> datetime | None:
    if not isinstance(seconds, int) or not 0 <= seconds < _LAST_SECOND:
        return None
    return datetime.fromtimestamp(seconds, UTC)


def open_key(uri: SplitResult | None, settings: Settings) -> RemoteBackend:
    """``transit:<key>``, or ``transit:<key>?mount=<mount>``; None means ``key_name`` of ``[kms.transit]``."""
    section = settings.kms.transit
    mount, key = section.mount, section.key_name
    if uri is not None:
        mount, key = located(
            uri, mount, "A transit key is transit:<key name>, or transit:<key name>?mount=<mount>"
        )
    if key is None:
        raise ConfigurationError("kms.transit.key_name is missing: name the key that the service uses")
    vault = connect(section, "kms.transit", strict=settings.is_prod)
    return RemoteBackend(TransitCipher(vault, mount, key), data_keys=section.data_keys)
