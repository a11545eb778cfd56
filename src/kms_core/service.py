"""Kms: the one interface to keys. Policy, audit, metrics and key choice happen here, once, for every front.

Knows no HTTP, no queue and no path: files come as open descriptors. Backends do the wrapping, the envelope
does the format.
"""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Literal

from kms_core import audit, metrics
from kms_core.audit import Audit, Record
from kms_core.backends import Health, Unreachable
from kms_core.context import Context
from kms_core.envelope import binding, disk, header, sealing, slabs, stream
from kms_core.envelope.binding import Bound, KeyRef
from kms_core.envelope.header import Header, Limits
from kms_core.envelope.slabs import STEADY, Extent, Pace
from kms_core.envelope.x25519 import NoMatch
from kms_core.errors import (
    ContextRequired,
    DataKeysUnsupported,
    DecryptFailed,
    ForeignRefused,
    InvalidRequest,
    KmsError,
)
from kms_core.keyring import Key, Keyring
from kms_core.policy import Policy, Principal

Origin = Literal["service", "foreign"]


@dataclass(frozen=True, slots=True)
class Sealed:
    """A ciphertext and the key that seals it."""

    ciphertext: bytes = field(repr=False)
    key: KeyRef


@dataclass(frozen=True, slots=True)
class Opened:
    """A plaintext, the key that opened it, and whether this service made the file."""

    plaintext: bytes = field(repr=False)
    key: KeyRef
    origin: Origin


@dataclass(frozen=True, slots=True)
class DataKey:
    """Random bytes and the same bytes sealed."""

    plaintext: bytes = field(repr=False)
    ciphertext: bytes = field(repr=False)
    key: KeyRef


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """The secrets of one file, for the job layer, which moves payloads that do not fit in memory."""

    file_key: bytes = field(repr=False)
    nonce: bytes = field(repr=False)
    key: KeyRef
    origin: Origin

    @property
    def payload_key(self) -> bytes:
        return stream.payload_key(self.file_key, self.nonce)


@dataclass(frozen=True, slots=True)
class Rules:
    """What settings decide about single calls."""

    require_context: bool = False
    limits: Limits = header.SYNC_LIMITS


