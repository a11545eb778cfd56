"""The client's address behind trusted proxies, from X-Forwarded-For or Forwarded (RFC 7239).

A proxy appends the address of its peer, so a list is read from its right end, past trusted proxies, to the
first other address. Entries that the client itself has sent are further left and have no effect.
"""

import ipaddress
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, Protocol

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
MOST_ENTRIES: Final = 32
_MOST_CHARS: Final = 4096
_NODE: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+))(?::[0-9]{1,5})?|([0-9A-Fa-f:.]+)", re.ASCII)
_PAIR: Final = re.compile(r'[ \t]*([A-Za-z0-9_-]+)=([^\s",;\\]+|"(?:[^"\\]|\\.)*")[ \t]*(?:;|$)', re.ASCII)


def collapsed(lines: Sequence[str]) -> list[Network]:
    """The smallest list of networks with the same addresses. Raises ValueError for an invalid network."""
    networks = [ipaddress.ip_network(line) for line in lines]
    four = [network for network in networks if isinstance(network, ipaddress.IPv4Network)]
    six = [network for network in networks if isinstance(network, ipaddress.IPv6Network)]
    return [*ipaddress.collapse_addresses(four), *ipaddress.collapse_addresses(six)]


class ProxySettings(Protocol):
    """The settings of ``[kms.server]`` that ``Proxies`` needs."""

    @property
    def trusted_proxies(self) -> Sequence[str]: ...
    @property
    def proxy_header(self) -> Literal["x-forwarded-for", "forwarded"]: ...


@dataclass(frozen=True)
class Proxies:
    """The networks of trusted proxies, and the lower-case name of the header that they set."""

    networks: tuple[Network, ...]
    header: Literal["x-forwarded-for", "forwarded"]

    @classmethod
    def of(cls, server: ProxySettings) -> "Proxies":
        return cls(tuple(collapsed(server.trusted_proxies)), server.proxy_header)

    def trust(self, address: str) -> bool:
        """Return whether a socket's address is that of a trusted proxy."""
        if not self.networks:
            return False
        found = _address(address)
        return found is not None and self._holds(found)

    def client(self, peer: str, text: str) -> str:
        """The address of the client of a request that came from the trusted proxy ``peer``.

        ``text`` is the header's value, several lines joined by commas. An entry that names no address
        (malformed, ``unknown``, ``_hidden``), or the 33rd, ends the search at the trusted proxy nearest to
        it; where every entry is a trusted proxy, that is the leftmost.
        """
        nearest = peer
        if len(text) > _MOST_CHARS:  # the entries that are cut off, wholly or in part, are unknown
            text = f"unknown,{text[-_MOST_CHARS:].partition(',')[2]}"
        entries = _forwarded(text) if self.header == "forwarded" else _forwarded_for(text)
        for number, entry in enumerate(entries):
            found = None if entry is None or number >= MOST_ENTRIES else _node(entry)
            if found is None:
                return nearest
            nearest = str(found)
            if not self._holds(found):
                return nearest
        return nearest

    def _holds(self, address: Address) -> bool:
        return any(address in network for network in self.networks)


@lru_cache(maxsize=1024)
def _address(text: str) -> Address | None:
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
    return _address(match[1] or match[2] or match[3]) if match else None


def _forwarded_for(text: str) -> Iterator[str]:
    """The entries from the right, without empty ones (RFC 9110 §5.6.1)."""
    for entry in reversed(text.split(",")):
        if entry.strip(" \t"):
            yield entry.strip(" \t")


def _forwarded(text: str) -> Iterator[str | None]:
    """The ``for`` of each element from the right; None for an element that is malformed or has none."""
    for element in _elements(text):
        if element.strip(" \t"):
            yield _for(element)


def _elements(text: str) -> Iterator[str]:
    """The texts between commas outside quotes, read from the right.

    An unclosed quote in the client's part, on the left, cannot affect the elements of proxies.
    """
    end, is_quoted = len(text), False
    for at in range(len(text) - 1, -1, -1):
        if text[at] == '"' and not _is_escaped(text, at):
            is_quoted = not is_quoted
        elif text[at] == "," and not is_quoted:
            yield text[at + 1 : end]
            end = at
    yield text[:end]


def _is_escaped(text: str, at: int) -> bool:
    first = at
    while first > 0 and text[first - 1] == "\\":
        first -= 1
    return (at - first) % 2 == 1


def _for(element: str) -> str | None:
    at, found = 0, []
    while at < len(element):
        pair = _PAIR.match(element, at)
        if pair is None:
            return None
        if pair[1].lower() == "for":
            found.append(pair[2].strip('"'))
        at = pair.end()
    return found[0] if len(found) == 1 else None
