"""Who reads the metrics: whoever ``[kms.server] metrics`` lets, and callers whose scope says ``metrics``."""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from kms_core.auth.authenticator import Authenticator
from kms_core.auth.policy import Policy, allows
from kms_core.observability import metrics
from kms_core.proxies import Proxies
from kms_protocol.errors import Unauthenticated, Unavailable

_FORWARDED: Final = frozenset({"forwarded", "x-forwarded-for", "x-real-ip", "via"})


@dataclass(frozen=True, slots=True)
class MetricsAccess:
    """``doors`` None: no token is known. A trusted proxy is never on this machine, whatever its address."""

    mode: Literal["loopback", "open", "token"]
    doors: Authenticator | None
    policy: Policy
    proxies: Proxies

    def is_open_to(self, address: str | None, header_names: Iterable[str]) -> bool:
        """Without a credential: from this machine, unless a proxy says that somebody else asks."""
        if self.mode != "loopback":
            return self.mode == "open"
        if not _is_loopback(address) or (address and self.proxies.trust(address)):
            return False
        return _FORWARDED.isdisjoint(map(str.lower, header_names))

    def knows(self, token: str) -> bool:
        """Whether this token may read them."""
        if self.doors is None:
            return False
        try:
            return allows(self.policy, self.doors.principal(token), "metrics")
        except Unauthenticated as exc:
            metrics.AUTH_FAILURES.labels(exc.reason).inc()
        except Unavailable:
            pass
        return False


def _is_loopback(address: str | None) -> bool:
    try:
        return address is not None and ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
