"""Seals the specification of a job: write access to Redis cannot change what a job does."""

import hmac
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from kms_core.age.kdf import KEY_BYTES, hkdf
from kms_core.jobs.ends import SignedEnd, SignedSplit
from kms_core.jobs.model import Checkpoint, Commit
from kms_core.jobs.spec import AnyJob, JobSpec, RecordTooNew, check_needs, unreadable_error
from kms_protocol.errors import UnknownJob

_decode: Final[Callable[[bytes], AnyJob]] = msgspec.msgpack.Decoder(AnyJob).decode
_VERSION: Final = b"\x01"
_VERSIONS: Final = 16  # as in the scripts: other bytes are no version
_COMMIT: Final = b"commit"
_LOG: Final = b"log"
_END: Final = b"end"
_SPLIT: Final = b"split"
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

    def sign_commit(self, job_id: str, commit: Commit, spec: bytes) -> bytes:
        """A commit record as it rests in Redis: behind a MAC, or others could have a file put in place.

        ``spec`` is the digest of the sealed record, so that it counts for no other record of this id.
        """
        return self._signed(_COMMIT, job_id, spec, msgspec.json.encode(commit))

    def open_commit(self, job_id: str, signed: bytes, spec: bytes) -> Commit:
        """The commit record. UnknownJob if it was not written here for this job id and sealed record."""
        return msgspec.json.decode(self._verified(_COMMIT, job_id, spec, signed), type=Commit)

    def sign_log(self, job_id: str, log: Checkpoint, spec: bytes) -> bytes:
        """Sign the checkpoint of a part for Redis, as a commit record is."""
        return self._signed(_LOG, job_id, spec, msgspec.msgpack.encode(log))

    def open_log(self, job_id: str, signed: bytes, spec: bytes) -> Checkpoint:
        """The log of a part. UnknownJob if it was not written here for this job id and sealed record."""
        return msgspec.msgpack.decode(self._verified(_LOG, job_id, spec, signed), type=Checkpoint)

    def sign_end(self, job_id: str, end: SignedEnd, spec: bytes) -> bytes:
        """Sign the end of a job for Redis, so that write access to Redis cannot forge success."""
        return self._signed(_END, job_id, spec, msgspec.msgpack.encode(end))

    def open_end(self, job_id: str, signed: bytes, spec: bytes) -> SignedEnd:
        """The end of a job. UnknownJob if it was not written here for this job id and sealed record."""
        return msgspec.msgpack.decode(self._verified(_END, job_id, spec, signed), type=SignedEnd)

    def sign_split(self, job_id: str, split: SignedSplit, spec: bytes) -> bytes:
        """Sign the split of a job for Redis, so that write access to Redis cannot leave out parts."""
        return self._signed(_SPLIT, job_id, spec, msgspec.msgpack.encode(split))

    def open_split(self, job_id: str, signed: bytes, spec: bytes) -> SignedSplit:
        """Verify the split of a job. Raises UnknownJob if not signed for this job id and sealed record."""
        return msgspec.msgpack.decode(self._verified(_SPLIT, job_id, spec, signed), type=SignedSplit)

    def _signed(self, label: bytes, job_id: str, spec: bytes, body: bytes) -> bytes:
        return self._tag(label, job_id, spec, body) + body

    def _verified(self, label: bytes, job_id: str, spec: bytes, signed: bytes) -> bytes:
        tag, body = signed[:_TAG_BYTES], signed[_TAG_BYTES:]
        if not hmac.compare_digest(tag, self._tag(label, job_id, spec, body)):
            raise UnknownJob("A record of this job was not written by this service")
        return body

    def _tag(self, label: bytes, job_id: str, spec: bytes, body: bytes) -> bytes:
        return self.digest(label, job_id.encode(), spec, body)

    def digest(self, *parts: bytes) -> bytes:
        """A keyed digest of 32 bytes: a plain one of a short secret could be guessed."""
        return self.hasher(*parts).digest()

    @staticmethod
    def is_equal(given: bytes, own: bytes) -> bool:
        """Compare without telling by the time where they differ."""
        return hmac.compare_digest(given, own)

    def hasher(self, *parts: bytes) -> "hmac.HMAC":
        """The same, for a body that arrives in pieces."""
        hasher = hmac.new(self._digest_key, digestmod="sha256")
        for part in parts:
            hasher.update(len(part).to_bytes(8, "big") + part)
        return hasher


def _decoded(plain: bytes) -> AnyJob:
    try:
        return check_needs(_decode(plain))
    except msgspec.ValidationError as exc:
        raise unreadable_error(msgspec.msgpack.decode(plain)) from exc


SECRET_BYTES: Final = KEY_BYTES
