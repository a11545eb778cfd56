"""Kms: the one interface to keys. Policy, audit, metrics and key choice happen here, once, for every front.

Knows no HTTP, no queue and no path: files come as open descriptors. Backends do the wrapping, the envelope
does the format.
"""

import os
from dataclasses import dataclass
from typing import Final, NoReturn

from kms_core.age import header, stream
from kms_core.age.header import Header
from kms_core.audit import AuditWriter
from kms_core.auth.policy import Policy, Principal
from kms_core.backends import Health
from kms_core.envelope import binding, sealing
from kms_core.envelope.binding import KeyRef
from kms_core.key_selection import KeySelector, SelectionRules, by_first, check_not_over
from kms_core.keyring import Keyring
from kms_core.observability import metrics
from kms_core.observability.usage import UsageCounters
from kms_core.operation import Operation, OperationRecorder
from kms_core.payload import parallel
from kms_core.payload.files import RangeSource, RangeTarget
from kms_core.payload.parallel import STEADY, ParallelOptions
from kms_core.results import DataKey, KeyVersionStatus, Opened, Origin, Sealed, Unwrapped, WrappedFileKey
from kms_protocol.context import Context
from kms_protocol.errors import (
    DataKeysUnsupported,
    DecryptFailed,
    Forbidden,
    ForeignRefused,
    InvalidRequest,
    KmsError,
    UnknownKey,
)

_UNPROVEN: Final = (
    "Who made the file cannot be proven without its payload, and this key accepts no such file: "
    "open it with kms decrypt or kms decrypt-file, which see all of it"
)


