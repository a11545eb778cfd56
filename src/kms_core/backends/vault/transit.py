"""The transit backend on OpenBao or Vault: the server wraps file keys, and its key never leaves it.

A wrap is the decoded base64 of ``vault:v<version>:<base64>`` (nonce, ciphertext, tag; 44 bytes for a file key
under AES-GCM). The stanza holds the version, and decryption restores the prefix. The AAD is sent as
``associated_data``, never as ``context``, which transit silently ignores for keys that are not derived.
Derived keys, and types without AEAD, are refused.
"""

import base64
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from typing import Final, NoReturn
from urllib.parse import SplitResult

import msgspec
import structlog

from kms_core.backends import KeyMissing, KeyVersion
from kms_core.backends.batching import Batcher
from kms_core.backends.remote import RemoteBackend
from kms_core.backends.vault.client import EngineAnswer, VaultClient, connect, located, path_of, said
from kms_core.backends.vault.settings import TransitSection
from kms_core.http_client import Busy, PeerAnswer, Unreachable
from kms_protocol.errors import BackendUnavailable, ConfigurationError, DecryptFailed, KmsError

TYPES: Final = frozenset({"aes128-gcm96", "aes256-gcm96", "chacha20-poly1305", "xchacha20-poly1305"})
_NAME: Final = re.compile(r"\w(?:[\w.-]*\w)?", re.ASCII)  # the rule of the engine
_VERSION: Final = re.compile(r"[1-9][0-9]{0,8}")  # "0" would mean 1, "01" too
_LAST_SECOND: Final = 253_402_300_800  # the year 10000
_NO_UPSERT: Final = "none"
"""An invalid key type: encrypt would otherwise create a missing key, where our policy allows it."""

DAMAGED: Final = ("message authentication failed", "invalid ciphertext", "disallowed by policy")
_ABSENT: Final = "is not there: make it with `bao write -f {path}`"
_DELETED: Final = "is deleted: restore it with `bao write -f {path}/soft-delete-restore`"
_REFUSALS: Final = (  # the first whose text is in the answer; the last for any other
    ("key not found", _ABSENT),
    ("unknown key type", _ABSENT),
    ("soft-deleted", _DELETED),
    ("version", "no longer encrypts with the version in use until now; try again in half a minute"),
    ("", "cannot be used: look at it with `bao read {path}`"),
)
_log = structlog.get_logger(__name__)


class _Item(msgspec.Struct, omit_defaults=True):
    """A secret to encrypt under a version, or a ciphertext to decrypt."""

    associated_data: bytes
    plaintext: bytes = b""  # msgspec writes and reads bytes as base64
    key_version: int = 0
    ciphertext: str = ""
    type: str = ""  # for a call of its own
    reference: str = ""  # for an item of a batch, where it comes back with the outcome


class _Batch(msgspec.Struct, omit_defaults=True):
    batch_input: Sequence[_Item]
    type: str = ""


class _ItemOutcome(msgspec.Struct):
    """The answer to one item, of a batch or by itself; ``reference`` is empty if the server returns none."""

    ciphertext: str = ""
    plaintext: bytes | None = None
    error: str = ""
    reference: str = ""


class _Results(msgspec.Struct, frozen=True):
    batch_results: list[_ItemOutcome] | None = None


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


class _BatchAnswer(msgspec.Struct):
    data: _Results = _Results()