class Kms:
    """encrypt, decrypt, rewrap, data keys and health over whatever backends the keyring holds."""

    def __init__(self, keyring: Keyring, policy: Policy, trail: Audit, rules: Rules) -> None:
        self.keyring = keyring
        self._policy = policy
        self._audit = trail
        self._rules = rules

    def encrypt(
        self, who: Principal, plaintext: bytes, context: Context, *, key_id: str | None = None
    ) -> Sealed:
        """Seal bytes in memory. Raises ContextRequired, UnknownKey, Forbidden, BackendUnavailable."""
        with self._recorded("encrypt", who, context, key_id, bytes_in=len(plaintext)) as call:
            key, ref = self._for_sealing(call)
            ciphertext = sealing.seal(plaintext, key.backend, ref, context, key.wraps(who.tenant))
            call.record.bytes_out = len(ciphertext)
            return Sealed(ciphertext, ref)

    def decrypt(
        self, who: Principal, ciphertext: bytes, context: Context, *, key_id: str | None = None
    ) -> Opened:
        """Open bytes in memory. Raises NotACiphertext, UnknownKey, Refused, DecryptFailed."""
        with self._recorded("decrypt", who, context, key_id, bytes_in=len(ciphertext)) as call:
            head = header.parse(ciphertext, self._rules.limits)
            found = self._unwrap(call, head)
            plaintext = sealing.open_(ciphertext, head, found.file_key)
            call.record.bytes_out = len(plaintext)
            return Opened(plaintext, found.key, found.origin)

    def generate_data_key(
        self, who: Principal, size_bytes: int, context: Context, *, key_id: str | None = None
    ) -> DataKey:
        """Random bytes, in clear and sealed. Raises DataKeysUnsupported where settings refuse them."""
        with self._recorded("generate_data_key", who, context, key_id) as call:
            key, ref = self._for_sealing(call)
            if not key.backend.data_keys:
                raise DataKeysUnsupported
            plaintext = os.urandom(size_bytes)
            ciphertext = sealing.seal(plaintext, key.backend, ref, context, key.wraps(who.tenant))
            call.record.bytes_out = len(ciphertext)
            return DataKey(plaintext, ciphertext, ref)

    def rewrap(
        self,
        who: Principal,
        ciphertext: bytes,
        context: Context,
        *,
        new_context: Context | None = None,
        key_id: str | None = None,
    ) -> Sealed:
        """A new header around the same payload; ``new_context=None`` keeps the old (see ``rewrap_file``)."""
        with self._recorded("rewrap", who, context, None, bytes_in=len(ciphertext)) as call:
            head = header.parse(ciphertext, self._rules.limits)
            rewrapped = self._rewrapped(call, head, new_context, key_id)
            return Sealed(rewrapped.ciphertext + ciphertext[head.size :], rewrapped.key)

    # -- files: the job layer moves the payload, the header is made and opened here -----------------

    def encrypt_file(  # noqa: PLR0913 -- two files, a key and a context
        self,
        who: Principal,
        source: Extent,
        target_fd: int,
        context: Context,
        *,
        key_id: str | None = None,
        pace: Pace = STEADY,
    ) -> KeyRef:
        """Seal a file into another, in parallel. On any error the target is waste: give it no name.

        Raises what ``encrypt`` raises, and InvalidRequest if the source changes meanwhile, SpoolFull.
        """
        with self._recorded("encrypt", who, context, key_id, bytes_in=source.size) as call:
            key, ref = self._for_sealing(call)
            padded = source.size >= sealing.PAD_FROM_BYTES
            others = key.wraps(who.tenant)
            started = sealing.begin(key.backend, ref, context, padded=padded, others=others)
            disk.write_all(target_fd, memoryview(started.head), 0)
            slabs.seal_file(started.payload_key, source, target_fd, len(started.head), pace)
            call.record.bytes_out = len(started.head) + stream.sealed_size(source.size)
            return ref

    def decrypt_file(  # noqa: PLR0913 -- as encrypt_file
        self,
        who: Principal,
        source: Extent,
        target_fd: int | None,
        context: Context,
        *,
        key_id: str | None = None,
        pace: Pace = STEADY,
    ) -> Unwrapped:
        """Open a file into another, in parallel; with no target, only authenticate all of it.

        The target holds the truth only once this has returned: give it a name then. Raises what ``decrypt``
        raises, SpoolFull, and what ``pace.check`` raises.
        """
        with self._recorded("decrypt", who, context, key_id, bytes_in=source.size) as call:
            head = header.read(source.fd, header.FILE_LIMITS, source.offset)
            found = self._unwrap(call, head)
            at = head.payload_offset
            payload = Extent(source.fd, source.size - at, source.offset + at)
            if target_fd is None:
                slabs.verify_file(found.payload_key, payload, pace)
            else:
                slabs.open_file(found.payload_key, payload, target_fd, pace=pace)
            call.record.bytes_out = stream.plaintext_size(payload.size)
            return found

    def adopt_file(
        self,
        who: Principal,
        found: Unwrapped,
        context: Context,
        *,
        size_bytes: int,
        key_id: str | None = None,
    ) -> bytes:
        """A header for a payload that the spool already sealed: one AEAD pass for an upload, not three."""
        with self._recorded("encrypt", who, context, key_id, bytes_in=size_bytes) as call:
            key, ref = self._for_sealing(call)
            padded = size_bytes >= sealing.PAD_FROM_BYTES
            return sealing.write_header(
                found.file_key,
                found.nonce,
                key.backend,
                key=ref,
                context=context,
                padded=padded,
                others=key.wraps(who.tenant),
            )

    def rewrap_file(  # noqa: PLR0913 -- two keys, two contexts
        self,
        who: Principal,
        head: Header,
        context: Context,
        *,
        new_context: Context | None,
        key_id: str | None,
        size_bytes: int,
    ) -> Sealed:
        """The new header of a rewrap; ``Sealed.ciphertext`` is the header alone.

        Needs decrypt under the old key and encrypt under the new. It revokes nobody: who had the file key
        still has it. A foreign file is refused: its payload was never bound to an origin.
        """
        with self._recorded("rewrap", who, context, None, bytes_in=size_bytes) as call:
            return self._rewrapped(call, head, new_context, key_id)

    # -- health -------------------------------------------------------------------------------------

    def health_check(self) -> Health:
        """A real wrap and unwrap by the default key's backend."""
        backend = self.keyring.default.backend
        health = backend.health_check()
        metrics.BACKEND_UP.labels(backend.name).set(health.healthy)
        return health

    def for_job(self) -> "Kms":
        """The same service for one run of a bulk job: a peer is asked a few times, not once an item."""
        return Kms(self.keyring.for_job(), self._policy, self._audit, self._rules)

    def bound(self, who: Principal) -> "BoundKms":
        """The two-argument form, for a caller that acts as one principal."""
        return BoundKms(self, who)

    # -- inside -------------------------------------------------------------------------------------

    def _rewrapped(
        self, call: "_Call", head: Header, new_context: Context | None, key_id: str | None
    ) -> Sealed:
        found = self._unwrap(call, head, "decrypt")
        if found.origin == "foreign":
            raise InvalidRequest("A foreign file cannot be rewrapped: decrypt it and encrypt it anew")
        call.context = call.context if new_context is None else new_context
        call.key_id = key_id or found.key.key_id
        key, ref = self._for_sealing(call, "encrypt")
        padded = any(stanza.type == binding.PAD for stanza in head.stanzas)
        rendered = sealing.write_header(
            found.file_key,
            found.nonce,
            key.backend,
            key=ref,
            context=call.context,
            padded=padded,
            others=key.wraps(call.who.tenant),
        )
        call.record.bytes_out = call.record.bytes_in - head.size + len(rendered)
        return Sealed(rendered, ref)

    def _for_sealing(self, call: "_Call", operation: str | None = None) -> tuple[Key, KeyRef]:
        if self._rules.require_context and not call.context:
            raise ContextRequired
        call.context.not_after()
        key = self.keyring.named(call.key_id)
        ref = key.ref(call.who.tenant)
        call.names(ref)
        self._policy.require(call.who, operation or call.record.operation, key.key_id, call.context)
        return key, ref

    def _unwrap(self, call: "_Call", head: Header, operation: str | None = None) -> Unwrapped:
        """Key choice by the name in the file, then policy, and only then any unwrap."""
        bound = binding.read(head)
        key = self.keyring.named(bound.key_id if bound else call.key_id)
        ref = key.ref(call.who.tenant)
        call.names(
            replace(ref, version=bound.key_version) if bound else ref, "service" if bound else "foreign"
        )
        self._policy.require(call.who, operation or call.record.operation, key.key_id, call.context)
        if bound is None:
            return self._unwrap_foreign(call, head, key)
        if call.key_id not in {None, bound.key_id}:
            raise DecryptFailed
        file_key, ref = _file_key_of(head, key.openers(call.who.tenant, bound), bound, call.context)
        call.names(ref)
        limit = call.context.not_after()
        if limit is not None and datetime.now(UTC) > limit:
            raise DecryptFailed
        return Unwrapped(file_key, head.nonce, ref, "service")

    @staticmethod
    def _unwrap_foreign(call: "_Call", head: Header, key: Key) -> Unwrapped:
        if not key.accept_foreign:
            raise ForeignRefused
        if call.context:  # given, and the file binds none
            raise DecryptFailed
        native = key.native
        if native is None:
            raise ForeignRefused("The key has no age identities, and a foreign file is for one of those")
        file_key, ref = sealing.foreign_file_key(head, native, key.refs(call.who.tenant))
        call.names(ref, "foreign")
        return Unwrapped(file_key, head.nonce, ref, "foreign")

    @contextmanager
    def _recorded(
        self, operation: str, who: Principal, context: Context, key_id: str | None, *, bytes_in: int = 0
    ) -> Iterator["_Call"]:
        """One audit record and one count per operation, whatever its end; appended before the result."""
        call = _Call(operation, who, context, key_id, bytes_in=bytes_in)
        try:
            yield call
        except KmsError as exc:
            self._append(call, exc.code)
            raise
        except BaseException:
            self._append(call, KmsError.code)
            raise
        self._append(call, "ok")

    def _append(self, call: "_Call", result: str) -> None:
        record = call.record
        seconds = time.perf_counter() - call.started
        record.result, record.duration_us = result, round(seconds * 1e6)
        try:
            self._audit.append(record)
        except KmsError:
            metrics.AUDIT_EVENTS.labels("failed").inc()
            metrics.count_operation(record, "audit_unavailable", seconds)
            raise
        metrics.AUDIT_EVENTS.labels("ok").inc()
        metrics.count_operation(record, result, seconds)