class Kms:
    """encrypt, decrypt, rewrap, data keys and health over whatever backends the keyring holds."""

    def __init__(
        self,
        keyring: Keyring,
        policy: Policy,
        trail: AuditWriter,
        rules: SelectionRules,
        tally: UsageCounters | None = None,
    ) -> None:
        self.keyring = keyring
        self.tally = tally or UsageCounters()
        self.policy = policy
        self.trail = trail
        self._calls = OperationRecorder(trail, self.tally)
        self._rules = rules
        self._choice = KeySelector(keyring, policy, trail, rules)

    def encrypt(
        self, who: Principal, plaintext: bytes, context: Context, *, key_id: str | None = None
    ) -> Sealed:
        """Seal bytes in memory. Raises ContextRequired, UnknownKey, Forbidden, BackendUnavailable."""
        with self._calls.recorded("encrypt", who, context, key_id, bytes_in=len(plaintext)) as call:
            key, ref = self._choice.for_sealing(call)
            ciphertext = sealing.seal(plaintext, key.backend, ref, context, key.wraps(who.tenant))
            call.record.bytes_out = len(ciphertext)
            return Sealed(ciphertext, ref)

    def decrypt(
        self, who: Principal, ciphertext: bytes, context: Context, *, key_id: str | None = None
    ) -> Opened:
        """Open bytes in memory. Raises NotACiphertext, UnknownKey, Refused, DecryptFailed."""
        with self._calls.recorded("decrypt", who, context, key_id, bytes_in=len(ciphertext)) as call:
            head = header.parse(ciphertext, self._rules.limits)
            found = self._choice.unwrap(call, head)
            plaintext = sealing.open_(ciphertext, head, found.file_key)
            call.record.bytes_out = len(plaintext)
            return Opened(plaintext, found.key, found.origin)

    def generate_data_key(
        self, who: Principal, size_bytes: int, context: Context, *, key_id: str | None = None
    ) -> DataKey:
        """Random bytes, in clear and sealed. Raises DataKeysUnsupported where settings refuse them."""
        with self._calls.recorded("generate_data_key", who, context, key_id) as call:
            key, ref = self._choice.for_sealing(call)
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
        with self._calls.recorded("rewrap", who, context, None, bytes_in=len(ciphertext)) as call:
            head = header.parse(ciphertext, self._rules.limits)
            rewrapped = self._rewrapped(call, head, new_context, key_id)
            return Sealed(rewrapped.ciphertext + ciphertext[head.size :], rewrapped.key)

    def reseal(
        self,
        who: Principal,
        ciphertext: bytes,
        context: Context,
        *,
        new_context: Context | None = None,
        key_id: str | None = None,
    ) -> Sealed:
        """The plaintext under a new file key, in memory (see ``reseal_file``)."""
        with self._calls.recorded("reseal", who, context, None, bytes_in=len(ciphertext)) as call:
            head = header.parse(ciphertext, self._rules.limits)
            call.key_id = None if binding.read(head) else key_id
            opening, closing = self._choice.rewrapping(call, head, new_context, key_id)
            found = self._choice.unwrap(call, head, opening)
            key, ref = self._choice.moving(call, found, new_context, key_id, closing)
            plaintext = sealing.open_(ciphertext, head, found.file_key)
            resealed = sealing.seal(plaintext, key.backend, ref, call.context, key.wraps(who.tenant))
            call.record.bytes_out = len(resealed)
            return Sealed(resealed, ref)

    # -- file keys: an age tool makes the header and the payload, its plugin asks here -----------------

    def wrap(
        self, who: Principal, file_key: bytes, context: Context, *, key_id: str | None = None
    ) -> WrappedFileKey:
        """Wrap a 16-byte file key of the caller's. Raises what ``encrypt`` raises, and InvalidRequest.

        The caller can seal under it for ever: this is a permission of its own.
        """
        with self._calls.recorded("wrap", who, context, key_id, bytes_in=len(file_key)) as call:
            if len(file_key) != header.FILE_KEY_BYTES:
                raise InvalidRequest(f"A file key has {header.FILE_KEY_BYTES} bytes")
            key, ref = self._choice.for_sealing(call)
            stanza = sealing.hand_over(file_key, key.backend, ref, context, key.wraps(who.tenant))
            text = header.render_stanza(stanza)
            call.record.bytes_out = len(text)
            return WrappedFileKey(text, ref)

    def unwrap(
        self, who: Principal, stanzas: bytes, context: Context, *, key_id: str | None = None
    ) -> Unwrapped:
        """The file key of stanzas of ours, as text; bare ones of other age tools are not for this.

        Without its own stanzas beside it, nothing would hold a native one to its context. The answer's nonce
        is empty, and its origin ``foreign`` where it cannot be proven, if the key accepts such files. Raises
        what ``decrypt`` raises.
        """
        with self._calls.recorded("unwrap", who, context, key_id, bytes_in=len(stanzas)) as call:
            limits = self._rules.limits
            given = header.unbundled(header.parse_stanzas(stanzas, limits), limits)
            bound = binding.read_stanzas(given)
            if bound is None or call.key_id not in {None, bound.key_id}:
                raise DecryptFailed
            key = self._choice.key(call, bound.key_id, file=(bound.key_version, "service"))
            (file_key, proven), ref = by_first(
                key.openers(who.tenant, bound),
                lambda backend, ref: sealing.take_over(given, backend, ref, context=context, bound=bound),
            )
            origin: Origin = "service" if proven else "foreign"
            call.names(ref, origin)
            check_not_over(context)
            if not proven and not key.accept_foreign:
                raise ForeignRefused(_UNPROVEN)
            call.record.bytes_out = len(file_key)
            return Unwrapped(file_key, b"", ref, origin)

    # -- files: the job layer moves the payload, the header is made and opened here -----------------

    def encrypt_file(  # noqa: PLR0913 -- two files, a key and a context
        self,
        who: Principal,
        source: RangeSource,
        target: RangeTarget,
        context: Context,
        *,
        key_id: str | None = None,
        pace: ParallelOptions = STEADY,
    ) -> KeyRef:
        """Seal a file into another, in parallel. On any error the target is waste: give it no name.

        Raises what ``encrypt`` raises, and InvalidRequest if the source changes meanwhile, SpoolFull.
        """
        with self._calls.recorded("encrypt", who, context, key_id, bytes_in=source.size) as call:
            key, ref = self._choice.for_sealing(call)
            padded = source.size >= sealing.PAD_FROM_BYTES
            others = key.wraps(who.tenant)
            started = sealing.begin(key.backend, ref, context, padded=padded, others=others)
            size = len(started.head) + stream.sealed_size(source.size)
            target.reserve(size)
            target.write_at(memoryview(started.head), 0)
            parallel.seal_file(started.payload_key, source, target, len(started.head), pace)
            call.record.bytes_out = size
            return ref

    def decrypt_file(  # noqa: PLR0913 -- as encrypt_file
        self,
        who: Principal,
        source: RangeSource,
        target: RangeTarget | None,
        context: Context,
        *,
        key_id: str | None = None,
        pace: ParallelOptions = STEADY,
    ) -> Unwrapped:
        """Open a file into another, in parallel; with no target, only authenticate all of it.

        The target holds the truth only once this has returned: give it a name then. Raises what ``decrypt``
        raises, SpoolFull, and what ``pace.check`` raises.
        """
        with self._calls.recorded("decrypt", who, context, key_id, bytes_in=source.size) as call:
            head = header.read_by(source.read_at, header.FILE_LIMITS)
            found = self._choice.unwrap(call, head)
            payload = source.tail(head.payload_offset)
            if target is None:
                parallel.verify_file(found.payload_key, payload, pace)
            else:
                parallel.open_file(found.payload_key, payload, target, pace=pace)
            call.record.bytes_out = stream.plaintext_size(payload.size)
            return found

    def reseal_file(  # noqa: PLR0913 -- two files, two keys, two contexts
        self,
        who: Principal,
        source: RangeSource,
        target: RangeTarget,
        context: Context,
        *,
        new_context: Context | None,
        key_id: str | None,
        pace: ParallelOptions = STEADY,
    ) -> KeyRef:
        """A new file key and the payload sealed again: for a compromised key, or a reader who was removed.

        Permissions as ``rewrap_file``. A foreign file is taken where its key accepts those; ``key_id`` names
        the key that opens it, too. The target as in ``decrypt_file``; raises what ``decrypt`` and ``encrypt``
        raise, SpoolFull, and what ``pace.check`` raises.
        """
        with self._calls.recorded("reseal", who, context, None, bytes_in=source.size) as call:
            head = header.read_by(source.read_at, header.FILE_LIMITS)
            call.key_id = None if binding.read(head) else key_id
            opening, closing = self._choice.rewrapping(call, head, new_context, key_id)
            found = self._choice.unwrap(call, head, opening)
            key, ref = self._choice.moving(call, found, new_context, key_id, closing)
            payload = source.tail(head.payload_offset)
            padded = stream.plaintext_size(payload.size) >= sealing.PAD_FROM_BYTES
            others = key.wraps(who.tenant)
            started = sealing.begin(key.backend, ref, call.context, padded=padded, others=others)
            target.reserve(len(started.head) + payload.size)
            target.write_at(memoryview(started.head), 0)
            keys = found.payload_key, started.payload_key
            parallel.reseal_file(keys, payload, target, len(started.head), pace)
            call.record.bytes_out = len(started.head) + payload.size
            return ref

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
        with self._calls.recorded("encrypt", who, context, key_id, bytes_in=size_bytes) as call:
            key, ref = self._choice.for_sealing(call)
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
        with self._calls.recorded("rewrap", who, context, None, bytes_in=size_bytes) as call:
            return self._rewrapped(call, head, new_context, key_id)

    def standing(self, who: Principal, head: Header, key_id: str | None) -> KeyVersionStatus | None:
        """Which key version a file's header names, and whether a rewrap to ``key_id`` would name the same.

        Nothing is opened, so nothing is proven. None for a foreign file. Raises DecryptFailed, UnknownKey.
        """
        bound = binding.read(head)
        if bound is None:
            return None
        if not self.policy.sees(who, bound.key_id):
            raise UnknownKey
        named, target = self.keyring.named(bound.key_id), self.keyring.named(key_id or bound.key_id)
        known = any(version.version == bound.key_version for version in named.backend.versions())
        native = any(not stanza.type.startswith(binding.OWN_PREFIX) for stanza in head.stanzas)
        newest = target.key_id == bound.key_id and target.seals_as(who.tenant, bound, native=native)
        return KeyVersionStatus(bound.key_id, bound.key_version if known else "", newest)

    def refused(self, who: Principal, operation: str, context: Context, error: KmsError) -> NoReturn:
        """Record, and raise, what was refused before a key was known: a file whose header cannot be read."""
        with self._calls.recorded(operation, who, context, None):
            raise error

    # -- keys and health ----------------------------------------------------------------------------

    def rotate(self, who: Principal, key_id: str) -> KeyRef:
        """A new version of a key in every backend that seals with it; old versions decrypt.

        Rotation protects what is sealed from now on: rewrap moves old files, and neither revokes a reader.
        The audit trail has an intent before it and an outcome after it; where one backend of several fails,
        the others may have a new version. Raises UnknownKey, Forbidden, BackendUnavailable, RateLimited.
        """
        with self._calls.recorded("rotate", who, Context(), key_id) as call:
            key = self._choice.key(call, key_id)
            with self._rules.rotations.spent(key, who):
                self._calls.sets_out(call)
                for backend in key.sealing:
                    backend.rotate()
            ref = key.ref(who.tenant)
            call.names(ref)
            return ref

    def allow(
        self, who: Principal, operation: str, key_id: str | None = None, context: Context | None = None
    ) -> None:
        """Ask for what is done with no bytes yet: a job, a list. None is not known yet, and not asked for.

        Raises Forbidden, UnknownKey, and Unavailable if it cannot be told now. Refusals are recorded.
        """
        try:
            self.policy.require(who, operation, key_id, context)
        except (Forbidden, UnknownKey) as exc:
            self.refused(who, operation, context or Context(), exc)

    def health_check(self) -> Health:
        """A real wrap and unwrap by the default key's backend."""
        backend = self.keyring.default.backend
        health = backend.health_check()
        metrics.BACKEND_UP.labels(backend.name).set(health.healthy)
        return health

    def for_job(self) -> "Kms":
        """The same service for one run of a bulk job: a peer is asked a few times, not once an item."""
        return self.with_keyring(self.keyring.for_job())

    def with_keyring(self, keyring: Keyring) -> "Kms":
        """The same service over other keys."""
        return Kms(keyring, self.policy, self.trail, self._rules, self.tally)

    def bound(self, who: Principal) -> "BoundKms":
        """The two-argument form, for a caller that acts as one principal."""
        return BoundKms(self, who)

    def _rewrapped(
        self, call: Operation, head: Header, new_context: Context | None, key_id: str | None
    ) -> Sealed:
        opening, closing = self._choice.rewrapping(call, head, new_context, key_id)
        found = self._choice.unwrap(call, head, opening)
        if found.origin == "foreign":
            raise InvalidRequest("A foreign file cannot be rewrapped: decrypt it and encrypt it anew")
        key, ref = self._choice.moving(call, found, new_context, key_id, closing)
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
