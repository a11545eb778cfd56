"""The JOSE calls of Cosmian KMS 5.23 and later: AES-GCM as a JWE (RFC 7516) in direct encryption.

``jwe_aad`` is what the server authenticates in such a JWE, and what we hand to KMIP as well: so what one
dialect encrypts the other decrypts. Knows no settings and no versions of keys.
"""

import base64
import binascii
from functools import lru_cache
from typing import Final

import msgspec

from kms_core.backends.cosmian.kmip import GcmResult, KmipConnection
from kms_core.backends.cosmian.ttlv import Kind, Refusal, refusal
from kms_core.http_client.peer import PeerAnswer

ENCRYPT: Final = "/v1/crypto/encrypt"
DECRYPT: Final = "/v1/crypto/decrypt"
_ENCRYPTION: Final = "A256GCM"


class _EncryptIn(msgspec.Struct):
    kid: str
    data: str
    aad: str
    alg: str = "dir"
    enc: str = _ENCRYPTION


class _EncryptOut(msgspec.Struct):
    protected: str
    iv: str
    ciphertext: str
    tag: str


class _DecryptIn(msgspec.Struct):
    protected: str
    iv: str
    ciphertext: str
    tag: str
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
    """AES-GCM over ``/v1/crypto``; safe to call from several threads."""

    def __init__(self, line: KmipConnection) -> None:
        self._line = line

    def seal(self, uid: str, plaintext: bytes, aad: bytes) -> GcmResult:
        """Under a nonce of the server's, with ``jwe_aad(uid, aad)`` authenticated. Raises Refusal."""
        answer = self._post(ENCRYPT, _EncryptIn(uid, _b64(plaintext), _b64(aad)))
        found = answer.read(_EncryptOut)
        if found.protected != _protected(uid):
            raise answer.odd()
        return GcmResult(
            _octets(found.iv, answer), _octets(found.ciphertext, answer), _octets(found.tag, answer)
        )

    def open(self, uid: str, sealed: GcmResult, aad: bytes) -> bytes:
        """The plaintext. Raises Refusal."""
        body = _DecryptIn(
            _protected(uid), _b64(sealed.nonce), _b64(sealed.ciphertext), _b64(sealed.tag), _b64(aad)
        )
        answer = self._post(DECRYPT, body)
        return _octets(answer.read(_DecryptOut).data, answer)

    def _post(self, path: str, body: msgspec.Struct) -> PeerAnswer:
        answer = self._line.post(path, msgspec.json.encode(body))
        if not answer.ok:
            raise _refusal(answer)
        return answer


def _refusal(answer: PeerAnswer) -> Refusal:
    """What a code means; ``crypto_failure`` covers states of the key as well, which its text tells.

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
            return refusal(found.description)


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
        raise answer.odd() from None
    if _b64(octets) != text:  # the decoder passes over what is no base64
        raise answer.odd()
    return octets
