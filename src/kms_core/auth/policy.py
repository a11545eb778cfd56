"""Authorization: the principal of a call, and the policy that is checked before any key is used."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from kms_core.envelope.binding import DEFAULT_TENANT
from kms_core.patterns import Pattern, any_matches
from kms_core.scopes import Access, Rule, Scope
from kms_protocol.context import Context
from kms_protocol.errors import Forbidden, UnknownKey

INTERNAL: Final = "internal"
"""The credential of the service's own operations; no caller and no job record can have it."""
REMEMBERED_S: Final = 0.5
_MOST_REMEMBERED: Final = 1000
_INTERNAL_OPERATIONS: Final = frozenset({"rotate"})


@dataclass(frozen=True, slots=True)
class Grant:
    """Scopes and expiry (epoch seconds) of a credential that cannot be looked up later, such as a JWT.

    The grant of a client certificate has no scopes: they are in the settings.
    """

    scopes: tuple[str, ...]
    until: float


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller and its tenant. ``credential`` is the name of the credential, never its secret.

    ``source`` and ``target`` are the URLs of the file job that runs for this principal.
    """

    name: str
    tenant: str = DEFAULT_TENANT
    credential: str = "none"
    grant: Grant | None = None
    source: str = ""
    target: str = ""


class Policy(Protocol):
    """Decides which operations are allowed: ``Kms`` checks it for REST calls, jobs and commands alike."""

    def require(
        self, who: Principal, operation: str, key_id: str | None = None, context: Context | None = None
    ) -> None:
        """Return if the operation is allowed. A ``key_id`` or ``context`` of None is not checked.

        Raises Forbidden, which names the missing rule and no values; UnknownKey for a key that is not for
        this caller, as for one that does not exist; Unavailable if the credential cannot be verified now.
        """

    def sees(self, who: Principal, key_id: str) -> bool:
        """Return whether the caller may know that a key exists. Raises as ``require``."""


class AllowAll:
    """Allows every operation: the policy while no credentials are required."""

    def require(
        self, who: Principal, operation: str, key_id: str | None = None, context: Context | None = None
    ) -> None:
        del operation, key_id, context
        if not who.name:
            raise Forbidden

    def sees(self, who: Principal, key_id: str) -> bool:
        del key_id
        return bool(who.name)


_MISSING: Final[Mapping[Rule, str]] = {
    "operation": "This {credential} lacks `{operation}`",
    "context": "This {credential} allows `{operation}` with this key only in a context that its scope names",
    "read": "This {credential} lacks a read= prefix that covers the source",
    "write": "This {credential} lacks a write= prefix that covers the target",
}
_ORDER: Final[Sequence[Rule | None]] = ("operation", "key", "context", "read", "write")


class ByScopes:
    """Allows what one of the credential's scopes allows, with the keys of its tenant."""

    def __init__(
        self, scopes_of: Callable[[Principal], Iterable[Scope]], tenants: Mapping[str, Sequence[Pattern]]
    ) -> None:
        """``scopes_of`` is that of an ``Authenticator``.

        ``tenants`` has the tenants that may use only some keys, with patterns of their ids.
        """
        self._scopes_of = scopes_of
        self._tenants = tenants

    def require(
        self, who: Principal, operation: str, key_id: str | None = None, context: Context | None = None
    ) -> None:
        if who.credential == INTERNAL and operation in _INTERNAL_OPERATIONS:
            return
        wanted = Access(operation, key_id, context, who.source, who.target)
        found = [scope.missing(wanted) for scope in self._scopes_of(who)]
        nearest = None if None in found else max(found, key=_ORDER.index, default=_ORDER[0])
        if nearest == "key" or (nearest != "operation" and not self._has(who.tenant, key_id)):
            raise UnknownKey
        if nearest:
            kind = "certificate" if who.credential.startswith("cert:") else "token"
            raise Forbidden(_MISSING[nearest].format(credential=kind, operation=operation))

    def sees(self, who: Principal, key_id: str) -> bool:
        found = self._scopes_of(who)
        return self._has(who.tenant, key_id) and any(scope.names_key(key_id) for scope in found)

    def _has(self, tenant: str, key_id: str | None) -> bool:
        patterns = self._tenants.get(tenant)
        return key_id is None or patterns is None or any_matches(patterns, key_id)


class Remembered:
    """A policy for one batch or one run of a job, which asks another once for equal items.

    What was allowed stays so for half a second; a refusal is asked for each time.
    """

    def __init__(self, policy: Policy, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy, self._clock = policy, clock
        self._allowed: set[tuple[Principal, str, str | None, Context | None]] = set()
        self._until = -math.inf

    def require(
        self, who: Principal, operation: str, key_id: str | None = None, context: Context | None = None
    ) -> None:
        now, wanted = self._clock(), (who, operation, key_id, context)
        if now >= self._until or len(self._allowed) >= _MOST_REMEMBERED:
            self._allowed.clear()
            self._until = now + REMEMBERED_S
        if wanted not in self._allowed:
            self._policy.require(who, operation, key_id, context)
            self._allowed.add(wanted)

    def sees(self, who: Principal, key_id: str) -> bool:
        return self._policy.sees(who, key_id)


def allows(
    policy: Policy,
    who: Principal,
    operation: str,
    key_id: str | None = None,
    context: Context | None = None,
) -> bool:
    """True if ``require`` would return. Raises Unavailable if the credential cannot be verified now."""
    try:
        policy.require(who, operation, key_id, context)
    except (Forbidden, UnknownKey):
        return False
    return True
