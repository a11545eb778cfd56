"""``Kms``: all operations with keys. Policy, audit, metrics and key selection happen here, for every process.

Backends wrap file keys, ``envelope`` makes the format, ``payload`` moves the bytes.
"""

import os
from collections.abc import Sequence
from typing import NoReturn

from kms_core import audit
from kms_core.age import header, stream
from kms_core.age.header import Header
from kms_core.auth.policy import Policy, Principal, Remembered
from kms_core.backends import Health, NotRotated, table_of
from kms_core.envelope import binding, sealing
from kms_core.envelope.binding import KeyRef
from kms_core.envelope.sealing import Sealing
from kms_core.key_selection import KeySelector, SelectionRules
from kms_core.keyring import BackendKey, Keyring
from kms_core.operation import (
    DataKey,
    KeyVersionStatus,
    Opened,
    Operation,
    OperationRecorder,
    Sealed,
    Unwrapped,
    UsageCounters,
    WrappedFileKey,
)
from kms_core.payload import parallel
from kms_core.payload.files import RangeSource
from kms_core.payload.parallel import DEFAULTS, ParallelOptions
from kms_core.payload.streaming import FileToFile, InMemory
from kms_protocol import errors
from kms_protocol.context import Context
from kms_protocol.errors import DataKeysUnsupported, Forbidden, InvalidRequest, KmsError, UnknownKey
from kms_protocol.wire import JobKind


