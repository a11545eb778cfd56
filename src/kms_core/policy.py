"""Who may do what: the principal of a call and the rule that is asked before any key is touched."""

from dataclasses import dataclass
from typing import Protocol

from kms_core.context import Context
from kms_core.errors import Forbidden

DEFAULT_TENANT = "default"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls, and for which tenant. ``credential`` names how they proved it, never the secret."""

    name: str
    tenant: str = DEFAULT_TENANT
    credential: str = "none"


class Policy(Protocol):
    """The rule. Asked in ``Kms``, so REST calls, jobs and the command are all held to it alike."""

    def require(self, who: Principal, operation: str, key_id: str, context: Context) -> None:
        """Return if allowed. Raises Forbidden, naming the missing rule and no values."""


class AllowAll:
    """Every operation of a known principal: the rule while ``auth.mode`` is none."""

    def require(self, who: Principal, operation: str, key_id: str, context: Context) -> None:
        del operation, key_id, context
        if not who.name:
            raise Forbidden
