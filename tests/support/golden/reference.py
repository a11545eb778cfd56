"""The formats of version 1, implemented a second time; imports nothing of the service.

What the service wrote is checked with this, and this writes what the service must read. Bytes throughout;
``Broken`` is raised where a MAC or a tag does not fit. Sources: C2SP age.md (header, STREAM), RFC 5869
(HKDF), RFC 7516 (JWE of Cosmian).
"""

import base64
import hashlib
import hmac
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

CHUNK_BYTES: Final = 64 * 1024
_BECH32: Final = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
VERSION_LINE: Final = b"age-encryption.org/v1\n"


class Broken(Exception):
    """A MAC, a tag or a shape is not as version 1 has it."""


@dataclass(frozen=True)
class Stanza:
    """``-> args`` and a body."""

    args: tuple[str, ...]
    body: bytes


def derived(secret: bytes, info: bytes, salt: bytes = b"") -> bytes:
    """HKDF-SHA256, 32 bytes."""
    return HKDF(SHA256(), 32, salt or None, info).derive(secret)


def prefixed(*parts: bytes) -> bytes:
    """Each part behind its length in 4 bytes, big-endian."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def prefixed_texts(*texts: str) -> bytes:
    return prefixed(*(text.encode() for text in texts))


def canonical(context: Mapping[str, str]) -> bytes:
    """Pairs in the order of their keys' UTF-8."""
    return prefixed_texts(*(text for pair in sorted(context.items()) for text in pair))


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def hmac_sha256(key: bytes, message: bytes) -> bytes:
    return hmac.new(key, message, hashlib.sha256).digest()


# -- age headers -------------------------------------------------------------------------------------


def unpadded(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")


def decoded(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def rendered(stanza: Stanza) -> bytes:
    text = unpadded(stanza.body)
    rows = [text[at : at + 64] for at in range(0, len(text) + 1, 64)]
    return f"-> {' '.join(stanza.args)}\n".encode() + "\n".join(rows).encode() + b"\n"


def stanzas_of(text: bytes) -> Iterator[Stanza]:
    """Those of a header, or of the body of a bundle."""
    for block in re.findall(rb"^-> ([^\n]+)\n((?:[^\n]{64}\n)*[^\n]{0,63})\n", text, re.MULTILINE):
        yield Stanza(tuple(block[0].decode().split(" ")), decoded(block[1].replace(b"\n", b"").decode()))


def parsed(file: bytes, file_key: bytes) -> list[Stanza]:
    """The stanzas of a file whose header MAC fits this file key."""
    signed, footer, rest = file.partition(b"\n--- ")
    signed += b"\n---"
    if (
        not footer
        or not file.startswith(VERSION_LINE)
        or decoded(rest[:43].decode()) != _mac(file_key, signed)
    ):
        raise Broken
    return list(stanzas_of(signed[len(VERSION_LINE) :]))


def _mac(file_key: bytes, signed: bytes) -> bytes:
    return hmac_sha256(derived(file_key, b"header"), signed)


def bech32_data(text: str) -> bytes:
    """The bytes of a Bech32 text (BIP 173), its checksum of six characters left out."""
    letters = text.lower().rpartition("1")[2][:-6]
    bits = "".join(f"{_BECH32.index(letter):05b}" for letter in letters)
    return bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits) - 7, 8))


# -- age payloads ------------------------------------------------------------------------------------


