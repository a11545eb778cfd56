"""Bounds on the connections of a port.

Also checks of Host and Origin, against DNS rebinding and requests by pages of other sites (RFC 9110 §7.2,
Fetch §3.2).
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from kms_core.auth.rate_limit import source_of

if TYPE_CHECKING:
    from kms_core.http_server.protocol import HttpProtocol

LOCAL_HOSTS: Final = ("localhost", "127.0.0.1", "::1")
REFUSED: Final = (
    "This Host or Origin is not one that the service is configured for: "
    "add the name to [kms.server] allowed_hosts, or call it as localhost"
)
_OWN_SITES: Final = frozenset({b"same-origin", b"none"})


class HostCheck:
    """The host names of a port: loopback names, its own address, and those of the settings."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """``hosts`` are further names; ``*`` allows any name and any Origin."""
        self._hosts = frozenset(host.lower() for host in (*LOCAL_HOSTS, *hosts))

    def refuses(self, headers: Mapping[bytes, bytes], server: tuple[str, int | None] | None) -> bool:
        """Return whether to refuse a request by its headers; ``server`` is the address that it reached.

        A page in the operator's browser must not reach a service that trusts the loopback interface. The
        address is allowed as a host: no DNS server can forge it, and probes and scrapes in a cluster use it.
        """
        if "*" in self._hosts:
            return False
        named, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin")
        try:
            address = urlsplit(f"//{named}")
            host = (address.hostname or "") if address.port != 0 and "@" not in named else ""
            foreign = origin is not None and urlsplit(origin.decode("latin-1")).netloc != named
        except ValueError:  # a wrong IPv6 address in brackets, or a wrong port
            return True
        known = host in self._hosts or (server is not None and host == server[0])
        return not known or foreign or headers.get(b"sec-fetch-site", b"none") not in _OWN_SITES


def by_name(headers: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """The first header of each name. A repeated Host is empty: a proxy may have used the other one.

    RFC 9112 §3.2.
    """
    found = dict(reversed(headers))
    if len(found) < len(headers) and sum(name == b"host" for name, _ in headers) > 1:
        found[b"host"] = b""
    return found


_EVICTED_PART: Final = 16  # a full port closes this part of its connections at once
_RETRY_S: Final = 0.01


class EvictionClass(IntEnum):
    """Reasons to close a connection to make room, in the order in which they apply."""

    SILENT = 0
    """It never sent a whole request head."""
    IDLE = 1
    """All its requests are answered."""
    UNREAD = 2
    """Its client does not read a response."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """``most`` connections of a port in one process, and at most half of them from one source address.

    A connection has ``timeout_s`` to twice ``timeout_s`` seconds for the head of a request. With
    ``ends_unread`` it also ends once its client has read nothing of a response for that time. ``is_proxy``
    says which addresses are exempt from the bound by source.
    """

    most: int = 2048
    timeout_s: float = 30.0
    ends_unread: bool = False
    is_proxy: Callable[[str], bool] = lambda _: False


class Connections:
    """The open connections of one port in one process.

    To make room, connections of the source with the most connections are closed first, those of one source in
    the order of ``EvictionClass``, oldest first. If all have a request in progress, the new connection is
    refused.
    """

    def __init__(self, limits: ConnectionLimits | None = None) -> None:
        self.limits: Final = ConnectionLimits() if limits is None else limits
        self._open: dict[HttpProtocol, str] = {}
        self._sources: Counter[str] = Counter()
        self._retry_at = 0.0

    def opened(self, connection: "HttpProtocol") -> bool:
        """Count a new connection; False if there is no room for it."""
        source = source_of(connection.source) if connection.source else ""
        if not (self._has_room() and self._has_room_of_source(source)):
            return False
        self._open[connection] = source
        self._sources[source] += 1
        return True

    def closed(self, connection: "HttpProtocol") -> None:
        """Stop counting a connection."""
        source = self._open.pop(connection, None)
        if source is not None:
            self._sources[source] -= 1
            if not self._sources[source]:
                del self._sources[source]

    def _has_room(self) -> bool:
        return len(self._open) < self.limits.most or self._make_room(lambda _: True)

    def _has_room_of_source(self, source: str) -> bool:
        most = max(1, self.limits.most // 2)
        if self._sources[source] < most or not source or self.limits.is_proxy(source):
            return True
        return self._make_room(lambda other: other == source)

    def _make_room(self, of: Callable[[str], bool]) -> bool:
        """Close several connections at once, so that a flood of new ones does not sort them all each time.

        If there was none to close, it tries again after 10 ms at the earliest.
        """
        now = time.monotonic()
        if now < self._retry_at:
            return False
        found = sorted(
            (-self._sources[source], reason, number, each)
            for number, (each, source) in enumerate(self._open.items())
            if of(source) and (reason := each.eviction_class()) is not None
        )[: max(1, self.limits.most // _EVICTED_PART)]
        for *_, each in found:
            self.closed(each)
            each.end()
        if not found:
            self._retry_at = now + _RETRY_S
        return bool(found)
