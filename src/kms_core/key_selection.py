"""Which key seals and which one opens: the name in the file, then policy, and only then a backend."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

from kms_core.age import header
from kms_core.age.header import Header, HeaderLimits
from kms_core.age.x25519 import NoMatch
from kms_core.audit import AuditWriter
from kms_core.auth.policy import Policy, allows
from kms_core.envelope import binding, sealing
from kms_core.envelope.binding import KeyRef
from kms_core.http_client import Unreachable
from kms_core.keyring import Key, Keyring
from kms_core.observability import metrics
from kms_core.operation import Operation
from kms_core.results import Unwrapped
from kms_core.rotation_limit import RotationLimit
from kms_protocol.context import Context
from kms_protocol.errors import ContextRequired, DecryptFailed, ForeignRefused

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class SelectionRules:
    """What settings decide about single calls."""

    require_context: bool = False
    limits: HeaderLimits = header.SYNC_LIMITS
    rotations: RotationLimit = field(default_factory=RotationLimit)


@dataclass(frozen=True, slots=True)
class KeySelector:
    """Keys for the operations of ``Kms``; each method notes in the call's record what it found."""

    _keyring: Keyring
    _policy: Policy
    _trail: AuditWriter
    _rules: SelectionRules

    def moving(
        self, call: Operation, found: Unwrapped, new_context: Context | None, key_id: str | None, closing: str
    ) -> tuple[Key, KeyRef]:
        """Where an opened file goes: its new context and key, by default those it had."""
        if new_context is not None:
            call.context = new_context
            call.record.new_context = self._trail.conceal(call.who.tenant, new_context)
        call.key_id = key_id or found.key.key_id
        return self.for_sealing(call, closing)

    def rewrapping(
        self, call: Operation, head: Header, new_context: Context | None, key_id: str | None
    ) -> tuple[str, str]:
        """What it takes: the operation alone where key id and context stay: nobody can open more then."""
        bound = binding.read(head)
        kept = new_context is None or call.context.is_kept_by(new_context)
        stays = bound and key_id in {None, bound.key_id} and kept
        itself = call.record.operation
        if bound and stays and allows(self._policy, call.who, itself, bound.key_id, call.context):
            return itself, itself
        return "decrypt", "encrypt"

    def for_sealing(self, call: Operation, operation: str | None = None) -> tuple[Key, KeyRef]:
        if self._rules.require_context and not call.context:
            raise ContextRequired
        call.context.not_after()
        key = self.key(call, call.key_id, operation)
        ref = key.ref(call.who.tenant)
        call.names(ref)
        return key, ref

    def unwrap(self, call: Operation, head: Header, operation: str | None = None) -> Unwrapped:
        """Key choice by the name in the file, then policy, and only then any unwrap."""
        bound = binding.read(head)
        version, origin = (bound.key_version, "service") if bound else ("", "foreign")
        key = self.key(call, bound.key_id if bound else call.key_id, operation, (version, origin))
        if bound is None:
            return self._unwrap_foreign(call, head, key)
        if call.key_id not in {None, bound.key_id}:
            raise DecryptFailed
        file_key, ref = by_first(
            key.openers(call.who.tenant, bound),
            lambda backend, ref: sealing.file_key_of(head, backend, ref, context=call.context, bound=bound),
        )
        call.names(ref)
        check_not_over(call.context)
        return Unwrapped(file_key, head.nonce, ref, "service")

    @staticmethod
    def _unwrap_foreign(call: Operation, head: Header, key: Key) -> Unwrapped:
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

    def key(
        self,
        call: Operation,
        key_id: str | None,
        operation: str | None = None,
        file: tuple[str, str] = ("", ""),
    ) -> Key:
        """Policy first: for a caller who may not use it, a key is as one that does not exist.

        ``file`` is version and origin as a file names them. Refusals name these too; no backend is asked yet.
        """
        named = self._keyring.default.key_id if key_id is None else key_id
        if key := self._keyring.keys.get(named):
            version, origin = file
            call.names(KeyRef(call.who.tenant, named, version, key.backend.name), origin)
        self._policy.require(call.who, operation or call.record.operation, named, call.context)
        return self._keyring.named(named)


def check_not_over(context: Context) -> None:
    limit = context.not_after()
    if limit is not None and datetime.now(UTC) > limit:
        raise DecryptFailed


def by_first(
    openers: Iterable[sealing.Wrap], unwrap: Callable[[sealing.Wrapper, KeyRef], R]
) -> tuple[R, KeyRef]:
    """By the first backend that answers. Only silence passes on to the next one, never a refusal."""
    silent: Unreachable | None = None
    for backend, ref in openers:
        try:
            return unwrap(backend, ref), ref
        except NoMatch:
            continue
        except Unreachable as exc:
            metrics.BACKEND_FAILOVERS.labels(ref.backend).inc()
            silent = exc
    raise silent or DecryptFailed
