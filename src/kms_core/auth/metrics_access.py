"""Access to the metrics: by ``[kms.server] metrics``, and by tokens with the scope ``metrics``."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from kms_core.auth.authenticator import Authenticator
from kms_core.auth.policy import Policy, allows
from kms_core.observability import metrics
from kms_core.proxies import Proxies
from kms_core.sections import is_loopback
from kms_protocol.errors import Unauthenticated, Unavailable

_FORWARDED: Final = frozenset({"forwarded", "x-forwarded-for", "x-real-ip", "via"})


@dataclass(frozen=True, slots=True)
class MetricsAccess:
    """The rule for /metrics. ``authenticator`` None: no token is valid.

    A trusted proxy never counts as this machine, even if its address is a loopback address.
    """

    mode: Literal["loopback", "open", "token"]
    authenticator: Authenticator | None
    policy: Policy
    proxies: Proxies

    def is_open_to(self, address: str | None, header_names: Iterable[str]) -> bool:
        """True if a request needs no credential: it is from this machine, and no proxy forwarded it."""
        if self.mode != "loopback":
            return self.mode == "open"
        if address is None or not is_loopback(address) or self.proxies.trust(address):
            return False
        return _FORWARDED.isdisjoint(map(str.lower, header_names))

    def allows(self, token: str) -> bool:
        """Return whether a token allows to read the metrics. May block for up to 5 seconds."""
        if self.authenticator is None:
            return False
        try:
            return allows(self.policy, self.authenticator.principal(token), "metrics")
        except Unauthenticated as exc:
            metrics.AUTH_FAILURES.labels(exc.reason).inc()
        except Unavailable:
            pass
        return False
