"""The client's address behind trusted proxies, from X-Forwarded-For.

A proxy appends the address of its peer, so a list is read from its right end, past trusted proxies, to the
first other address. Entries that the client itself has sent are further left and have no effect.
"""

import ipaddress
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import Final

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
MOST_ENTRIES: Final = 32
_IP: Final = r"([0-9A-Fa-f:.]{1,45})"  # an IPv6 address that ends with an IPv4 address is the longest
_NODE: Final = re.compile(rf"(?:\[{_IP}\]|([0-9.]{{1,15}}))(?::[0-9]{{1,5}})?|{_IP}", re.ASCII)


def collapsed(lines: Sequence[str]) -> list[Network]:
    """The smallest list of networks with the same addresses. Raises ValueError for an invalid network."""
    networks = [ipaddress.ip_network(line) for line in lines]
    four = [network for network in networks if isinstance(network, ipaddress.IPv4Network)]
    six = [network for network in networks if isinstance(network, ipaddress.IPv6Network)]
    return [*ipaddress.collapse_addresses(four), *ipaddress.collapse_addresses(six)]


class Proxies:
    """The networks of trusted proxies."""

    def __init__(self, trusted: Sequence[str]) -> None:
        """``trusted`` are addresses and networks. Raises ValueError."""
        self._networks = collapsed(trusted)

    def trust(self, address: str) -> bool:
        """Return whether a socket's address is that of a trusted proxy."""
        found = address_of(address)
        return found is not None and self._holds(found)

    def client(self, peer: str, text: str) -> str:
        """The address of the client of a request that came from the trusted proxy ``peer``.

        ``text`` is the header's value, several lines joined by commas. An entry that names no address
        (malformed, ``unknown``, ``_hidden``), or the 33rd, ends the search at the trusted proxy nearest to
        it; where every entry is a trusted proxy, that is the leftmost.
        """
        nearest = peer
        entries = (entry.strip(" \t") for entry in reversed(text.split(",")))
        for entry in islice(filter(None, entries), MOST_ENTRIES):  # empty ones: RFC 9110 §5.6.1
            found = _node(entry)
            if found is None:
                break
            nearest = str(found)
            if not self._holds(found):
                break
        return nearest

    def _holds(self, address: Address) -> bool:
        return any(address in network for network in self._networks)


@lru_cache(maxsize=1024)
def address_of(text: str) -> Address | None:
    """An address; IPv4 in IPv6 form (``::ffff:…``) becomes IPv4."""
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found


def _node(text: str) -> Address | None:
    """The address of an entry, which may have brackets and a port."""
    match = _NODE.fullmatch(text)
    return address_of(match[1] or match[2] or match[3]) if match else None
