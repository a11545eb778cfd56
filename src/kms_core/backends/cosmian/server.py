"""One Cosmian KMS server: our credentials, the dialect of its version, and the owner of its keys.

The version is read at the first call, and again after a failed connection, since the server may have been
replaced.

5.23 and later also offer AES-GCM as a JWE (RFC 7516) in direct encryption. ``jwe_aad`` is the AAD of such a
JWE; the service uses it in KMIP as well, so that each dialect decrypts the wraps of the others.
"""

import base64
import binascii
import re
from collections.abc import Sequence
from functools import lru_cache, partial
from http import HTTPStatus
from typing import Final, Literal
from urllib.parse import quote

import msgspec

from kms_core.backends.cosmian.kmip import GcmResult, Kind, Kmip, Messages, Post, Refusal, ask_alone
from kms_core.backends.file_token import FileToken
from kms_core.http_client import Busy, Peer, PeerAnswer, PeerServer, Unreachable
from kms_protocol.errors import BackendUnavailable

ENCRYPT: Final = "/v1/crypto/encrypt"
DECRYPT: Final = "/v1/crypto/decrypt"
_ENCRYPTION: Final = "A256GCM"
Protocol = Literal["auto", "kmip", "jose"]
_VERSION: Final = re.compile(r"(\d+)\.(\d+)\.")
_MESSAGES_FROM: Final = (5, 0)
_JOSE_FROM: Final = (5, 23)


class _EncryptIn(msgspec.Struct):
    kid: str
    data: str
    aad: str
    alg: str = "dir"
    enc: str = _ENCRYPTION


class _Jwe(msgspec.Struct):
    protected: str
    iv: str
    ciphertext: str
    tag: str


class _DecryptIn(_Jwe):
    aad: str
    encrypted_key: str = ""


class _DecryptOut(msgspec.Struct):
    kid: str
    data: str


class _Error(msgspec.Struct):
    error: str
    description: str = ""


def jwe_aad(uid: str, aad: bytes) -> bytes:
    """``BASE64URL(protected header) "." BASE64URL(aad)`` (RFC 7516 §5.1, step 14). ``uid`` is plain ASCII."""
    return f"{_protected(uid)}.{_b64(aad)}".encode("ascii")


class Jose:
    """AES-GCM over ``/v1/crypto``; safe for several threads."""

    def __init__(self, post: Post) -> None:
        self._send = post

    def seal(self, uid: str, plaintext: bytes, aad: bytes) -> GcmResult:
        """Encrypt under a nonce of the server, with ``jwe_aad(uid, aad)`` authenticated. Raises Refusal."""
        answer = self._post(ENCRYPT, _EncryptIn(uid, _b64(plaintext), _b64(aad)))
        found = answer.read(_Jwe)
        if found.protected != _protected(uid):
            raise answer.unexpected_error()
        return GcmResult(
            _octets(found.iv, answer), _octets(found.ciphertext, answer), _octets(found.tag, answer)
        )

    def open(self, uid: str, sealed: GcmResult, aad: bytes) -> bytes:
        """Decrypt. Raises Refusal."""
        body = _DecryptIn(
            _protected(uid), _b64(sealed.nonce), _b64(sealed.ciphertext), _b64(sealed.tag), _b64(aad)
        )
        answer = self._post(DECRYPT, body)
        return _octets(answer.read(_DecryptOut).data, answer)

    def _post(self, path: str, body: msgspec.Struct) -> PeerAnswer:
        answer = self._send(path, msgspec.json.encode(body), ())
        if not answer.ok:
            raise _answer_error(answer)
        return answer


def _answer_error(answer: PeerAnswer) -> Refusal:
    """The meaning of an error code. The text of ``crypto_failure`` tells whether it is a state of the key.

    Raises BackendUnavailable for a body of another shape, such as the 404 of a server without these calls.
    """
    found = answer.read(_Error)
    match found.error:
        case "not_found":
            return Refusal(Kind.MISSING)
        case "forbidden":
            return Refusal(Kind.DENIED)
        case "decryption_failed":
            return Refusal(Kind.CRYPTO)
        case "crypto_failure" if found.description.startswith("CRYPTO"):
            return Refusal(Kind.CRYPTO)
        case _:
            return Refusal.of(found.description)


