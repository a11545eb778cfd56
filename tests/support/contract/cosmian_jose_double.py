"""The JOSE calls of the double of a Cosmian KMS server, as 5.26 answers ours."""

import base64
import json
from typing import Any

from support.contract.cosmian_store import Refused, Store

Json = Any


class Jose(Exception):
    """An error of ``/v1/crypto``."""

    def __init__(self, status: int, error: str, description: str) -> None:
        super().__init__(description)
        self.status, self.body = status, {"error": error, "description": description}


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
    kid, aad = document["kid"], document.get("aad")
    head = b64(f'{{"alg":"dir","enc":"A256GCM","kid":"{kid}"}}'.encode())
    sealed = store.seal(store.encrypting(kid, user), unb64(document["data"]), _authenticated(head, aad))
    named = dict(zip(("iv", "ciphertext", "tag"), map(b64, sealed), strict=True))
    return {"protected": head, "encrypted_key": "", **named, **({} if aad is None else {"aad": aad})}


def _decrypt(store: Store, document: Json, user: str) -> Json:
    head = document["protected"]
    kid = json.loads(unb64(head))["kid"]
    nonce, ciphertext, tag = (unb64(document[name]) for name in ("iv", "ciphertext", "tag"))
    for octets, size, what in ((nonce, 12, "initialization vector"), (tag, 16, "authentication tag")):
        if len(octets) != size:
            words = f"GCM {what} must be exactly {size * 8} bits ({size} bytes), got {len(octets)} bytes"
            raise Jose(400, "bad_request", words)
    aad = _authenticated(head, document.get("aad"))
    plaintext = store.open(store.decrypting(kid, user), nonce, ciphertext + tag, aad)
    return {"kid": kid, "data": b64(plaintext)}


def _authenticated(head: str, aad: str | None) -> bytes:
    return (head if aad is None else f"{head}.{aad}").encode()


def b64(octets: bytes) -> str:
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()


def unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
