"""Who may do what: the principal of a call and the rule that is asked before any key is touched."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from kms_core.envelope.binding import DEFAULT_TENANT
from kms_core.patterns import Pattern, any_matches
from kms_core.scopes import Access, Rule, Scope
from kms_protocol.context import Context
from kms_protocol.errors import Forbidden, UnknownKey

INTERNAL: Final = "internal"
"""The credential of the service's own chores; no caller and no job record can have it."""
_CHORES: Final = frozenset({"rotate"})


@dataclass(frozen=True, slots=True)
class Grant:
    """What a credential that cannot be looked up later (a JWT) allows, and until when (epoch seconds).

    That of a client certificate has the end alone: its scopes stand in the settings.
    """

    scopes: tuple[str, ...]
    until: float


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls, and for which tenant. ``credential`` names how they proved it, never the secret.

    ``source`` and ``target`` are those of the job from file to file that runs for this principal.
    """

    name: str
    tenant: str = DEFAULT_TENANT
    credential: str = "none"
    grant: Grant | None = None
    source: str = ""
    target: str = ""


class Policy(Protocol):
    """The rule. Asked in ``Kms``, so REST calls, jobs and the command are all held to it alike."""

    def require(
        self, who: Principal, operation: str, key_id: str | None = None, context: Context | None = None
    ) -> None:
        """Return if allowed; None is not known yet, and then no rule stands against it.

        Raises Forbidden, naming the missing rule and no values; UnknownKey for a key that this caller may
        not know, which is the answer for one that does not exist. Unavailable if that cannot be told now.
        """

    def sees(self, who: Principal, key_id: str) -> bool:
        """Whether this caller may know that the key exists. Raises as ``require``."""


class AllowAll:
    """Every operation of a known principal: the rule while callers are not authenticated."""

    def require(
        self, who: Principal, operation: str, key_id: str | None = None, context: Context | None = None
    ) -> None:
        del operation, key_id, context
        if not who.name:
            raise Forbidden

    def sees(self, who: Principal, key_id: str) -> bool:
        del key_id
        return bool(who.name)


class CredentialStatus(Protocol):
    """What a credential is worth now."""

    def scopes_of(self, who: Principal) -> Iterable[Scope]:
        """Raises Forbidden if it was revoked or has expired, Unavailable if that cannot be told now."""


_MISSING: Final[Mapping[Rule, str]] = {
    "operation": "No scope of this credential allows this operation",
    "context": "This credential allows this operation with this key only in a context that its scope names",
    "read": "No scope of this credential has a read= prefix that covers the source",
    "write": "No scope of this credential has a write= prefix that covers the target",
}
_ORDER: Final[Sequence[Rule | None]] = ("operation", "key", "context", "read", "write")


class ByScopes:
    """Allowed is what one scope of the credential allows, with the keys that its tenant has."""

    def __init__(self, standing: CredentialStatus, tenants: Mapping[str, Sequence[Pattern]]) -> None:
        """``tenants``: those that may use some keys only, with patterns of their ids."""
        self._standing = standing
        self._tenants = tenants

    def require(
        self, who: Principal, operation: str, key_id: str | None = None, context: Context | None = None
    ) -> None:
        if who.credential == INTERNAL and operation in _CHORES:
            return
        wanted = Access(operation, key_id, context, who.source, who.target)
        found = [scope.missing(wanted) for scope in self._standing.scopes_of(who)]
        nearest = None if None in found else max(found, key=_ORDER.index, default=_ORDER[0])
        if nearest == "key" or (nearest != "operation" and not self._has(who.tenant, key_id)):
            raise UnknownKey
        if nearest:
            raise Forbidden(_MISSING[nearest])

    def sees(self, who: Principal, key_id: str) -> bool:
        scopes_ = self._standing.scopes_of(who)
        return self._has(who.tenant, key_id) and any(scope.names_key(key_id) for scope in scopes_)

    def _has(self, tenant: str, key_id: str | None) -> bool:
        patterns = self._tenants.get(tenant)
        return key_id is None or patterns is None or any_matches(patterns, key_id)


def allows(
    policy: Policy,
    who: Principal,
    operation: str,
    key_id: str | None = None,
    context: Context | None = None,
) -> bool:
    """Whether ``require`` would return. Raises Unavailable if that cannot be told now."""
    try:
        policy.require(who, operation, key_id, context)
    except (Forbidden, UnknownKey):
        return False
    return True