@lru_cache(maxsize=1024)
def _protected(uid: str) -> str:
    return _b64(f'{{"alg":"dir","enc":"{_ENCRYPTION}","kid":"{uid}"}}'.encode("ascii"))


def _b64(octets: bytes) -> str:
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode("ascii")


def _octets(text: str, answer: PeerAnswer) -> bytes:
    """Base64url without padding (RFC 7515 §2). Raises BackendUnavailable for any other text."""
    try:
        octets = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        raise answer.unexpected_error() from None
    if _b64(octets) != text:  # the decoder ignores invalid characters
        raise answer.unexpected_error()
    return octets


class CosmianServer:
    """Calls to one server. Safe for several threads."""

    def __init__(self, server: PeerServer, token: FileToken | None, protocol: Protocol = "auto") -> None:
        """Make no call. Raises ConfigurationError for an unusable TLS file."""
        self.where = server.where
        self.section = server.setting.rpartition(".")[0]
        self.peer = Peer(server)
        self.token = token
        self._protocol = protocol
        self._version: tuple[int, int] | None = None
        self.messages = Messages(self.post, self.peer)
        self._new, self._old = Kmip(self.messages.ask), Kmip(partial(ask_alone, self.post), old=True)
        self._jose = Jose(self.post)

    def seal(self, uid: str, plaintext: bytes, aad: bytes) -> GcmResult | None:
        """Encrypt by key ``uid``, the same in each dialect; None if another key did. Raises Refusal."""
        if self._speaks_jose():
            return self._jose.seal(uid, plaintext, aad)
        return self.kmip().seal(uid, plaintext, jwe_aad(uid, aad))

    def open(self, uid: str, sealed: GcmResult, aad: bytes) -> bytes | None:
        """Decrypt what ``seal`` returned; None if another key did. Raises Refusal."""
        if self._speaks_jose():
            return self._jose.open(uid, sealed, aad)
        return self.kmip().open(uid, sealed, jwe_aad(uid, aad))

    def kmip(self) -> Kmip:
        """KMIP operations in this server's dialect."""
        return self._new if self.version() >= _MESSAGES_FROM else self._old

    def owns(self, uid: str) -> bool:
        """Return whether a key belongs to our user; other users may have granted us theirs."""
        answer = self._call("GET", f"/access/list/{quote(uid, safe='')}")
        if not answer.ok and answer.status != HTTPStatus.UNAUTHORIZED:
            raise answer.unexpected_error()
        return answer.ok

    def version(self) -> tuple[int, int]:
        """Major and minor version. Raises as ``Peer.call``."""
        if self._version is None:
            answer = self._call("GET", "/version")
            found = _VERSION.match(answer.read(str)) if answer.ok else None
            if found is None:
                raise answer.unexpected_error()
            self._version = int(found[1]), int(found[2])
        return self._version

    def post(self, path: str, body: bytes, expected: Sequence[int]) -> PeerAnswer:
        """Send a request with our credentials, for the dialects. Returns 4xx, and 5xx in ``expected``."""
        return self._call("POST", path, body, expected)

    def _call(
        self, method: str, path: str, body: bytes | None = None, expected: Sequence[int] = ()
    ) -> PeerAnswer:
        headers = {"Authorization": f"Bearer {self.token.current()}"} if self.token else {}
        try:
            answer = self.peer.call(method, path, body, headers=headers, expected=expected)
        except Unreachable:
            self._version = None
            raise
        if answer.status == HTTPStatus.UNAUTHORIZED and not answer.body.startswith(b"Access denied"):
            raise BackendUnavailable(
                f"{self.where} does not accept our credentials: check {self.section}.api_key_file "
                "(or api_key), or client_cert_file"
            )
        if answer.status == HTTPStatus.REQUEST_TIMEOUT:
            raise Busy(f"{self.where} answers {answer.status}")
        return answer

    def _speaks_jose(self) -> bool:
        if self._protocol != "jose":
            return False
        if self.version() < _JOSE_FROM:
            raise BackendUnavailable(
                f'{self.where} has no JOSE calls, which came with 5.23: set {self.section}.protocol = "kmip"'
            )
        return True
