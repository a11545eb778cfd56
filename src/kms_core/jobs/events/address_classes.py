"""Classes of IP addresses: those of the open internet, and those that serve a machine itself.

They go by the special-purpose registries of IANA (RFC 6890), and by the addresses at which clouds serve
metadata and credentials to a machine, as their vendors publish them.
"""

import ipaddress
from collections.abc import Iterator
from typing import Final

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _networks(*texts: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(map(ipaddress.ip_network, texts))


_GLOBAL_UNICAST: Final = ipaddress.ip_network("2000::/3")  # all that IANA has given out (RFC 4291 §2.4)
_NOT_PUBLIC: Final = _networks(  # beyond `is_global`, whose list differs between Pythons
    "100.64.0.0/10",  # RFC 6598; 100.100.100.200 is Alibaba's metadata
    "192.0.0.0/24",  # RFC 6890
    "192.88.99.0/24",  # the relays of 6to4, RFC 7526
    "2001::/23",  # RFC 2928, with Teredo
    "2002::/16",  # 6to4, RFC 3056: holds an IPv4 address
    "3fff::/20",  # RFC 9637
)
_OF_HOSTS: Final = _networks(
    "169.254.0.0/16",  # metadata of most clouds; AWS: credentials of containers and pods
    "fe80::/10",
    "168.63.129.16/32",  # Azure: the host, which takes POSTs
    "100.100.100.200/32",  # Alibaba
    "192.0.0.192/32",  # Oracle
    "fd00:ec2::/32",  # AWS: ::254 metadata, ::23 credentials of pods
    "fd20:ce::254/128",  # Google
    "fd00:42::42/128",  # Scaleway
    "fd00:c1::a9fe:a9fe/128",  # Oracle
)
_HOLD_IPV4: Final = _networks(  # in their last 32 bits
    "::/96",  # IPv4-compatible, RFC 4291 §2.5.5.1
    "::ffff:0:0/96",  # IPv4-mapped, RFC 4291 §2.5.5.2
    "::ffff:0:0:0/96",  # IPv4-translated, RFC 2765 §2.1
    "64:ff9b::/96",  # NAT64, RFC 6052 §2.1
    "64:ff9b:1::/48",  # NAT64 of one network, RFC 8215
)


def is_public(address: Address) -> bool:
    """True if an address is one of the open internet; those that hold another (tunnels, NAT64) are not."""
    address = _unmapped(address)
    if is_of_host(address) or any(address in network for network in _NOT_PUBLIC):
        return False
    if isinstance(address, ipaddress.IPv6Address) and address not in _GLOBAL_UNICAST:
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


def is_of_host(address: Address) -> bool:
    """Return whether the address is link-local or a cloud metadata service. No webhook is sent there.

    So are IPv6 addresses that a translator or a tunnel would take there.
    """
    return any(found in network for found in _destinations(address) for network in _OF_HOSTS)


def _destinations(address: Address) -> Iterator[Address]:
    """The address without a zone, and the IPv4 addresses to which a packet for it may go."""
    address = _unmapped(address)
    yield address
    if isinstance(address, ipaddress.IPv6Address):
        if any(address in network for network in _HOLD_IPV4):
            yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if address.sixtofour:  # RFC 3056
            yield address.sixtofour


def _unmapped(address: Address) -> Address:
    """The IPv4 address that ``::ffff:a.b.c.d`` stands for (RFC 4291 §2.5.5.2), without a zone."""
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or ipaddress.IPv6Address(int(address))
    return address