class TransitCipher:
    """One key of one mount. Calls that wait while a request is in flight form the next (``batch_input``)."""

    name = "transit"

    def __init__(self, vault: VaultClient, mount: str, key: str) -> None:
        """``mount`` and ``key`` as the operator writes them. Raises ConfigurationError; makes no call."""
        self._vault, self.token, self.server = vault, vault.token, vault.server
        self._mount = path_of(mount, "The mount of a transit key")
        if not _NAME.fullmatch(key):
            raise ConfigurationError(
                "The name of a transit key: expected letters, digits and _ . - between them"
            )
        self._key = key
        self._warned = False
        self._encrypts: Batcher[_Item, _ItemOutcome] = Batcher(partial(self._send, "encrypt"))
        self._decrypts: Batcher[_Item, _ItemOutcome] = Batcher(partial(self._send, "decrypt"))

    def encrypt(self, secret: bytes, version: str, aad: bytes) -> bytes:
        """Encrypt under exactly this version. Raises BackendUnavailable if that is not possible."""
        if not _VERSION.fullmatch(version):
            raise self._error(f"has no version {version}")
        found = self._ask(self._encrypts, _Item(aad, plaintext=secret, key_version=int(version)))
        return self._raw(found.ciphertext, version)

    def decrypt(self, wrapped: bytes, version: str, aad: bytes) -> bytes:
        """Decrypt what ``encrypt`` returned."""
        if not _VERSION.fullmatch(version):
            raise DecryptFailed
        ciphertext = f"vault:v{version}:{base64.b64encode(wrapped).decode('ascii')}"
        plaintext = self._ask(self._decrypts, _Item(aad, ciphertext=ciphertext)).plaintext
        if plaintext is None:
            raise self._vault.server.unexpected_error("no plaintext")
        return plaintext

    def versions(self) -> Sequence[KeyVersion]:
        """The versions that the server still decrypts, the latest last."""
        return _versions(self._record())

    def rotate(self) -> KeyVersion:
        """Request a new version once. If the outcome is unclear, check whether there is one.

        Each of its three calls has its own timeout, so that there is time for the check.
        """
        before = self._record().latest_version
        try:
            answer = self._vault.call("POST", f"{self._path}/rotate", {})
        except (Unreachable, Busy):
            record = self._record()
            if record.latest_version == before:
                raise
        else:
            if not answer.ok:
                self._refused(answer)
            record = self._record()
        return _versions(record)[-1]

    # -- calls of several threads in one request --------------------------------------------------------

    def _ask(self, batcher: "Batcher[_Item, _ItemOutcome]", item: _Item) -> _ItemOutcome:
        return self._vault.peer.in_time(partial(batcher.call, item))

    def _send(self, operation: str, items: Sequence[_Item]) -> Sequence[_ItemOutcome | KmsError]:
        """Send items in one request. One that the server refuses as a whole is sent again item by item.

        So no caller's ciphertext can fail the calls of others.
        """
        if len(items) == 1:
            return [self._send_one(operation, items[0])]
        try:
            found = self._send_batch(operation, items)
        except Busy:
            found = None
        return found or self._send_each(operation, items)

    def _send_each(self, operation: str, items: Sequence[_Item]) -> Sequence[_ItemOutcome | KmsError]:
        outcomes: list[_ItemOutcome | KmsError] = []
        for item in items:
            try:
                outcomes.append(self._send_one(operation, item))
            except Unreachable as exc:
                return outcomes + [exc] * (len(items) - len(outcomes))
            except KmsError as exc:
                outcomes.append(exc)
        return outcomes

    def _send_one(self, operation: str, item: _Item) -> _ItemOutcome:
        if operation == "encrypt":
            item = msgspec.structs.replace(item, type=_NO_UPSERT)
        answer = self._vault.call("POST", f"{self._mount}/{operation}/{self._key}", item)
        if not answer.ok:
            self._refused(answer, operation)
        return answer.read(EngineAnswer[_ItemOutcome]).data

    def _send_batch(self, operation: str, items: Sequence[_Item]) -> Sequence[_ItemOutcome | KmsError] | None:
        """The outcome of each item; None for an answer without outcomes."""
        numbered = [msgspec.structs.replace(item, reference=str(n)) for n, item in enumerate(items)]
        document = _Batch(numbered, _NO_UPSERT if operation == "encrypt" else "")
        answer = self._vault.call("POST", f"{self._mount}/{operation}/{self._key}", document)
        if not answer.ok and answer.status != HTTPStatus.BAD_REQUEST:
            self._refused(answer)
        found = answer.read(_BatchAnswer).data.batch_results
        if found is None:
            return None
        same = [each.reference in {"", item.reference} for each, item in zip(found, numbered, strict=False)]
        if len(found) != len(numbered) or not all(same):
            raise answer.unexpected_error()  # the outcome of another item would make an unreadable file
        return [self._refusal_error(operation, each.error.lower()) if each.error else each for each in found]

    def _refusal_error(self, operation: str, words: str) -> KmsError:
        """The meaning of the text of a 400."""
        if operation == "decrypt" and any(word in words for word in DAMAGED):
            return DecryptFailed()
        return self._error(next(text for word, text in _REFUSALS if word in words))

    def _record(self) -> _Record:
        answer = self._vault.call("GET", self._path)
        if not answer.ok:
            self._refused(answer)
        record = answer.read(EngineAnswer[_Record]).data
        self._check(record)
        if record.latest_version not in record.keys:
            raise answer.unexpected_error()
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

    def _refused(self, answer: PeerAnswer, operation: str = "") -> NoReturn:
        """Raise for an answer other than 2xx, which only to ``decrypt`` may mean a damaged wrap."""
        words = said(answer)
        if answer.status == HTTPStatus.NOT_FOUND:
            enable = f"bao secrets enable -path={self._mount} transit"
            raise self._vault.engine_error(answer, self._mount, enable) or self._error(_ABSENT)
        if answer.status != HTTPStatus.BAD_REQUEST:
            raise answer.unexpected_error()
        raise self._refusal_error(operation, words)

    def _raw(self, ciphertext: str, version: str) -> bytes:
        """The bytes after the prefix of exactly this version. Raises BackendUnavailable for another text."""
        before, prefix, text = ciphertext.partition(f"vault:v{version}:")
        try:
            raw = base64.b64decode(text, validate=True)
        except ValueError:
            raw = b""
        if before or not prefix or not raw:
            raise self._vault.server.unexpected_error("a ciphertext of another form")
        return raw

    def _error(self, text: str) -> BackendUnavailable:
        kind = KeyMissing if text is _ABSENT else BackendUnavailable
        return kind(f"The key {self._path} of {self._vault.server.where} {text.format(path=self._path)}")

    @property
    def _path(self) -> str:
        return f"{self._mount}/keys/{self._key}"


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


def open_key(uri: SplitResult | None, section: TransitSection, *, strict: bool) -> RemoteBackend:
    """``transit:<key>``, or ``transit:<key>?mount=<mount>``; None means ``key_name`` of ``[kms.transit]``."""
    usage = "A transit key is transit:<key name>, or transit:<key name>?mount=<mount>"
    mount, key = located(uri, section.mount, section.key_name, usage)
    if key is None:
        raise ConfigurationError("kms.transit.key_name is missing: name the key that the service uses")
    vault = connect(section, "kms.transit", strict=strict)
    return RemoteBackend(TransitCipher(vault, mount, key))
