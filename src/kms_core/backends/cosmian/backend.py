"""Cosmian KMS: the server wraps file keys with AES-GCM, its keys never leave it.

What is stored is ``01``, the nonce (12 bytes), as many bytes as were encrypted, the tag (16): 46 bytes for a
file key, 62 for a job key. What is encrypted is ``01`` and the secret, so that it never looks like BulkData.
The server authenticates the AAD of a JWE in direct encryption (RFC 7516), whichever dialect is spoken, so
each opens what another made: header ``{"alg":"dir","enc":"A256GCM","kid":"<identifier>"}``, ours as ``aad``.
"""

import os
import re
from collections.abc import Sequence
from typing import Final
from urllib.parse import SplitResult
from weakref import WeakValueDictionary

from kms_core.backends import KeyVersion
from kms_core.backends.cosmian.keys import CosmianKey
from kms_core.backends.cosmian.kmip import GcmResult
from kms_core.backends.cosmian.server import CosmianServer
from kms_core.backends.cosmian.ttlv import Kind, Refusal
from kms_core.backends.remote import RemoteBackend
from kms_core.backends.token_file import FileToken
from kms_core.http_client.peer import PeerServer, Tls
from kms_core.settings.backends import CosmianSection as Section
from kms_core.settings.model import Settings
from kms_protocol.errors import BackendUnavailable, ConfigurationError, DecryptFailed

FORM: Final = b"\x01"
MARK: Final = b"\x01"
BULK: Final = b"\x87\x87"
"""How BulkData begins: the server takes a single ciphertext or plaintext that begins so for several."""

NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
LENGTHS: Final = tuple(len(FORM) + NONCE_BYTES + len(MARK) + secret + TAG_BYTES for secret in (16, 32))
_TRIES: Final = 4
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,80}")


class CosmianCipher:
    """One key, with its versions. Safe to call from several threads."""

    name = "cosmian"

    def __init__(self, key: CosmianKey) -> None:
        self.key = key

    def encrypt(self, secret: bytes, version: str, aad: bytes) -> bytes:
        plaintext = MARK + secret
        with self.key.call():
            uid = self.key.uid(version)
            if uid is None:
                raise BackendUnavailable(f"{self.key} has no version {version}")
            for _ in range(_TRIES):
                sealed = self.key.server.seal(uid, plaintext, aad)
                if sealed is None:
                    raise self.key.is_keyset()
                if not _has_lengths(sealed, len(plaintext)):
                    break
                if not sealed.ciphertext.startswith(BULK):  # one in 65,536 does, and another nonce helps
                    return FORM + sealed.nonce + sealed.ciphertext + sealed.tag
        raise self._odd()

    def decrypt(self, wrapped: bytes, version: str, aad: bytes) -> bytes:
        sealed = _read(wrapped)
        with self.key.call():
            uid = self.key.uid(version)
            if uid is None:
                raise DecryptFailed
            plaintext = self._open(uid, sealed, aad)
        if len(plaintext) != len(sealed.ciphertext):
            raise self._odd()
        if not plaintext.startswith(MARK):
            raise DecryptFailed
        return plaintext.removeprefix(MARK)

    def versions(self) -> Sequence[KeyVersion]:
        with self.key.call():
            return self.key.versions()

    def rotate(self) -> KeyVersion:
        with self.key.call():
            return self.key.rotate()

    def _open(self, uid: str, sealed: GcmResult, aad: bytes) -> bytes:
        try:
            plaintext = self.key.server.open(uid, sealed, aad)
        except Refusal as exc:
            if exc.kind is Kind.MISSING:
                self.key.versions()  # KeyMissing if all of them are gone, not this one alone
                raise DecryptFailed from exc
            if exc.kind is Kind.CRYPTO:
                raise DecryptFailed from exc
            raise
        if plaintext is None:
            raise self.key.is_keyset()
        return plaintext

    def _odd(self) -> BackendUnavailable:
        server = self.key.server
        return BackendUnavailable(
            f"{server.where} answers with what AES-GCM cannot have made: check {server.section}.server_url"
        )


def _read(wrapped: bytes) -> GcmResult:
    """Raises DecryptFailed for what no ``encrypt`` made."""
    nonce_end = len(FORM) + NONCE_BYTES
    sealed = GcmResult(wrapped[len(FORM) : nonce_end], wrapped[nonce_end:-TAG_BYTES], wrapped[-TAG_BYTES:])
    if len(wrapped) not in LENGTHS or not wrapped.startswith(FORM) or sealed.ciphertext.startswith(BULK):
        raise DecryptFailed
    return sealed


def _has_lengths(sealed: GcmResult, plaintext_bytes: int) -> bool:
    lengths = len(sealed.nonce), len(sealed.ciphertext), len(sealed.tag)
    return lengths == (NONCE_BYTES, plaintext_bytes, TAG_BYTES)


# -- opening -----------------------------------------------------------------------------------------

_open: Final[WeakValueDictionary[tuple[Section, bool, int], CosmianServer]] = WeakValueDictionary()


def open_key(uri: SplitResult | None, settings: Settings) -> RemoteBackend:
    """``cosmian:<name>``; None means ``default_key_id`` of ``[kms.cosmian]``. Raises ConfigurationError."""
    if uri is None:
        return RemoteBackend(CosmianCipher(key_of(settings.kms.cosmian.default_key_id, settings)))
    if uri.netloc or uri.query or uri.fragment:
        raise ConfigurationError("A Cosmian key is cosmian:<name>: servers are for [kms.cosmian] alone")
    return RemoteBackend(CosmianCipher(key_of(uri.path, settings)))


def key_of(name: str, settings: Settings) -> CosmianKey:
    """A key of the server of ``[kms.cosmian]``. Connects to nothing. Raises ConfigurationError."""
    if not _NAME.fullmatch(name):
        raise ConfigurationError("A Cosmian key is cosmian:<name>, of at most 80 letters, digits, _ . -")
    return CosmianKey(_connect(settings.kms.cosmian, strict=settings.is_prod), name)


def _connect(section: Section, *, strict: bool) -> CosmianServer:
    """The server; keys of one process share it while in use, so that their calls travel together."""
    used = (section, strict, os.getpid())
    found = _open.get(used)
    if found is None:
        tls = Tls(section.tls_verify, section.ca_file, section.client_cert_file, section.client_key_file)
        url, setting = section.server_url or "", "kms.cosmian.server_url"
        server = PeerServer(url, "Cosmian KMS", setting, section.timeout_s, tls)
        given = section.api_key or section.api_key_file
        new = "put the API token of our user there"
        token = FileToken(section.api_key, section.api_key_file, strict=strict, new=new) if given else None
        found = _open[used] = CosmianServer(server, token, section.protocol)
    return found