class Kms:
    """Encryption, decryption, rewrap, data keys and rotation with the keys of a keyring.

    ``who`` is the caller. ``key_id`` None means the default key. Each operation appends one audit record
    before it returns, and raises AuditUnavailable in place of a result without one. Beside the errors named
    below operations raise Forbidden, UnknownKey, BackendUnavailable, InvalidContext; those that seal raise
    ContextRequired.

    ``encrypt``, ``decrypt``, ``rewrap`` and ``reseal`` take bytes, or a ``FileToFile``: its target receives
    the result, and the bytes of the result are empty.
    """

    def __init__(
        self,
        keyring: Keyring,
        policy: Policy,
        audit_log: audit.AuditWriter,
        rules: SelectionRules,
        usage: UsageCounters | None = None,
    ) -> None:
        self.keyring = keyring
        self.usage = usage or UsageCounters()
        self.policy = policy
        self.audit_log = audit_log
        self._recorder = OperationRecorder(audit_log, self.usage)
        self._rules = rules
        self._selector = KeySelector(keyring, policy, audit_log, rules)

    def encrypt(
        self, who: Principal, plaintext: bytes | FileToFile, context: Context, *, key_id: str | None = None
    ) -> Sealed:
        """Seal a plaintext into an age file."""
        data = _data(plaintext)
        size = data.size
        with self._recorder.recorded("encrypt", who, context, key_id, bytes_in=size) as call:
            started, key = self._begin(call, padded=size >= sealing.PAD_FROM_BYTES)
            head = started.head
            ciphertext = data.seal(head, started.payload_key)
            call.record.bytes_out = len(head) + stream.sealed_size(size)
            return Sealed(ciphertext, key, call.note_file(started.nonce))

    def decrypt(
        self, who: Principal, ciphertext: bytes | FileToFile, context: Context, *, key_id: str | None = None
    ) -> Opened:
        """Open an age file. Raises NotACiphertext, TooLarge, DecryptFailed, ForeignRefused."""
        data = _data(ciphertext)
        with self._recorder.recorded("decrypt", who, context, key_id, bytes_in=data.size) as call:
            head = data.read_header(self._rules.limits)
            file_id = call.note_file(head.nonce)
            found = self._selector.unwrap(call, head)
            plaintext = data.open(head.payload_offset, found.payload_key)
            call.record.bytes_out = stream.plaintext_size(data.size - head.payload_offset)
            return Opened(plaintext, found.key, found.origin, file_id)

    def rewrap(
        self,
        who: Principal,
        ciphertext: bytes | FileToFile,
        context: Context,
        *,
        new_context: Context | None = None,
        key_id: str | None = None,
    ) -> Sealed:
        """Write a new header for the same payload; without ``new_context`` the file keeps its context.

        Revokes no reader: the file key stays the same. Needs decrypt under the old key and encrypt under the
        new one, or the permission ``rewrap`` where key and context stay. Raises as ``decrypt``, and
        InvalidRequest for a foreign file: its payload was never bound to an origin.
        """
        data = _data(ciphertext)
        with self._recorder.recorded("rewrap", who, context, None, bytes_in=data.size) as call:
            head = data.read_header(self._rules.limits)
            made = self._rewrapped(call, head, new_context, key_id)
        return Sealed(data.replace_header(head.size, made.ciphertext), made.key, made.file_id)

    def reseal(
        self,
        who: Principal,
        ciphertext: bytes | FileToFile,
        context: Context,
        *,
        new_context: Context | None = None,
        key_id: str | None = None,
    ) -> Sealed:
        """Seal the payload again under a new file key, for a compromised key or a reader who was removed.

        Permissions and errors as ``rewrap``. A foreign file is accepted where its key accepts those;
        ``key_id`` names the key that opens it, too.
        """
        data = _data(ciphertext)
        with self._recorder.recorded("reseal", who, context, None, bytes_in=data.size) as call:
            head = data.read_header(self._rules.limits)
            call.note_file(head.nonce)
            found, permission = self._selector.for_moving(call, head, new_context, key_id)
            payload_bytes = data.size - head.payload_offset
            padded = stream.plaintext_size(payload_bytes) >= sealing.PAD_FROM_BYTES
            started, key = self._begin(call, permission, padded=padded)
            payload_keys = found.payload_key, started.payload_key
            resealed = data.reseal(head.payload_offset, payload_keys, started.head)
            call.record.bytes_out = len(started.head) + payload_bytes
            call.record.new_file_id = binding.file_id(started.nonce)
            return Sealed(resealed, key, call.record.new_file_id)

    def run(  # noqa: PLR0913 -- the parameters of every operation
        self,
        operation: JobKind,
        who: Principal,
        data: bytes | FileToFile,
        context: Context,
        *,
        new_context: Context | None = None,
        key_id: str | None = None,
    ) -> Sealed | Opened:
        """Call the operation of this name; ``new_context`` is for ``rewrap`` and ``reseal``."""
        if operation == "encrypt":
            return self.encrypt(who, data, context, key_id=key_id)
        if operation == "decrypt":
            return self.decrypt(who, data, context, key_id=key_id)
        move = self.rewrap if operation == "rewrap" else self.reseal
        return move(who, data, context, new_context=new_context, key_id=key_id)

    def generate_data_key(
        self, who: Principal, size_bytes: int, context: Context, *, key_id: str | None = None
    ) -> DataKey:
        """Random bytes in clear and sealed. Raises DataKeysUnsupported where settings refuse them."""
        with self._recorder.recorded("generate_data_key", who, context, key_id) as call:
            started, key = self._selector.seal(call, lambda keys: _begin_data_key(keys, context))
            call.note_wraps(started.wrap_keys)
            plaintext = os.urandom(size_bytes)
            ciphertext = started.head + stream.seal(started.payload_key, plaintext)
            call.record.bytes_out = len(ciphertext)
            return DataKey(plaintext, ciphertext, key, call.note_file(started.nonce))

    # -- file keys: the caller writes and reads header and payload -------------------------------------

    def wrap(
        self, who: Principal, file_key: bytes, context: Context, *, key_id: str | None = None
    ) -> WrappedFileKey:
        """Wrap a 16-byte file key of the caller. Raises InvalidRequest for another size.

        A permission of its own: the caller can seal under the file key for good.
        """
        with self._recorder.recorded("wrap", who, context, key_id, bytes_in=len(file_key)) as call:
            if len(file_key) != header.FILE_KEY_BYTES:
                raise InvalidRequest(f"A file key has {header.FILE_KEY_BYTES} bytes")
            bundle, key = self._selector.seal(
                call, lambda keys: sealing.wrap_for_plugin(file_key, keys, context)
            )
            stanzas = header.unbundled([bundle], header.FILE_LIMITS)
            call.record.stanzas = binding.stanzas_digest(stanzas)
            call.note_wraps(binding.wrap_keys_in(stanzas))
            text = header.render_stanza(bundle)
            call.record.bytes_out = len(text)
            return WrappedFileKey(text, key)

    def unwrap(
        self,
        who: Principal,
        stanzas: bytes,
        context: Context,
        *,
        key_id: str | None = None,
        nonce: bytes = b"",
    ) -> Unwrapped:
        """Unwrap the file key of our stanzas, given as text, of the file with this payload nonce.

        Native stanzas without ours are refused: nothing would bind them to a context. Raises as ``decrypt``,
        and InvalidRequest for a nonce of another size. An age tool gives no nonce; the origin is then
        ``foreign`` where it cannot be proven and the key accepts foreign files.
        """
        with self._recorder.recorded("unwrap", who, context, key_id, bytes_in=len(stanzas)) as call:
            if nonce:
                if len(nonce) != header.NONCE_BYTES:
                    raise InvalidRequest(f"A nonce has {header.NONCE_BYTES} bytes")
                call.note_file(nonce)
            found = self._selector.unwrap_stanzas(call, stanzas, nonce)
            call.record.bytes_out = len(found.file_key)
            return found

    # -- headers of uploads: the spool holds the payload, which stays as it is ------------------------

    def encrypt_header(
        self,
        who: Principal,
        payload: tuple[bytes, bytes],
        context: Context,
        *,
        size_bytes: int,
        key_id: str | None = None,
    ) -> bytes:
        """The header for a payload that the spool sealed already, under this file key and payload nonce.

        ``size_bytes`` is the size of the plaintext.
        """
        with self._recorder.recorded("encrypt", who, context, key_id, bytes_in=size_bytes) as call:
            padded = size_bytes >= sealing.PAD_FROM_BYTES
            started, _ = self._begin(call, padded=padded, payload=payload)
            call.note_file(started.nonce)
            return started.header

    def decrypt_header(
        self,
        who: Principal,
        source: RangeSource,
        context: Context,
        *,
        key_id: str | None = None,
        options: ParallelOptions = DEFAULTS,
    ) -> Unwrapped:
        """Unwrap the file key of a file and authenticate all of its payload; no plaintext is written.

        Raises as ``decrypt``, and what ``options.check`` raises.
        """
        with self._recorder.recorded("decrypt", who, context, key_id, bytes_in=source.size) as call:
            head = header.read_by(source.read_at, header.FILE_LIMITS)
            call.note_file(head.nonce)
            found = self._selector.unwrap(call, head)
            payload = source.tail(head.payload_offset)
            parallel.verify_file(found.payload_key, payload, options)
            call.record.bytes_out = stream.plaintext_size(payload.size)
            return found

    def rewrap_header(
        self,
        who: Principal,
        source: RangeSource,
        context: Context,
        *,
        new_context: Context | None,
        key_id: str | None,
    ) -> tuple[Sealed, bytes]:
        """The new header of a file, and its payload nonce, which stays. Raises as ``rewrap``."""
        with self._recorder.recorded("rewrap", who, context, None, bytes_in=source.size) as call:
            head = header.read_by(source.read_at, header.FILE_LIMITS)
            return self._rewrapped(call, head, new_context, key_id), head.nonce

    # -- keys, permissions and health -----------------------------------------------------------------

    def key_version_status(self, who: Principal, head: Header, key_id: str | None) -> KeyVersionStatus | None:
        """The key version that a header names, and whether a rewrap to ``key_id`` would name the same.

        Nothing is unwrapped or proven. None for a foreign file. Raises DecryptFailed, UnknownKey.
        """
        bound = binding.read(head.stanzas)
        if bound is None:
            return None
        if not self.policy.sees(who, bound.key_id):
            raise UnknownKey
        key, target = self.keyring.named(bound.key_id), self.keyring.named(key_id or bound.key_id)
        known = any(version.version == bound.key_version for version in key.backend.versions())
        native = any(not stanza.type.startswith(binding.OWN_PREFIX) for stanza in head.stanzas)
        newest = target.key_id == bound.key_id and target.seals_as(who.tenant, bound, native=native)
        return KeyVersionStatus(bound.key_id, bound.key_version if known else "", newest)

    def rotate(self, who: Principal, key_id: str) -> KeyRef:
        """Make a new version of a key in each backend that seals with it; old versions still decrypt.

        Existing files keep their version until a rewrap, and no reader is revoked. The audit log has an
        intent before and an outcome after; if one of several backends fails, others may have a new version.
        """
        with self._recorder.recorded("rotate", who, Context(), key_id) as call:
            key = self._selector.permitted(call, key_id)
            audit.begin_effect(self.audit_log, call.record, audit.effect_name(call.record.key_id))
            for number, backend in enumerate(key.sealing):
                try:
                    backend.rotate()
                except NotRotated as exc:
                    if not number:
                        raise
                    raise errors.BackendUnavailable(exc.detail) from exc
            ref = key.ref(who.tenant)
            call.note_key(ref)
            return ref

    def require(
        self, who: Principal, operation: str, key_id: str | None = None, context: Context | None = None
    ) -> None:
        """Raise Forbidden or UnknownKey, recorded, unless policy allows an operation that is yet to come.

        A key or context of None is not known yet and not checked. Raises Unavailable if policy cannot be
        read now.
        """
        try:
            self.policy.require(who, operation, key_id, context)
        except (Forbidden, UnknownKey) as exc:
            self.raise_recorded(who, operation, context or Context(), exc)

    def raise_recorded(self, who: Principal, operation: str, context: Context, error: KmsError) -> NoReturn:
        """Record an operation that was refused before its key was known, and raise ``error``."""
        with self._recorder.recorded(operation, who, context, None):
            raise error

    def health_check(self) -> Health:
        """Wrap and unwrap once with the backend of the default key."""
        return self.keyring.default.backend.health_check()

    def for_job(self) -> "Kms":
        """Return this service for a batch or one run of a job: few calls to remote backends and policy."""
        policy = Remembered(self.policy)
        return Kms(self.keyring.for_job(), policy, self.audit_log, self._rules, self.usage)

    def _rewrapped(
        self, call: Operation, head: Header, new_context: Context | None, key_id: str | None
    ) -> Sealed:
        file_id = call.note_file(head.nonce)
        found, permission = self._selector.for_moving(call, head, new_context, key_id)
        padded = any(stanza.type == binding.PAD for stanza in head.stanzas)
        started, key = self._begin(call, permission, padded=padded, payload=(found.file_key, found.nonce))
        made = started.header
        call.record.bytes_out = call.record.bytes_in - head.size + len(made)
        return Sealed(made, key, file_id)

    def _begin(
        self,
        call: Operation,
        permission: str | None = None,
        *,
        padded: bool,
        payload: tuple[bytes, bytes] | None = None,
    ) -> tuple[Sealing, KeyRef]:
        """Write a header under the key and context of ``call``: ``sealing.begin``, ``KeySelector.seal``."""

        def begin(keys: Sequence[BackendKey]) -> Sealing:
            return sealing.begin(keys, call.context, padded=padded, payload=payload)

        started, key = self._selector.seal(call, begin, permission)
        call.note_wraps(started.wrap_keys)
        return started, key


def _begin_data_key(keys: Sequence[BackendKey], context: Context) -> Sealing:
    backend = keys[0][0]
    if not backend.data_keys:
        raise DataKeysUnsupported(
            f"The {backend.name} backend gives no data keys: set `data_keys = true` under "
            f"`[kms.{table_of(backend.name)}]` in the service's kms.toml and restart it"
        )
    return sealing.begin(keys, context)


def _data(given: bytes | FileToFile) -> InMemory | FileToFile:
    return given if isinstance(given, FileToFile) else InMemory(given)
