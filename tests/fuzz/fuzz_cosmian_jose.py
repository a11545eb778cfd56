"""What a Cosmian KMS server may answer over JOSE: bytes, a refusal, or an error that blames the server."""

import base64
import json
from collections.abc import Iterable
from typing import Final

from fuzz.fuzz_cosmian_ttlv import STATUSES, UID, FixedAnswer
from kms_core.backends.cosmian.kmip import GcmResult, Refusal
from kms_core.backends.cosmian.server import Jose
from kms_protocol.errors import BackendUnavailable

MOST_BYTES: Final = 2 * 1024
PROTECTED: Final = (
    base64.urlsafe_b64encode(f'{{"alg":"dir","enc":"A256GCM","kid":"{UID}"}}'.encode()).rstrip(b"=").decode()
)
WORDS: Final = (
    b'"protected":"',
    PROTECTED.encode(),
    b'"iv":"',
    b'"tag":"',
    b'"ciphertext":"',
    b'{"error":"crypto_failure","description":"CRYPTO',
    b"not_found",
    b"decryption_failed",
)


def seeds() -> Iterable[bytes]:
    answers = (
        {
            "protected": PROTECTED,
            "iv": "bm5ubm5ubm5ubm5u",
            "ciphertext": "Y2M",
            "tag": "dHR0dHR0dHR0dHR0dHR0dA",
        },
        {"kid": UID, "data": "cGxhaW4"},
        {"error": "not_found", "description": "Item_Not_Found"},
        {"error": "crypto_failure", "description": "key is in state Active but operation requires x"},
        {"error": "forbidden"},
        {"error": "decryption_failed", "description": ""},
    )
    for status in range(len(STATUSES)):
        for answer in answers:
            yield bytes([status]) + json.dumps(answer).encode()


def check(data: bytes) -> None:
    status, body = STATUSES[(data[:1] or b"\x00")[0] % len(STATUSES)], data[1:]
    jose = Jose(FixedAnswer(status, body).post)
    try:
        sealed = jose.seal(UID, b"p" * 17, b"aad")
    except (Refusal, BackendUnavailable):
        pass
    else:
        assert _said(body)["protected"] == PROTECTED
        assert all(isinstance(each, bytes) for each in (sealed.nonce, sealed.ciphertext, sealed.tag))
    try:
        opened = jose.open(UID, GcmResult(b"n" * 12, b"c" * 17, b"t" * 16), b"aad")
    except (Refusal, BackendUnavailable):
        return
    said = _said(body)["data"]
    assert base64.urlsafe_b64encode(opened).rstrip(b"=").decode() == said, "no base64url (RFC 7515 §2)"


def _said(body: bytes) -> dict[str, str]:
    """The fields of an answer; those that nobody reads may hold anything."""
    found: dict[str, str] = json.loads(body.decode("utf-8", "replace"))
    return found
