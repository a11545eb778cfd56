"""Selects the key of an operation: by the name in the file, then by policy, and only then with a backend."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, TypeVar

from kms_core.age import header
from kms_core.age.header import Header, HeaderLimits
from kms_core.audit import AuditWriter
from kms_core.auth.policy import Policy, allows
from kms_core.envelope import binding, sealing
from kms_core.envelope.binding import KeyRef
from kms_core.keyring import BackendKey, Key, Keyring
from kms_core.operation import Operation, Origin, Unwrapped
from kms_protocol.context import Context
from kms_protocol.errors import ContextRequired, DecryptFailed, ForeignRefused, InvalidRequest, KmsError

_ORIGIN_UNPROVEN: Final = (
    "The origin of the file cannot be proven without its payload, and this key accepts no such file: "
    "open it with kms decrypt or kms decrypt-file, which read all of it"
)
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class SelectionRules:
    """Rules of the settings. ``limits`` are those of headers in memory."""

    require_context: bool = False
    limits: HeaderLimits = header.SYNC_LIMITS


@dataclass(frozen=True, slots=True)
class KeySelector:
    """Selects keys for the operations of ``Kms``, and notes in the audit record what it found.

    For a caller without permission, a key is as one that does not exist: each method raises Forbidden or
    UnknownKey before any backend is called, then BackendUnavailable.
    """

    _keyring: Keyring
    _policy: Policy
    _audit_log: AuditWriter
    _rules: SelectionRules

    def seal(
        self, call: Operation, wrap: Callable[[Sequence[BackendKey]], R], permission: str | None = None
    ) -> tuple[R, KeyRef]:
        """Call ``wrap`` with the backends and versions that are to wrap a new file key.

        Returns what ``wrap`` returns, and the version that the file is to name. ``permission`` is the
        operation that policy must allow, by default that of ``call``. Raises also ContextRequired, and
        InvalidContext for a wrong ``not_after`` in the context.
        """
        if self._rules.require_context and not call.context:
            raise ContextRequired
        call.context.not_after()
        key = self.permitted(call, call.key_id, permission)
        with key.timeout():
            keys = key.wrapping(call.who.tenant)
            call.note_key(keys[0][1])
            return wrap(keys), keys[0][1]

    def for_moving(
        self, call: Operation, head: Header, new_context: Context | None, key_id: str | None
    ) -> tuple[Unwrapped, str]:
        """Unwrap the file key of a rewrap or reseal.

        Returns also the operation that policy must allow for ``seal``. Without a new context or key id the
        result keeps those of the file. Raises as ``unwrap``, and InvalidRequest for the rewrap of a foreign
        file.
        """
        operation, bound = call.record.operation, binding.read(head.stanzas)
        if bound is None and operation == "reseal":
            call.key_id = key_id
        opening, closing = "decrypt", "encrypt"
        kept = new_context is None or call.context.is_kept_by(new_context)
        if (
            bound
            and kept
            and key_id in {None, bound.key_id}
            and allows(self._policy, call.who, operation, bound.key_id, call.context)
        ):  # same key and context: no new reader, so its own permission is enough
            opening = closing = operation
        found = self.unwrap(call, head, opening)
        if found.origin == "foreign" and operation == "rewrap":
            raise InvalidRequest("A foreign file cannot be rewrapped: decrypt it and encrypt it again")
        if new_context is not None:
            call.context = new_context
            call.record.new_context = self._audit_log.conceal(call.who.tenant, new_context)
        call.key_id = key_id or found.key.key_id
        return found, closing

    def unwrap(self, call: Operation, head: Header, permission: str | None = None) -> Unwrapped:
        """Unwrap the file key of a header and verify its MAC, context and origin.

        Raises DecryptFailed, also after the context's ``not_after``; ForeignRefused.
        """
        bound = binding.read(head.stanzas)
        if bound is None:
            key = self.permitted(call, call.key_id, permission, ("", "foreign"))
            return self._unwrap_foreign(call, head, key)
        key = self.permitted(call, bound.key_id, permission, (bound.key_version, ""))
        if call.key_id not in {None, bound.key_id}:
            raise DecryptFailed
        found, ref = key.first_answer(
            call.who.tenant,
            bound,
            lambda backend, ref: sealing.unwrap_file(head, backend, ref, context=call.context, bound=bound),
        )
        call.note_key(ref, "service")
        call.note_wraps(binding.wrap_keys_in([found.stanza]))
        _check_not_after(call.context)
        return Unwrapped(found.file_key, head.nonce, ref, "service")

    def unwrap_stanzas(self, call: Operation, text: bytes, nonce: bytes) -> Unwrapped:
        """Unwrap the file key of our stanzas, given as text without their header.

        The payload ``nonce`` may be empty. The origin is ``foreign`` where it cannot be proven. Raises
        DecryptFailed, also without stanzas of ours; ForeignRefused where the key accepts no foreign files.
        """
        stanzas = header.unbundled(header.parse_stanzas(text, self._rules.limits), self._rules.limits)
        call.record.stanzas = binding.stanzas_digest(stanzas)
        bound = binding.read(stanzas)
        if bound is None or call.key_id not in {None, bound.key_id}:
            raise DecryptFailed
        key = self.permitted(call, bound.key_id, None, (bound.key_version, ""))
        found, ref = key.first_answer(
            call.who.tenant,
            bound,
            lambda backend, ref: sealing.unwrap_for_plugin(
                stanzas, backend, ref, context=call.context, bound=bound, nonce=nonce
            ),
        )
        origin: Origin = "service" if found.is_proven else "foreign"
        call.note_key(ref, origin)
        call.note_wraps(binding.wrap_keys_in([found.stanza]))
        _check_not_after(call.context)
        if not found.is_proven and not key.accept_foreign:
            raise ForeignRefused(_ORIGIN_UNPROVEN)
        return Unwrapped(found.file_key, nonce, ref, origin)

    def permitted(
        self,
        call: Operation,
        key_id: str | None,
        permission: str | None = None,
        named: tuple[str, str] = ("", ""),
    ) -> Key:
        """The key of this id, or the default key, if policy allows it.

        ``named`` is the version that a file names, not verified, and its origin where that is known, for
        the audit record of a refusal. Of a key that the caller may not see the record says nothing: the
        tenant of the caller may read it.
        """
        key_id = self._keyring.default.key_id if key_id is None else key_id
        key, (version, origin) = self._keyring.keys.get(key_id), named
        try:
            self._policy.require(call.who, permission or call.record.operation, key_id, call.context)
        except KmsError:
            if self._policy.sees(call.who, key_id) and key is not None:
                call.note_key(KeyRef(call.who.tenant, key_id, version, key.backend.name), origin)
            raise
        if key is not None:
            call.note_key(KeyRef(call.who.tenant, key_id, version, key.backend.name), origin)
        return key or self._keyring.named(key_id)

    @staticmethod
    def _unwrap_foreign(call: Operation, head: Header, key: Key) -> Unwrapped:
        if not key.accept_foreign:
            raise ForeignRefused
        if call.context:  # a foreign file is bound to none
            raise DecryptFailed
        native = key.native
        if native is None:
            raise ForeignRefused("The key has no age identities, and a foreign file is for one of those")
        versions = [version.version for version in reversed(native.versions())]
        refs = [KeyRef(call.who.tenant, key.key_id, version, native.name) for version in versions]
        file_key, ref = sealing.foreign_file_key(head, native, refs)
        call.note_key(ref, "foreign")
        return Unwrapped(file_key, head.nonce, ref, "foreign")


def _check_not_after(context: Context) -> None:
    """Raise DecryptFailed after the time that a context names."""
    limit = context.not_after()
    if limit is not None and datetime.now(UTC) > limit:
        raise DecryptFailed