def _file_key_of(
    head: Header, openers: Iterable[sealing.Wrap], bound: Bound, context: Context
) -> tuple[bytes, KeyRef]:
    """By the first backend that answers. Only silence passes on to the next one, never a refusal."""
    silent: Unreachable | None = None
    for backend, ref in openers:
        try:
            return sealing.file_key_of(head, backend, ref, context=context, named=bound.key_version), ref
        except NoMatch:
            continue
        except Unreachable as exc:
            metrics.BACKEND_FAILOVERS.labels(ref.backend).inc()
            silent = exc
    raise silent or DecryptFailed


@dataclass(frozen=True, slots=True)
class BoundKms:
    """``encrypt(plaintext, context)``, ``decrypt(ciphertext, context)`` and the rest, as one principal."""

    kms: Kms
    who: Principal

    def encrypt(self, plaintext: bytes, context: Context) -> bytes:
        return self.kms.encrypt(self.who, plaintext, context).ciphertext

    def decrypt(self, ciphertext: bytes, context: Context) -> bytes:
        return self.kms.decrypt(self.who, ciphertext, context).plaintext

    def generate_data_key(self, size_bytes: int, context: Context) -> DataKey:
        return self.kms.generate_data_key(self.who, size_bytes, context)

    def health_check(self) -> bool:
        return self.kms.health_check().healthy


class _Call:
    """The operation under way: who asked for what, its record, and when it began."""

    __slots__ = ("context", "key_id", "record", "started", "who")

    def __init__(
        self, operation: str, who: Principal, context: Context, key_id: str | None, *, bytes_in: int
    ) -> None:
        self.started = time.perf_counter()
        self.who, self.context, self.key_id = who, context, key_id
        self.record = Record(
            time=audit.now(),
            operation=operation,
            principal=who.name,
            tenant=who.tenant,
            credential=who.credential,
            request_id=audit.request_id.get(),
            job_id=audit.job_id.get(),
            context_keys=context.keys,
            bytes_in=bytes_in,
        )

    def names(self, key: KeyRef, origin: str = "") -> None:
        """Note the key, as soon as it is known, so that refusals name it too."""
        self.record.key_id, self.record.key_version = key.key_id, key.version
        self.record.backend, self.record.origin = key.backend, origin
