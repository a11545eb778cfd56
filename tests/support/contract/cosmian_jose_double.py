"""The JOSE calls of the double of a Cosmian KMS server: as strict, and as lax, as 5.26 is."""

import base64
import json
from collections.abc import Mapping
from string import ascii_letters, digits
from typing import Any, Final

from support.contract.cosmian_store import Refused, Store

ENCRYPTIONS: Final = ("A128GCM", "A192GCM", "A256GCM")
_ALPHABET: Final = frozenset(f"{ascii_letters}{digits}-_=")
Json = Any


class Jose(Exception):
    """An error of ``/v1/crypto``."""

    def __init__(self, status: int, error: str, description: str) -> None:
        super().__init__(description)
        self.status, self.body = status, {"error": error, "description": description}


def bad(words: str) -> Jose:
    return Jose(400, "bad_request", words)


def jose(store: Store, path: str, document: Json, user: str) -> Json:
    try:
        if path == "/v1/crypto/encrypt":
            return _encrypt(store, document, user)
        return _decrypt(store, document, user)
    except Refused as exc:
        if exc.words.startswith("Item not found"):
            raise Jose(404, "not_found", "Key not found") from None
        if exc.words.startswith("Access denied"):
            raise Jose(403, "forbidden", "Access denied") from None
        raise Jose(422, "crypto_failure", exc.message) from None


def _encrypt(store: Store, document: Json, user: str) -> Json:
    kid, alg, enc, data = (_member(document, name) for name in ("kid", "alg", "enc", "data"))
    if enc not in ENCRYPTIONS:
        known = ", ".join(f"`{each}`" for each in ENCRYPTIONS)
        raise _body(f"unknown variant `{enc}`, expected one of {known}")
    plaintext = unb64("data", data)
    if alg != "dir":
        words = f"{alg} encrypt: key '{kid}' is not an RSA key pair (got SymmetricKey)"
        raise Jose(422, "crypto_failure", words)
    head = b64(f'{{"alg":"dir","enc":"{enc}","kid":"{kid}"}}'.encode())  # the key's length may be another
    aad = document.get("aad")
    sealed = store.seal(store.encrypting(kid, user), plaintext, _authenticated(head, aad))
    named = dict(zip(("iv", "ciphertext", "tag"), map(b64, sealed), strict=True))
    return {"protected": head, "encrypted_key": "", **named, **({} if aad is None else {"aad": aad})}


def _decrypt(store: Store, document: Json, user: str) -> Json:
    head = _member(document, "protected")
    kid = _key_of(head)
    if document.get("encrypted_key"):
        raise bad("'encrypted_key' must be absent or empty for 'dir' key management")
    nonce = unb64("iv", _member(document, "iv"))
    if len(nonce) != 12:
        words = f"GCM initialization vector must be exactly 96 bits (12 bytes), got {len(nonce)} bytes"
        raise bad(words)
    ciphertext, tag = (unb64(name, _member(document, name)) for name in ("ciphertext", "tag"))
    if len(tag) != 16:
        raise bad(f"GCM authentication tag must be exactly 128 bits (16 bytes), got {len(tag)} bytes")
    aad = _authenticated(head, document.get("aad"))
    plaintext = store.open(store.decrypting(kid, user), nonce, ciphertext + tag, aad)
    return {"kid": kid, "data": b64(plaintext)}


def _key_of(head: str) -> str:
    """The ``kid`` of a protected header of direct encryption."""
    try:
        found = json.loads(unb64("protected", head))
    except ValueError:
        words = (
            "Field 'protected' is not valid JSON after base64url decode: expected value at line 1 column 1"
        )
        raise bad(words) from None
    for name in ("kid", "alg", "enc"):
        if name not in found:
            raise bad(f"Protected header missing required '{name}' field")
    if found["enc"] not in ENCRYPTIONS:
        words = (
            f"Unsupported content-encryption algorithm '{found['enc']}'. Supported: {', '.join(ENCRYPTIONS)}."
        )
        raise Jose(422, "unsupported_algorithm", words)
    kid: str = found["kid"]
    return kid


def _member(document: Mapping[str, Json], name: str) -> str:
    if name not in document:
        raise _body(f"missing field `{name}`")
    value: str = document[name]
    return value


def _body(words: str) -> Jose:
    return bad(f"Invalid request body: Json deserialize error: {words} at line 1 column 1")


def _authenticated(head: str, aad: str | None) -> bytes:
    if aad is None:
        return head.encode()
    unb64("aad", aad)
    return f"{head}.{aad}".encode()


def b64(octets: bytes) -> str:
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()


def unb64(name: str, value: str) -> bytes:
    """Base64url in its one form (RFC 7515 §2)."""
    wrong = f"Field '{name}' is not valid base64url: "
    for place, each in enumerate(value):
        if each not in _ALPHABET:
            raise bad(f"{wrong}Invalid symbol {ord(each)}, offset {place}.")
    if "=" in value or len(value) % 4 == 1:
        raise bad(f"{wrong}Invalid padding")
    octets = base64.urlsafe_b64decode(value + "=" * (-len(value) % 4))
    if b64(octets) != value:
        raise bad(f"{wrong}Invalid last symbol {ord(value[-1])}, offset {len(value) - 1}.")
    return octets