def sealed_payload(file_key: bytes, nonce: bytes, plaintext: bytes) -> bytes:
    """STREAM: chunks of 64 KiB, the last one marked; no plaintext is one empty chunk."""
    aead = ChaCha20Poly1305(derived(file_key, b"payload", nonce))
    starts = range(0, max(len(plaintext), 1), CHUNK_BYTES)
    return b"".join(
        aead.encrypt(
            (start // CHUNK_BYTES).to_bytes(11, "big") + bytes([start == starts[-1]]),
            plaintext[start : start + CHUNK_BYTES],
            None,
        )
        for start in starts
    )


def opened_payload(file_key: bytes, nonce: bytes, payload: bytes) -> bytes:
    aead = ChaCha20Poly1305(derived(file_key, b"payload", nonce))
    step = CHUNK_BYTES + 16
    starts = range(0, len(payload), step)
    return b"".join(
        _opened(
            aead,
            (start // step).to_bytes(11, "big") + bytes([start == starts[-1]]),
            payload[start : start + step],
            None,
        )
        for start in starts
    )


def opened_file(file: bytes, file_key: bytes) -> bytes:
    """The plaintext of a binary age file, of which the header MAC is checked too."""
    parsed(file, file_key)
    at = file.index(b"\n--- ") + 1 + len("--- ") + 43 + 1
    return opened_payload(file_key, file[at : at + 16], file[at + 16 :])


def _opened(aead: ChaCha20Poly1305 | AESGCM, nonce: bytes, sealed: bytes, aad: bytes | None) -> bytes:
    try:
        return aead.decrypt(nonce, sealed, aad)
    except InvalidTag:
        raise Broken from None


def unverified_stanzas(file: bytes) -> list[Stanza]:
    """The stanzas of a header, before its MAC can be checked."""
    return list(stanzas_of(file[len(VERSION_LINE) : file.index(b"\n--- ") + 1]))


# -- our stanzas -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """What a ciphertext is bound to besides its context."""

    tenant: str
    key_id: str
    version: str
    backend: str


def context_tag(file_key: bytes, salt: bytes, key: Names, context: Mapping[str, str]) -> bytes:
    """The body of ``kms-service/context 1 <key-id> <key-version> <salt>``."""
    label = b"kms-service/context/1"
    bound = (
        prefixed(label) + prefixed_texts(key.tenant, key.key_id, key.version) + prefixed(canonical(context))
    )
    return hmac_sha256(derived(file_key, label, salt), bound)


def origin_key(identity_secret: bytes) -> bytes:
    return derived(identity_secret, b"kms-service/origin/1")


def origin_tag(
    mac_key: bytes, file_key: bytes, nonce: bytes | None, key: Names, context: Mapping[str, str]
) -> bytes:
    """The body of ``kms-service/origin 1``, or of 2, where no nonce is known."""
    label = b"kms-service/origin/2" if nonce is None else b"kms-service/origin/1"
    commitment = derived(file_key, b"kms-service/commitment/1")
    rest = [canonical(context), *([] if nonce is None else [nonce]), commitment]
    return hmac_sha256(
        mac_key, prefixed(label) + prefixed_texts(key.tenant, key.key_id, key.version) + prefixed(*rest)
    )


def wrap_aad(key: Names, context_body: bytes) -> bytes:
    """What a remote wrap authenticates."""
    bound = prefixed_texts(key.tenant, key.key_id, key.backend, key.version)
    return prefixed(b"kms-service/wrap/1") + bound + prefixed(context_body)


def job_aad(key: Names) -> bytes:
    """What the wrap of a job key authenticates."""
    return prefixed(b"kms-service/job/1") + prefixed_texts(key.tenant, key.key_id, key.backend, key.version)


def salted_open(secret: bytes, info: bytes, wrapped: bytes, aad: bytes) -> bytes:
    """Salt (32 bytes) and ChaCha20-Poly1305 under HKDF(secret, salt, info) with a nonce of zeros."""
    return _opened(ChaCha20Poly1305(derived(secret, info, wrapped[:32])), bytes(12), wrapped[32:], aad)


def salted_seal(secret: bytes, info: bytes, salt: bytes, plaintext: bytes, aad: bytes) -> bytes:
    return salt + ChaCha20Poly1305(derived(secret, info, salt)).encrypt(bytes(12), plaintext, aad)


# -- what remote backends keep -----------------------------------------------------------------------


def kv_open(key: bytes, wrapped: bytes, aad: bytes) -> bytes:
    return salted_open(key, b"kms-service/vault-kv/1", wrapped, aad)


def cosmian_open(key: bytes, uid: str, wrapped: bytes, aad: bytes) -> bytes:
    """``01``, nonce, AES-256-GCM of ``01`` and the secret, with the AAD of a JWE in direct encryption."""
    protected = f'{{"alg":"dir","enc":"A256GCM","kid":"{uid}"}}'.encode()
    jwe = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in (protected, aad))
    plain = _opened(AESGCM(key), wrapped[1:13], wrapped[13:], jwe)
    if (wrapped[:1], plain[:1]) != (b"\x01", b"\x01"):
        raise Broken
    return plain[1:]


def aws_context(aad: bytes) -> dict[str, str]:
    """The encryption context that AWS KMS is given."""
    return {"kms-service": hashlib.sha256(aad).hexdigest()}


def moto_open(key: bytes, blob: bytes, aad: bytes) -> bytes:
    """What moto makes: key id (36 bytes), nonce (12), tag (16), AES-256-GCM ciphertext."""
    context = "".join(f"{name}{value}" for name, value in aws_context(aad).items()).encode()
    return _opened(AESGCM(key), blob[36:48], blob[64:] + blob[48:64], context)


# -- jobs --------------------------------------------------------------------------------------------


def opened_record(secret: bytes, job_id: str, sealed: bytes) -> bytes:
    """``01``, salt, ChaCha20-Poly1305 of MessagePack, bound to the job id."""
    if sealed[:1] != b"\x01":
        raise Broken
    return salted_open(secret, b"kms-service/job-record/1", sealed[1:], job_id.encode())


def sealed_record(secret: bytes, job_id: str, salt: bytes, plain: bytes) -> bytes:
    return b"\x01" + salted_seal(secret, b"kms-service/job-record/1", salt, plain, job_id.encode())


def digest(secret: bytes, *parts: bytes, rest: bytes = b"") -> bytes:
    """The keyed digest of what rests outside a sealed record: parts behind 8-byte lengths, and a body."""
    message = b"".join(len(part).to_bytes(8, "big") + part for part in parts) + rest
    return hmac_sha256(derived(secret, b"kms-service/job-digest/1"), message)


def authenticated(secret: bytes, label: bytes, job_id: str, sealed: bytes, signed: bytes) -> bytes:
    """What is signed of a job, behind its MAC, which is also over SHA-256 of the sealed record."""
    if signed[:32] != digest(secret, label, job_id.encode(), sha256(sealed), signed[32:]):
        raise Broken
    return signed[32:]
