"""Seals the specification of a job: write access to Redis cannot change what a job does."""

import hmac
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeVar

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from kms_core.age.kdf import hkdf
from kms_core.jobs.ends import SignedEnd, SignedSplit
from kms_core.jobs.model import Checkpoint, Commit
from kms_core.jobs.spec import AnyJob, JobSpec, RecordTooNew, check_needs, unreadable_error
from kms_protocol.errors import UnknownJob

_decode: Final[Callable[[bytes], AnyJob]] = msgspec.msgpack.Decoder(AnyJob).decode
_VERSION: Final = b"\x01"
_VERSIONS: Final = 16  # as in the scripts: other bytes are no version
Bound = Commit | Checkpoint | SignedEnd | SignedSplit
"""Structs that rest in Redis behind a MAC, beside the sealed record that they belong to."""
_Bound = TypeVar("_Bound", bound=Bound)
_LABELS: Final[dict[type, bytes]] = {
    Commit: b"commit",
    Checkpoint: b"log",
    SignedEnd: b"end",
    SignedSplit: b"split",
}
_TAG_BYTES: Final = 32
_SALT_BYTES: Final = 32
_ZERO_NONCE: Final = bytes(12)
_RECORD_INFO: Final = b"kms-service/job-record/1"
_DIGEST_INFO: Final = b"kms-service/job-digest/1"


class RecordKey:
    """AEAD under keys that Redis never holds: one fresh key per record, derived by a random 32-byte salt."""

    def __init__(self, secrets: tuple[bytes, ...]) -> None:
        """``secrets`` are 32 bytes each, newest last: the newest seals, all open."""
        self._secrets = secrets
        self._digest_key = hkdf(secrets[0], salt=b"", info=_DIGEST_INFO)

    def seal(self, accepted: JobSpec) -> bytes:
        return self.seal_as(_RECORD_INFO, accepted.job_id.encode(), msgspec.msgpack.encode(accepted))

    def open(self, job_id: str, sealed: bytes) -> AnyJob:
        """The record. UnknownJob if it was not sealed here for this job id, RecordTooNew if a newer one."""
        if sealed[:1] > _VERSION and sealed[0] < _VERSIONS:
            raise RecordTooNew(f"record-{sealed[0]}")
        plain = self.open_as(_RECORD_INFO, job_id.encode(), sealed)
        if plain is None:
            raise UnknownJob("The record of this job was not written by this service")
        return _decoded(plain)

    def seal_as(self, info: bytes, name: bytes, plain: bytes) -> bytes:
        """Seal a record of another kind, which ``info`` names, to be opened under this name only."""
        salt = os.urandom(_SALT_BYTES)
        cipher = ChaCha20Poly1305(hkdf(self._secrets[-1], salt=salt, info=info))
        return _VERSION + salt + cipher.encrypt(_ZERO_NONCE, plain, name)

    def open_as(self, info: bytes, name: bytes, sealed: bytes) -> bytes | None:
        """The content of a record; None if it was not sealed here as one of this kind and name."""
        salt, body = sealed[1 : 1 + _SALT_BYTES], sealed[1 + _SALT_BYTES :]
        for secret in reversed(self._secrets):
            with suppress(InvalidTag, ValueError):
                return ChaCha20Poly1305(hkdf(secret, salt=salt, info=info)).decrypt(_ZERO_NONCE, body, name)
        return None

    def derived(self, info: bytes) -> bytes:
        """A key for another use, of the oldest secret: hosts that have not got a new one yet have it too."""
        return hkdf(self._secrets[0], salt=b"", info=info)

    def sign(self, job_id: str, bound: Bound, spec: bytes) -> bytes:
        """A MAC and the struct as it rests in Redis: write access to Redis cannot forge one.

        ``spec`` is the digest of the sealed record, so that it counts for no other record of this id.
        """
        body = msgspec.msgpack.encode(bound)
        return self._tag(type(bound), job_id, spec, body) + body

    def verified(self, kind: type[_Bound], job_id: str, signed: bytes, spec: bytes) -> _Bound:
        """A struct that was signed. UnknownJob if not as this kind, for this job id and sealed record."""
        tag, body = signed[:_TAG_BYTES], signed[_TAG_BYTES:]
        if not hmac.compare_digest(tag, self._tag(kind, job_id, spec, body)):
            raise UnknownJob("A record of this job was not written by this service")
        return msgspec.msgpack.decode(body, type=kind)

    def _tag(self, kind: type, job_id: str, spec: bytes, body: bytes) -> bytes:
        return self.digest(_LABELS[kind], job_id.encode(), spec, body)

    def digest(self, *parts: bytes) -> bytes:
        """A keyed digest of 32 bytes: a plain one of a short secret could be guessed."""
        return self.hasher(*parts).digest()

    def hasher(self, *parts: bytes) -> "hmac.HMAC":
        """A digest of a body that arrives in pieces."""
        hasher = hmac.new(self._digest_key, digestmod="sha256")
        for part in parts:
            hasher.update(len(part).to_bytes(8, "big") + part)
        return hasher


def _decoded(plain: bytes) -> AnyJob:
    try:
        return check_needs(_decode(plain))
    except msgspec.ValidationError as exc:
        raise unreadable_error(msgspec.msgpack.decode(plain)) from exc
