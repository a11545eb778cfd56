"""Host and Origin checks against DNS rebinding and requests of foreign pages (RFC 9110 §7.2, Fetch §3.2)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final
from urllib.parse import urlsplit

LOCAL_HOSTS: Final = ("localhost", "127.0.0.1", "::1")
REFUSED: Final = (
    "This Host or Origin is not one that the service is configured for: "
    "add the name to [kms.server] allowed_hosts, or call it as localhost"
)
_OWN_SITES: Final = frozenset({b"same-origin", b"none"})


class HostCheck:
    """The names that a port may be called by: loopback names, its own address, and those of the settings."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """``hosts`` are further names; ``*`` allows any, and any Origin."""
        self._hosts = frozenset(host.lower() for host in (*LOCAL_HOSTS, *hosts))

    def refuses(self, headers: Mapping[bytes, bytes], server: tuple[str, int | None] | None) -> bool:
        """Whether to refuse a request by its headers; ``server`` is the address that it reached.

        A page in the operator's browser must not reach a service that trusts the loopback interface. The
        address that the connection reached is not a name that a DNS server could have pointed here: probes
        and scrapes in a cluster call by it.
        """
        if "*" in self._hosts:
            return False
        named, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin")
        try:
            address = urlsplit(f"//{named}")
            host = (address.hostname or "") if address.port != 0 and "@" not in named else ""
            foreign = origin is not None and urlsplit(origin.decode("latin-1")).netloc != named
        except ValueError:  # brackets around what is no IPv6 address, or what is no port
            return True
        known = host in self._hosts or (server is not None and host == server[0])
        return not known or foreign or headers.get(b"sec-fetch-site", b"none") not in _OWN_SITES


def by_name(headers: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """The first header of each name. Host is empty if it stands twice: a proxy may have gone by the other.

    RFC 9112 §3.2.
    """
    found = dict(reversed(headers))
    if len(found) < len(headers) and _has_two_hosts(headers):
        found[b"host"] = b""
    return found


def _has_two_hosts(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return sum(name == b"host" for name, _ in headers) > 1
